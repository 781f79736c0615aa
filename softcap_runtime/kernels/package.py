"""Kernels compiled ahead of time: a graph goes in, the bytes of an AOTInductor package come out.

The compiler runs in a child process: the process that serves imports neither dynamo nor Inductor, a crash or
a kill of the compiler harms nobody, and the process-wide switches that an export needs are set where no
user code runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from softcap_runtime.errors import BuildFailed
from softcap_runtime.kernels import children
from softcap_runtime.kernels.key import KernelSpec

log = logging.getLogger(__name__)

BUILD_TIMEOUT_S = 900
BUILD_FOLDER = "softcap_build_"
# How Python and compilers begin the line that says what went wrong; advice after it may name errors as well.
_ERROR = re.compile(r"^[\w.]*(Error|Exception)\b|\berror: ")
LEFT_BEHIND_S = 4 * BUILD_TIMEOUT_S
_NOT_INHERITED = ("PYTHONOPTIMIZE", "PYTHONWARNINGS")


def find_compiler() -> str | None:
    """The C++ compiler that a build would run (``CXX``, else g++ or clang++); None when there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            # A name stays one: torch tells compilers apart by what it reads in it.
            return os.path.abspath(name) if os.sep in name else name
    return None


def compiler_version() -> str:
    """The first line of the compiler's own description; it runs the compiler. Never raises: its kernel is built."""
    compiler = find_compiler()
    if compiler is None:
        return "none"
    command = [compiler, "--version"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0][:200]


def build(spec: KernelSpec) -> bytes:
    """Compile the kernel of ``spec`` in a child process; the bytes of its package.

    Raises BuildFailed with the end of the compiler's output, or naming what is missing before it runs; Stopped when the
    work that wants the kernel is given up.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed(
            f"cannot build {spec.op}: no C++ compiler found (looked for $CXX, g++, clang++); install g++, "
            "import a bundle of prewarmed kernels, or use engine='eager'"
        )
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:
        raise BuildFailed(
            f"cannot build {spec.op}: {error.strerror}; set TMPDIR to a folder of yours"
        ) from error
    if not _is_one_word(temporary):
        raise BuildFailed(
            f"cannot build {spec.op}: the folder for temporary files is {temporary!r}, and torch gives compilers no "
            "path with spaces, quotes or backslashes; set TMPDIR to another"
        )
    _sweep()
    try:
        with tempfile.TemporaryDirectory(prefix=BUILD_FOLDER, ignore_cleanup_errors=True) as folder:
            return _built(spec, folder, compiler)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"cannot build {spec.op}: {error}") from error


def _built(spec: KernelSpec, folder: str, compiler: str) -> bytes:
    target = Path(folder) / "kernel.pt2"
    module = "softcap_runtime.kernels.builder_process"
    command = [sys.executable, "-m", module, json.dumps(spec.fields()), str(target)]
    code, stderr = children.current().run(
        command, _child_environment(folder, compiler), Path(folder), BUILD_TIMEOUT_S
    )
    if code != 0 or not target.is_file():
        log.debug("build of %s failed:\n%s", spec, stderr)
        if code < 0:
            raise BuildFailed(f"cannot build {spec.op}: its builder died of {_death(-code)}")
        raise BuildFailed(f"cannot build {spec.op} (exit {code}): {_last_words(stderr)}")
    return target.read_bytes()


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
        f"{killer}; if it does so again, torch cannot load what this compiler makes: set CXX to another, or use "
        "engine='eager'"
    )


def _sweep() -> None:
    """Remove what builders that were killed left in the folder for temporary files, by its age."""
    for path in Path(tempfile.gettempdir()).glob(f"{BUILD_FOLDER}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if ours and time.time() - status.st_mtime > LEFT_BEHIND_S:
                shutil.rmtree(path, ignore_errors=True)


def _child_environment(folder: str, compiler: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    given = os.environ.get("PYTHONPATH")
    paths = [root, *map(os.path.abspath, given.split(os.pathsep) if given else ())]
    # Torch's compiler reads docstrings, which -OO drops, and warns of itself, which must not end a build.
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths),
        "CXX": compiler,  # torch itself looks for g++ alone, and for no other where CXX is not there
        "TMPDIR": folder,  # what a compiler that is killed leaves behind goes with the build
        # A cache of its own, gone with the build: Inductor's has no checksums and is not ours to trust.
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        # torch knows what this CPU can do; without this Inductor compiles a program to find out (6 s).
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line)] or [x for x in lines if "error" in x.lower()]
    return (errors or lines or ["no output"])[-1][:500]
