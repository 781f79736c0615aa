"""Builds in child processes: each in a folder of its own, ended with whoever waits for it, its error told in one line.

The serving process imports no compiler: a compiler that crashes or is killed harms nobody, and the process-wide
settings that compilers need are set where no user code runs.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from softcap_runtime.artifacts import children
from softcap_runtime.errors import BuildFailed

log = logging.getLogger(__name__)

BUILD_TIMEOUT_S = 900
BUILD_FOLDER = "softcap_build_"
# The line that says what went wrong: a compiler's first error, as others follow from it, and Python's last.
_COMPILER_ERROR = re.compile(r"\berror: ")
_PYTHON_ERROR = re.compile(r"^[\w.]*(Error|Exception)\b")
_NO_REASON = "no message; check the C++ compiler and the space on disk, set CXX to another, or use engine='eager'"
_NOT_INHERITED = ("PYTHONOPTIMIZE", "PYTHONWARNINGS")


def find_compiler() -> str | None:
    """The C++ compiler that a build would run (``CXX``, else g++ or clang++); None when there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            # A bare name stays bare: torch tells compilers apart by their name.
            return os.path.abspath(name) if os.sep in name else name
    return None


def wanted_compiler(name: str) -> str:
    """The C++ compiler to build the kernel ``name`` with. Raises BuildFailed if there is none."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed(
            f"cannot build {name}: no C++ compiler found (looked for $CXX, g++, clang++); install g++, "
            "import a bundle of prewarmed kernels, or use engine='eager'"
        )
    return compiler


def compiler_version() -> str:
    """The first line of the compiler's ``--version``. Never raises, as it is called after a successful build."""
    compiler = find_compiler()
    if compiler is None:
        return "none"
    command = [compiler, "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0][:200]


def built_by(
    name: str, command: Callable[[Path], Sequence[str]], file: str, environment: Mapping[str, str] | None = None
) -> bytes:
    """Run ``command(folder)`` in a child process and return the bytes of ``folder / file`` that it writes.

    ``name``: the kernel, for errors. ``folder``: a temporary folder that the command works in. ``environment`` is
    added to this process's. See ``children`` for how the command is ended early.

    Raises BuildFailed, in one line, if the command fails, is killed or takes more than ``BUILD_TIMEOUT_S``, or if
    there is no folder for temporary files; ``children.Stopped`` if the work that needs the kernel is cancelled.
    """
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:
        raise BuildFailed(f"cannot build {name}: {error.strerror}; set TMPDIR to a folder of yours") from error
    if not _is_one_word(temporary):
        raise BuildFailed(
            f"cannot build {name}: the folder for temporary files is {temporary!r}, and torch gives compilers no "
            "path with spaces, quotes or backslashes; set TMPDIR to another"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=BUILD_FOLDER, ignore_cleanup_errors=True) as made:
            folder = Path(made)
            variables = {**_environment(folder), **(environment or {})}
            code, stderr = children.current().run(command(folder), variables, folder, BUILD_TIMEOUT_S)
            if code == 0 and (folder / file).is_file():
                return (folder / file).read_bytes()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"cannot build {name}: {error}") from error
    log.debug("build of %s failed:\n%s", name, stderr)
    if code < 0:
        raise BuildFailed(f"cannot build {name}: its builder died of {_death(-code)}")
    raise BuildFailed(f"cannot build {name} (exit {code}): {_reason(stderr)}")


# ``python -c RUN_MODULE PACKAGE_FOLDER MODULE ARGUMENTS...`` is ``python -m`` without the package's ``__init__``. That
# imports torch, which takes longer than Triton needs for most kernels.
_RUN_MODULE = """
import runpy, sys, types
package = sys.modules["softcap_runtime"] = types.ModuleType("softcap_runtime")
package.__path__ = [sys.argv.pop(1)]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def built_by_module(
    name: str, module: str, request: str, file: str, environment: Mapping[str, str] | None = None
) -> bytes:
    """``built_by`` a module of this package, run with two arguments: ``request`` and the path of the file to write."""
    run = [sys.executable, "-c", _RUN_MODULE, str(Path(__file__).absolute().parents[1]), module, request]
    return built_by(name, lambda folder: [*run, str(folder / file)], file, environment)


def _is_one_word(path: str) -> bool:
    try:
        return shlex.split(path) == [path]
    except ValueError:  # a quote that nothing closes
        return False


def _death(number: int) -> str:
    killer = signal.Signals(number).name
    if killer == "SIGKILL":
        return f"{killer}; free memory and try again"
    return (
        f"{killer}; if this happens again, torch cannot load this compiler's output: set CXX to another, or use "
        "engine='eager'"
    )


def _environment(folder: Path) -> dict[str, str]:
    """This process's environment for a child that works in ``folder``."""
    root = str(Path(__file__).resolve().parents[2])
    given = os.environ.get("PYTHONPATH")
    paths = [root, *map(os.path.abspath, given.split(os.pathsep) if given else ())]
    # Compilers written in Python read docstrings, which -OO drops, and emit warnings, which must not become errors.
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder),  # so that what a killed compiler leaves behind is removed with it
        # Caches that are removed with the build: the user's own have no checksums, so we do not trust them.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def _reason(stderr: str) -> str:
    """The line of a failed command's output that says why it failed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    python = [line for line in lines if _PYTHON_ERROR.search(line)]
    compiler = [line for line in lines if _COMPILER_ERROR.search(line)]
    found = compiler[:1] or python[-1:] or [x for x in lines if "error" in x.lower()][-1:] or lines[-1:]
    return found[0][:500] if found else _NO_REASON
