"""What the store does to the world, watched; and fresh interpreters with nothing but the store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "shutil.rmtree", "ctypes.dlopen")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink")


# torch with CUDA itself, as it counts GPUs for what is shown.
_ASKS_FOR_GPUS = ("ctypes.dlopen", ("libnvidia-ml.so.1",))


class Guard:
    """Collects forbidden events while ``folder`` is set."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.events: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or (event, arguments) == _ASKS_FOR_GPUS:
            return
        if event in _FORBIDDEN:
            self.events.append(f"{event} {arguments!r}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._outside(event, path)
        elif event in _CHANGES and not isinstance(arguments[0], int):
            self._outside(event, arguments[0])

    def _outside(self, event: str, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if self.folder is not None and real != self.folder and not real.startswith(self.folder + os.sep):
            self.events.append(f"{event} {real}")


_GUARD = Guard()
sys.addaudithook(_GUARD.hook)


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """Fails the test when, between setting ``guard.folder`` and its end, the store did what it must not."""
    _GUARD.events = []
    yield _GUARD
    _GUARD.folder = None
    assert _GUARD.events == []


# The package without its __init__, which imports torch: these tests start many processes.
_BARE = """
import sys, types
package = types.ModuleType("softcap_runtime")
package.__path__ = [{path!r}]
sys.modules["softcap_runtime"] = package
"""


@pytest.fixture
def run_bare() -> Callable[[str], str]:
    """Runs code in a fresh interpreter where only the store is at hand; gives what it printed."""
    path = str(Path(__file__).resolve().parents[2] / "softcap_runtime")

    def run(code: str) -> str:
        command = [sys.executable, "-c", _BARE.format(path=path) + code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
