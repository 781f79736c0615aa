"""Counters that every process adds to: kept in memory, merged into the database now and then."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from typing import NamedTuple

NAMES = (
    "hits",
    "misses",
    "builds",
    "corrupt",
    "rejected",
    "write_failures",
    "evictions",
    "lock_waits",
    "longest_lock_wait_s",
)
_GREATEST = "longest_lock_wait_s"


class Count(NamedTuple):
    """A value and since when it counts, in seconds since the epoch."""

    value: float
    since: float


class Counters:
    """What this process has counted and not yet merged. Safe over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._uses: Counter[str] = Counter()
        self._started = time.time()

    def add(self, name: str, amount: int = 1) -> None:
        """Count ``amount`` events."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def waited(self, seconds: float) -> None:
        """Count one wait for another builder's lock."""
        with self._lock:
            self._counts["lock_waits"] = self._counts.get("lock_waits", 0) + 1
            self._counts[_GREATEST] = max(self._counts.get(_GREATEST, 0.0), seconds)

    def use(self, digest: str, amount: int) -> None:
        """Count loads of an entry; 0 says that it was wanted, which keeps it from being the next to be evicted."""
        with self._lock:
            self._uses[digest] += amount

    def add_stored(self, stored: bytes) -> None:
        """Add the counters of a database that was moved aside."""
        with self._lock:
            for name, count in _parsed(stored).items():
                self._counts[name] = _combined(name, self._counts.get(name, 0), count.value)
                self._started = min(self._started, count.since)

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Everything counted so far, which is then no longer here: merge it, or ``give_back``."""
        with self._lock:
            taken = self._counts, dict(self._uses)
            self._counts, self._uses = {}, Counter()
            return taken

    def give_back(self, counts: dict[str, float], uses: dict[str, int]) -> None:
        """Undo ``take`` when the merge failed."""
        with self._lock:
            for name, value in counts.items():
                self._counts[name] = _combined(name, self._counts.get(name, 0), value)
            self._uses.update(uses)

    def merged(self, stored: bytes | None) -> dict[str, Count]:
        """The stored counters plus what this process holds."""
        with self._lock:
            return _merged(_parsed(stored), self._counts, self._started)

    def merge_into(self, stored: bytes | None, counts: dict[str, float]) -> bytes:
        """The bytes to store: the stored counters plus ``counts``."""
        merged = _merged(_parsed(stored), counts, self._started)
        return json.dumps({name: [count.value, count.since] for name, count in merged.items()}).encode()


def _combined(name: str, one: float, other: float) -> float:
    return max(one, other) if name == _GREATEST else one + other


def _merged(stored: dict[str, Count], counts: dict[str, float], now: float) -> dict[str, Count]:
    merged = {}
    for name in NAMES:
        base = stored.get(name, Count(0, now))
        merged[name] = Count(_combined(name, base.value, counts.get(name, 0)), base.since)
    return merged


def _parsed(stored: bytes | None) -> dict[str, Count]:
    """The counters of a row; what is missing or malformed starts anew."""
    try:
        document = json.loads(stored) if stored else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {
        name: Count(pair[0], pair[1])
        for name, pair in document.items()
        if name in NAMES
        and isinstance(pair, list)
        and len(pair) == 2
        and all(type(part) in (int, float) and 0 <= part < 2**53 for part in pair)
    }
