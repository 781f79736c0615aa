"""A guard over what the store does to the world: no code from data, nothing written outside the folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "shutil.rmtree",
    "ctypes.dlopen",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
)


class Guard:
    """Collects forbidden events while ``folder`` is set."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.events: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
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
