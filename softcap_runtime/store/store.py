"""The store: look up, build once per machine, publish; from memory where the disk cannot be used."""

from __future__ import annotations

import atexit
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import trust
from softcap_runtime.store.counters import Counters
from softcap_runtime.store.entry import BadEntry, Sealed
from softcap_runtime.store.key import Key
from softcap_runtime.store.locks import KeyLocks

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index
    from softcap_runtime.store.report import (
        EntryInfo,
        Explanation,
        Problem,
        StoreStatus,
    )

log = logging.getLogger(__name__)
T = TypeVar("T")

BUSY_SECONDS = 3.0  # how long one access waits for another process's transaction
RETRY_SECONDS = 5.0  # how long a locked database is left alone afterwards
FLUSH_SECONDS = 60.0

# One lock for every database access of this process: SQLite's file locks belong to the process, and a fork
# must never happen in the middle of a transaction.
_DATABASE = threading.RLock()
_STORES: weakref.WeakSet[Store] = weakref.WeakSet()
_INHERITED: list[object] = []  # connections of the parent process: closing one could roll back its work


class Loaded(NamedTuple):
    """``data``, where it came from, ``seconds`` to get it and ``waited`` for another builder before."""

    data: bytes
    source: Literal["disk", "memory", "built"]
    seconds: float
    waited: float


class Store:
    """Bytes by key in ``folder``, shared by every process of a machine.

    ``size_limit``: bytes of payload; the least recently used entries leave first. ``auth_key``: entries
    without its HMAC are refused. A folder that cannot or must not be used never raises: the store then works
    from memory, logs why once, and ``fault`` holds that line. Safe over threads, fork and spawn.

    Raises ValueError for a size limit below 1 or an empty ``auth_key``.
    """

    def __init__(
        self, folder: str | os.PathLike[str], size_limit: int, auth_key: bytes | None = None
    ) -> None:
        if size_limit < 1:
            raise ValueError(f"size_limit: {size_limit}, expected at least 1 byte")
        if auth_key is not None and not auth_key:
            raise ValueError(
                "auth_key: empty, expected the bytes of a secret; use None for no authentication"
            )
        self.folder = Path(os.path.abspath(folder))
        self.size_limit = int(size_limit)
        self.auth_key = auth_key
        self.fault: str | None = None
        self.counters = Counters()
        self._logged: set[str] = set()
        self._memory: dict[str, Sealed] = {}
        self._index: Index | None = None
        self._inode: tuple[int, int] | None = None
        self._writable = False
        self._retry_at = 0.0
        self._flush_at = time.monotonic() + FLUSH_SECONDS
        self._locks = KeyLocks(self.folder)
        with _DATABASE:
            _STORES.add(self)

    # Looking up

    def load(self, key: Key) -> bytes | None:
        """The verified bytes stored under ``key``; None when there are none.

        A bad entry is counted (``corrupt`` or ``rejected``), logged, removed where the folder is writable,
        and gives None. Never raises for what is on disk.
        """
        found = self._find(key)
        self.counters.add("misses" if found is None else "hits")
        return None if found is None else found[0]

    def _find(self, key: Key) -> tuple[bytes, Literal["disk", "memory"]] | None:
        data = self.use("read", lambda index: self._read(index, key.digest), None)
        if data is not None:
            return data, "disk"
        with _DATABASE:
            held = self._memory.get(key.digest)
        return None if held is None else (held.payload, "memory")

    def _read(self, index: Index, digest: str) -> bytes | None:
        try:
            found = index.read(digest)
            if found is None:
                return None
            entries_.verify(found.text, found.payload, digest, self.auth_key)
            return found.payload
        except BadEntry as bad:
            self.counters.add(bad.kind)
            log.warning("cache entry %s of %s is not used: %s", digest[:12], self.folder, bad)
            if self._writable:
                index.delete(digest)
            return None

    # Building

    def load_or_build(
        self,
        key: Key,
        build: Callable[[], bytes],
        describe: Callable[[], Mapping[str, str]] | None = None,
    ) -> Loaded:
        """The bytes of ``key``, built by ``build`` at most once per machine.

        1. Look up: no lock, no write; a bad entry counts as none.
        2. Lock the key: first this process's threads, then other processes. Waits while another builds; a
           holder that is killed frees it at once. Where no lock can be had the build goes on without it.
        3. Look up again: another builder may have published meanwhile.
        4. Build: errors of ``build`` pass through unchanged, the lock is released, nothing is published.
        5. Publish: atomic; a disk fault is counted (``write_failures``) and kept in ``fault``, and the entry
           stays in memory until a later ``flush`` can write it. ``describe`` gives what built it (strings,
           e.g. the compiler), kept as provenance.
        """
        started = time.perf_counter()
        found = self._find(key)
        if found is not None:
            self.counters.add("hits")
            return Loaded(*found, time.perf_counter() - started, 0.0)
        self.counters.add("misses")
        with self._locks.thread(key.digest) as waited:
            found = self._find(key)
            if found is not None:
                return Loaded(*found, time.perf_counter() - started - waited, waited)
            if not self.can_write():
                return self._build(key, build, describe, waited)
            with self._locks.process(key.digest) as waited_for_process:
                if waited_for_process > 0.01:
                    self.counters.waited(waited_for_process)
                waited += waited_for_process
                found = self._find(key)
                if found is not None:
                    return Loaded(*found, time.perf_counter() - started - waited, waited)
                return self._build(key, build, describe, waited)

    def _build(
        self,
        key: Key,
        build: Callable[[], bytes],
        describe: Callable[[], Mapping[str, str]] | None,
        waited: float,
    ) -> Loaded:
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
        self._hold(key.digest, sealed)
        if not self._publish(key.digest):
            self.counters.add("write_failures")
        self.flush()
        return Loaded(data, "built", seconds, waited)

    def _hold(self, digest: str, sealed: Sealed) -> None:
        """Keep an entry in memory until it is on disk; the oldest leave when they exceed the size limit."""
        with _DATABASE:
            self._memory[digest] = sealed
            while (
                len(self._memory) > 1 and sum(len(s.payload) for s in self._memory.values()) > self.size_limit
            ):
                del self._memory[next(iter(self._memory))]

    def _publish(self, digest: str) -> bool:
        """Write one entry that is held in memory; it stays there when that fails."""
        with _DATABASE:
            sealed = self._memory.get(digest)
            if sealed is None:
                return True
            size = len(sealed.payload)
            if size > self.size_limit:
                self._note(
                    f"cache folder {self.folder}: an entry of {size} bytes is above the size limit of "
                    f"{self.size_limit}; raise SOFTCAP_CACHE_SIZE_LIMIT"
                )
                return False
            if not self.can_write():
                return False
            evicted = self.use("write", lambda index: index.publish(digest, sealed, self.size_limit), None)
            if evicted is None:
                return False
            self.counters.add("evictions", evicted)
            del self._memory[digest]
            return True

    # Counting

    def count_use(self, digest: str, n: int = 1) -> None:
        """Count ``n`` uses of an entry. In memory; written at exit, and by a thread about once a minute."""
        self.counters.use(digest, n)
        if time.monotonic() > self._flush_at:
            self._flush_at = time.monotonic() + FLUSH_SECONDS
            threading.Thread(target=self.flush, name="softcap-store-flush", daemon=True).start()

    def flush(self) -> None:
        """Write what is held in memory: counts, and entries not written yet. Never raises."""
        with _DATABASE:
            self._flush_at = time.monotonic() + FLUSH_SECONDS
            for digest in list(self._memory):
                self._publish(digest)
            counts, uses = self.counters.take()
            if not counts and not uses:
                return
            merged = self.can_write() and self.use(
                "write", lambda index: self._merge(index, counts, uses), False
            )
            if not merged:
                self.counters.give_back(counts, uses)

    def _merge(self, index: Index, counts: dict[str, float], uses: dict[str, int]) -> bool:
        index.merge(uses, lambda stored: self.counters.merge_into(stored, counts))
        return True

    # People's side: see inspection.py, repair.py and bundle.py

    def entries(self) -> list[EntryInfo]:
        """Every usable entry, least recently used first. Odd rows are counted as rejected and removed."""
        from softcap_runtime.store import inspection

        self.flush()
        return inspection.entries(self)

    def status(self) -> StoreStatus:
        """The state of the folder and the counters of every process."""
        from softcap_runtime.store import inspection

        return inspection.status(self)

    def explain(self, key: Key) -> Explanation:
        """Whether ``key`` would hit; if not, the nearest entry and the fields that differ."""
        from softcap_runtime.store import inspection

        return inspection.explain(self, key)

    def verify(self, repair: bool = False) -> list[Problem]:
        """Read and check everything; with ``repair`` what is bad moves into the folder's quarantine."""
        from softcap_runtime.store import repair as repair_

        return repair_.verify(self, repair=repair)

    def clear(self) -> int:
        """Remove every entry, on disk and in memory; how many. Safe while other processes run."""
        with _DATABASE:
            held = len(self._memory)
            self._memory.clear()
            if not self.can_write():
                return held
            return held + self.use("write", lambda index: index.remove_entries(), 0)

    # The database

    def use(self, what: str, action: Callable[[Index], T], default: T) -> T:
        """Run ``action`` on the index, opened if needed; after a disk fault, note it and give ``default``.

        A database that was replaced is opened anew; a damaged or foreign one is moved aside for a fresh one.
        """
        from softcap_runtime.store.index import Moved
        from softcap_runtime.store.schema import Foreign, OtherVersion

        with _DATABASE:
            for _ in range(3):
                try:
                    index = self._opened()
                    return default if index is None else action(index)
                except (Moved, FileNotFoundError):
                    self._close()
                except (sqlite3.OperationalError, OSError, OtherVersion) as error:
                    self._unavailable(what, error)
                    return default
                except (sqlite3.DatabaseError, Foreign) as error:
                    if not self._set_aside(error):
                        return default
            self._note(f"cache folder {self.folder}: its database is replaced again and again; not used now")
            return default

    def _opened(self) -> Index | None:
        if self._index is not None:
            return self._index
        if time.monotonic() < self._retry_at:
            return None
        if not os.path.lexists(self.folder):
            trust.make_private(self.folder)
        verdict = trust.check(self.folder)
        if verdict.problem is not None:
            self._note(verdict.problem)
            return None
        from softcap_runtime.store import repair, schema
        from softcap_runtime.store.index import Index

        self._writable = verdict.writable
        if not os.path.exists(self.folder / schema.DBNAME):
            if not verdict.writable:
                self._note(f"cache folder {self.folder} is read-only and empty; prewarm it as its owner")
                return None
            repair.create(self.folder, self._locks)
        self._inode = repair.inode(self.folder)
        self._index = Index(
            self.folder,
            writable=verdict.writable,
            busy_seconds=BUSY_SECONDS,
            max_bytes=max(self.size_limit, 2**30),
        )
        return self._index

    @property
    def held_in_memory(self) -> int:
        """Entries that could not be written."""
        return len(self._memory)

    def can_write(self) -> bool:
        """Whether the folder's database is open for writing; opens it, and notes why not."""
        return self.use("open", lambda _: self._writable, False)

    def reject_row(self, index: Index, rowid: int, bad: BadEntry) -> None:
        """Count a bad row and remove it where the folder is writable; nothing that it names is followed."""
        self.counters.add(bad.kind)
        log.warning("row %d of %s is not used: %s", rowid, self.folder, bad)
        if self._writable:
            index.remove_row(rowid)

    def _close(self) -> None:
        index, self._index = self._index, None
        if index is not None:
            index.close()

    def _unavailable(self, what: str, error: Exception) -> None:
        self._close()
        if "locked" in str(error):
            self._retry_at = time.monotonic() + RETRY_SECONDS
        self._note(f"cache folder {self.folder}: cannot {what}: {error}; working from memory meanwhile")

    def _set_aside(self, error: Exception) -> bool:
        """Move a bad database into quarantine; whether to try again."""
        from softcap_runtime.store import repair, schema

        self._close()
        kind = "rejected" if isinstance(error, schema.Foreign) else "corrupt"
        self.counters.add(kind)
        if not self._writable:
            self._note(f"cache folder {self.folder}: its database is not usable: {error}; it is read-only")
            return False
        try:
            moved = repair.set_aside(self.folder, self._inode, self._locks)
        except OSError as failure:
            self._note(f"cache folder {self.folder}: cannot move its database aside: {failure}")
            return False
        self._note(f"cache folder {self.folder}: its database is not usable: {error}; moved to {moved}")
        return True

    def _note(self, line: str) -> None:
        """Keep a fault for people to see, and log it the first time."""
        self.fault = line
        if line not in self._logged:
            self._logged.add(line)
            log.warning("%s", line)

    # Processes

    def _after_fork(self) -> None:
        """In a forked child: nothing of the parent's connection, locks or counts is ours."""
        if self._index is not None:
            _INHERITED.append(self._index)
        self._index = None
        self._locks = KeyLocks(self.folder)
        self.counters = Counters()

    def close(self) -> None:
        """Write what is held and close the database; the store opens it again when used."""
        self.flush()
        with _DATABASE:
            self._close()


def _after_fork_in_child() -> None:
    for store in list(_STORES):
        store._after_fork()
    _DATABASE.release()


def _flush_all(*_: object) -> None:
    for store in list(_STORES):
        store.flush()


def _flush_at_child_exit(_: object) -> None:
    # A multiprocessing child ends without running atexit handlers; its own finalizers do run.
    from multiprocessing.util import Finalize

    Finalize(None, _flush_all, exitpriority=0)


def _watch_processes() -> None:
    from multiprocessing import parent_process
    from multiprocessing.util import register_after_fork

    os.register_at_fork(
        before=_DATABASE.acquire, after_in_parent=_DATABASE.release, after_in_child=_after_fork_in_child
    )
    atexit.register(_flush_all)
    register_after_fork(_flush_at_child_exit, _flush_at_child_exit)
    if parent_process() is not None:
        _flush_at_child_exit(None)


_watch_processes()
