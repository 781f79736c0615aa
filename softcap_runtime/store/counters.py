"""Counters of all processes: each counts in memory, and ``flush`` adds that to a row of the database."""

from __future__ import annotations

import json
from collections import Counter

from softcap_runtime.store.processes import DATABASE_LOCK

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
_GREATEST = "longest_lock_wait_ms"  # the maximum is kept; all others are sums


class Counters:
    """What this process has counted and not written yet; guarded by the lock under which it is written."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.uses: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        """Add ``amount`` to the counter ``name``, one of ``NAMES``."""
        with DATABASE_LOCK:
            _add(self.counts, {name: amount})

    def use(self, digest: str, amount: int = 1) -> None:
        """Count ``amount`` loads of an entry; 0 only renews its last use, so that it is not evicted next."""
        with DATABASE_LOCK:
            self.uses[digest] += amount

    def clear(self) -> None:
        """Forget everything: it has been written or, in a forked child, is the parent's to write."""
        with DATABASE_LOCK:
            self.counts.clear()
            self.uses.clear()

    def total(self, stored: bytes | None) -> dict[str, int]:
        """The stored counters plus these; a missing or malformed one counts as 0."""
        try:
            document = json.loads(stored) if stored else {}
        except (ValueError, RecursionError):
            document = {}
        known = document if isinstance(document, dict) else {}
        total = dict.fromkeys(NAMES, 0)
        _add(total, {name: n for name, n in known.items() if name in total and type(n) is int and 0 <= n < 2**53})
        with DATABASE_LOCK:
            _add(total, self.counts)
        return total


def _add(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        before = total.get(name, 0)
        total[name] = max(before, count) if name == _GREATEST else before + count
