"""Counters that every process adds to: kept in memory, and added to the database's row of counters by ``flush``."""

from __future__ import annotations

import json
import threading
from collections import Counter

NAMES = (
    "hits",
    "misses",
    "builds",
    "corrupt",
    "rejected",
    "write_failures",
    "evictions",
    "lock_waits",
    "longest_lock_wait_ms",
)
_GREATEST = "longest_lock_wait_ms"  # of this one the greatest is kept; the others add up


class Counters:
    """What this process has counted and not yet written. Safe over threads."""

    def __init__(self) -> None:
        self.forget_parent()

    def forget_parent(self) -> None:
        """Start anew: in a forked child the counts are the parent's to write, and its lock may be held for ever."""
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._uses: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        """Add ``amount`` to the counter ``name``, one of ``NAMES``."""
        with self._lock:
            _add(self._counts, {name: amount})

    def use(self, digest: str, amount: int = 1) -> None:
        """Count loads of an entry; 0 marks it as wanted, which keeps it from being the next to be evicted."""
        with self._lock:
            self._uses[digest] += amount

    def take(self) -> tuple[dict[str, int], Counter[str]]:
        """All counts and uses, which are then no longer here: write them, or ``give_back``."""
        with self._lock:
            taken = self._counts, self._uses
            self._counts, self._uses = {}, Counter()
            return taken

    def give_back(self, counts: dict[str, int], uses: Counter[str]) -> None:
        """Undo ``take`` when writing failed."""
        with self._lock:
            _add(self._counts, counts)
            self._uses.update(uses)

    def total(self, stored: bytes | None) -> dict[str, int]:
        """The stored counters plus what this process holds."""
        with self._lock:
            return added(stored, self._counts)


def added(stored: bytes | None, counts: dict[str, int]) -> dict[str, int]:
    """The stored counters plus ``counts``; what is missing or malformed there counts as 0."""
    try:
        document = json.loads(stored) if stored else {}
    except (ValueError, RecursionError):
        document = {}
    known = document if isinstance(document, dict) else {}
    total = dict.fromkeys(NAMES, 0)
    _add(total, {name: n for name, n in known.items() if name in total and type(n) is int and 0 <= n < 2**53})
    _add(total, counts)
    return total


def _add(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        before = total.get(name, 0)
        total[name] = max(before, count) if name == _GREATEST else before + count
