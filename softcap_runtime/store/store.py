"""The store: look up, build once per machine, publish, count; it works from memory while the disk cannot be written."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import locks, processes
from softcap_runtime.store.database import Database
from softcap_runtime.store.entry import BadEntry, NotAuthenticated, Sealed
from softcap_runtime.store.key import Key
from softcap_runtime.store.processes import DATABASE_LOCK

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index

log = logging.getLogger(__name__)

Build = Callable[[], bytes]
Describe = Callable[[], Mapping[str, str]]


class Loaded(NamedTuple):
    """``data``, its ``source``, ``seconds`` to get it, and seconds ``waited`` for another builder before that."""

    data: bytes
    source: Literal["disk", "memory", "built"]
    seconds: float
    waited: float


_COUNTERS = (
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
        """Add ``amount`` to the counter ``name``, one of ``_COUNTERS``."""
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
        total = dict.fromkeys(_COUNTERS, 0)
        _add(total, {name: n for name, n in known.items() if name in total and type(n) is int and 0 <= n < 2**53})
        with DATABASE_LOCK:
            _add(total, self.counts)
        return total


def _add(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        before = total.get(name, 0)
        total[name] = max(before, count) if name == _GREATEST else before + count


class Store:
    """Bytes by key in ``folder``, shared by every process of a machine.

    ``size_limit``: bytes of payload; the least recently used entries are evicted first. ``auth_key``: entries without
    its HMAC are refused. A folder that cannot or must not be used raises nothing: the store then works from memory,
    logs the reason once, and keeps it in ``fault``. Safe with threads, fork and spawn. ``inspection`` and ``bundle``
    answer what people ask of it.

    Raises ValueError for a size limit below 1 or an empty ``auth_key``.
    """

    def __init__(self, folder: str | os.PathLike[str], size_limit: int, auth_key: bytes | None = None) -> None:
        if size_limit < 1:
            raise ValueError(f"size_limit: {size_limit}, expected at least 1 byte")
        if auth_key is not None and not auth_key:
            raise ValueError("auth_key: empty, expected the bytes of a secret; use None for no authentication")
        self.folder = Path(os.path.abspath(folder))
        self.size_limit = int(size_limit)
        self.auth_key = auth_key
        self.counters = Counters()
        self.database = Database(self.folder, max(self.size_limit, 2**30), self.counters.add)
        self._memory: dict[str, Sealed] = {}
        self._not_authenticated: set[str] = set()  # digests, each counted and logged once
        processes.watch(self)

    def __del__(self) -> None:
        if hasattr(self, "database"):  # not when __init__ refused its arguments
            processes.abandon(self)  # with counts that are not written yet

    @property
    def fault(self) -> str | None:
        """Why the disk is not used, in one line; None before the first use and while everything works."""
        return self.database.fault

    @property
    def held_in_memory(self) -> int:
        """Entries that could not be written."""
        return len(self._memory)

    def load(self, key: Key) -> bytes | None:
        """The verified bytes stored under ``key``; None if there are none or they are bad (see ``sealed``)."""
        loaded = self._load(key)
        if loaded is None:
            self.counters.add("misses")
            return None
        return loaded.data

    def load_or_build(self, key: Key, build: Build, describe: Describe | None = None) -> Loaded:
        """The bytes of ``key``, built by ``build`` at most once per machine.

        1. Look up, without a lock or a write; a bad entry counts as missing.
        2. Lock the key, waiting while another thread or process builds. A killed holder releases the lock at once; if
           no lock can be taken, go on without it.
        3. Look up again, as another builder may have published meanwhile.
        4. Build. Errors of ``build`` and ``describe`` pass through unchanged; nothing is published then. ``describe``
           returns the provenance: strings about what built the entry, such as the compiler.
        5. Publish, in one transaction. A disk fault is counted (``write_failures``) and kept in ``fault``; the entry
           stays in memory until a later ``flush`` can write it.

        A call is a hit if the bytes were found, even after waiting for their builder, and a miss if they were built.
        """
        loaded = self._load(key)
        if loaded is not None:
            return loaded
        if not self.database.can_write():
            return self._build(key, build, describe, 0.0)
        with locks.hold(self.folder, key.digest) as waited:
            if waited:
                self.counters.add("lock_waits")
                self.counters.add("longest_lock_wait_ms", round(1000 * waited))
            return self._load(key, waited) or self._build(key, build, describe, waited)

    def _load(self, key: Key, waited: float = 0.0) -> Loaded | None:
        started = time.perf_counter()
        found = self.find(key.digest)
        if found is None:
            return None
        self.counters.add("hits")
        if found[1] == "disk":
            self.counters.use(key.digest)
        return Loaded(*found, time.perf_counter() - started, waited)

    def _build(self, key: Key, build: Build, describe: Describe | None, waited: float) -> Loaded:
        self.counters.add("misses")
        started = time.perf_counter()
        data = build()
        seconds = time.perf_counter() - started
        if not isinstance(data, bytes):
            raise TypeError(f"build: returned {type(data).__name__}, expected bytes")
        self.counters.add("builds")
        sealed = entries_.seal(
            key,
            data,
            created=time.time(),
            build_seconds=seconds,
            provenance={} if describe is None else describe(),
            auth_key=self.auth_key,
        )
        self.flush()  # renews the last use of what this process loaded, before publishing evicts
        self.put(key.digest, sealed)
        if self.database.can_write():
            from softcap_runtime.store import quarantine  # with sqlite3, which was imported with the database

            quarantine.sweep(self.folder)
        return Loaded(data, "built", seconds, waited)

    # Reading

    def find(self, digest: str) -> tuple[bytes, Literal["disk", "memory"]] | None:
        """The payload under ``digest`` and where it was; counts nothing as hit or miss."""
        stored = self.sealed(digest)
        if stored is not None:
            return stored.payload, "disk"
        held = self._memory.get(digest)
        return None if held is None else (held.payload, "memory")

    def sealed(self, digest: str) -> Sealed | None:
        """The verified entry under ``digest`` on disk; None when there is none, or it is bad.

        A bad one is counted (``corrupt`` or ``rejected``), logged, and removed if the folder is writable. One that
        only lacks our HMAC stays, as others can use it; it is counted and logged once.
        """
        with DATABASE_LOCK:  # so that no other thread replaces what is removed
            found = self.examine(digest)
            if not isinstance(found, BadEntry):
                return found
            if isinstance(found, NotAuthenticated):
                if digest in self._not_authenticated:
                    return None
                self._not_authenticated.add(digest)
            elif self.database.writable:
                self.database.use("write", lambda index: index.delete(digest), None)
            self.counters.add(found.kind)
        log.warning("cache entry %s of %s is not used: %s", digest[:12], self.folder, found)
        return None

    def examine(self, digest: str) -> Sealed | BadEntry | None:
        """The entry under ``digest`` on disk, or why it must not be used; counts, logs and removes nothing."""

        def read(index: Index) -> Sealed | BadEntry | None:
            try:
                found = index.read(digest)
                if found is not None:
                    entries_.verify(found.text, found.payload, digest, self.auth_key)
                return found
            except BadEntry as bad:
                return bad

        return self.database.use("read", read, None)

    # Writing

    def put(self, digest: str, sealed: Sealed) -> bool:
        """Publish a verified entry; returns whether it is on disk. If not, it is counted and held in memory.

        A later ``flush`` writes entries in memory; above the size limit the oldest are dropped.
        """
        with DATABASE_LOCK:
            self._memory[digest] = sealed
            while len(self._memory) > 1 and sum(len(held.payload) for held in self._memory.values()) > self.size_limit:
                del self._memory[next(iter(self._memory))]
            published = self._publish(digest)
        if not published:
            self.counters.add("write_failures")
        return published

    def _publish(self, digest: str) -> bool:
        """Write one entry that is held in memory; it stays there when that fails."""
        sealed = self._memory[digest]
        size = len(sealed.payload)
        if size > self.size_limit:
            self.database.note(
                "keep",
                f"cache folder {self.folder}: an entry of {size} bytes is above the size limit of "
                f"{self.size_limit}; raise SOFTCAP_CACHE_SIZE_LIMIT",
            )
            return False
        if not self.database.can_write():
            return False
        evicted = self.database.use(
            "write", lambda index: index.publish(digest, sealed, self.size_limit), None, create=True
        )
        if evicted is None:
            return False
        self.counters.add("evictions", evicted)
        del self._memory[digest]
        return True

    def clear(self) -> int:
        """Remove every entry, on disk and in memory; returns how many. Safe while other processes run.

        Removes nothing from disk where the folder is read-only (see ``database.writable``).
        """
        with DATABASE_LOCK:
            held = len(self._memory)
            self._memory.clear()
            if not self.database.can_write(create=False):
                return held
            return held + self.database.use("write", lambda index: index.remove_entries(), 0)

    def flush(self) -> None:
        """Write what is held in memory: counts, and entries not written yet. Never raises."""
        with DATABASE_LOCK:
            for digest in list(self._memory):
                if self.sealed(digest) is None:
                    self._publish(digest)
                else:  # another process was faster
                    del self._memory[digest]
            held = self.counters
            if not (held.counts or held.uses):
                return

            def merge(index: Index) -> bool:
                index.merge(held.uses, lambda stored: json.dumps(held.total(stored)).encode())
                return True

            if self.database.can_write() and self.database.use("count", merge, False):
                held.clear()

    # Processes

    def forget_parent(self) -> None:
        """In a forked child: the parent's connection and counts are not ours."""
        self.database.forget_parent()
        self.counters.clear()

    def close(self) -> None:
        """Write what is held and close the database; the store opens it again when used."""
        self.flush()
        self.database.close()
