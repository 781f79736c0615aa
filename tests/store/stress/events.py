"""What workers say they do, in a file that survives kill -9, and the reading of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Note = Callable[[str], None]


class Event(NamedTuple):
    """``what`` a process ``pid`` did, at ``when``."""

    when: float
    pid: int
    what: str


def writer(path: Path) -> Note:
    """What appends this process's events to ``path``, each in one write."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(what: str) -> None:
        line = json.dumps([time.time(), os.getpid(), what])
        os.write(file, f"{line}\n".encode())

    return note


class Reader:
    """Reads the events of a file that grows; each once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def new(self) -> list[Event]:
        """The events since the last time; a line that a kill cut off is left out."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            whole, _, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + 1 if whole else 0
        found = []
        for line in whole.splitlines():
            try:
                found.append(Event(*json.loads(line)))
            except (ValueError, TypeError):
                continue
        return found
