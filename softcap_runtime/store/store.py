"""The store: look up, build once per machine, publish; from memory where the disk cannot be used."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import processes
from softcap_runtime.store.counters import Counters
from softcap_runtime.store.database import Database
from softcap_runtime.store.entry import BadEntry, Sealed
from softcap_runtime.store.key import Key
from softcap_runtime.store.processes import DATABASE_LOCK

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index
    from softcap_runtime.store.report import (
        EntryInfo,
        Explanation,
        ImportReport,
        Problem,
        StoreStatus,
    )

log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0


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
        self.counters = Counters()
        self.database = Database(
            self.folder,
            max_bytes=max(self.size_limit, 2**30),
            bad=lambda kind: self.counters.add(kind),
            save=self._salvage,
        )
        self._memory: dict[str, Sealed] = {}
        self._flush_at = time.monotonic() + FLUSH_SECONDS
        processes.watch(self)

    @property
    def fault(self) -> str | None:
        """Why the disk is not used, in one line; None before it was needed and once all works again."""
        return self.database.fault

    # Looking up

    def load(self, key: Key) -> bytes | None:
        """The verified bytes stored under ``key``; None when there are none.

        A bad entry is counted (``corrupt`` or ``rejected``), logged, removed where the folder is writable,
        and gives None. Never raises for what is on disk.
        """
        found = self._find(key)
        if found is None:
            self.counters.add("misses")
            return None
        return self._hit(key, *found)[0]

    def _hit(
        self, key: Key, data: bytes, source: Literal["disk", "memory"]
    ) -> tuple[bytes, Literal["disk", "memory"]]:
        self.counters.add("hits")
        if source == "disk":
            self.count_use(key.digest)
        return data, source

    def _find(self, key: Key) -> tuple[bytes, Literal["disk", "memory"]] | None:
        stored = self.sealed(key.digest)
        if stored is not None:
            return stored.payload, "disk"
        with DATABASE_LOCK:
            held = self._memory.get(key.digest)
        return None if held is None else (held.payload, "memory")

    def _read(self, index: Index, digest: str) -> Sealed | None:
        try:
            found = index.read(digest)
            if found is not None:
                entries_.verify(found.text, found.payload, digest, self.auth_key)
            return found
        except BadEntry as bad:
            self.counters.add(bad.kind)
            log.warning("cache entry %s of %s is not used: %s", digest[:12], self.folder, bad)
            if self.database.writable:
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
        4. Build: errors of ``build`` and ``describe`` pass through unchanged, the lock is released, nothing
           is published. ``describe`` gives what built it (strings, e.g. the compiler): the provenance.
        5. Publish: atomic; a disk fault is counted (``write_failures``) and kept in ``fault``, and the entry
           stays in memory until a later ``flush`` can write it.
        """
        started = time.perf_counter()
        found = self._find(key)
        if found is not None:
            return Loaded(*self._hit(key, *found), time.perf_counter() - started, 0.0)
        self.counters.add("misses")
        with self.database.locks.thread(key.digest) as waited:
            found = self._find(key)
            if found is not None:
                return Loaded(*found, time.perf_counter() - started - waited, waited)
            if not self.database.can_write():
                return self._build(key, build, describe, waited)
            with self.database.locks.process(key.digest) as waited_for_process:
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
        self.put(key.digest, sealed)
        self.flush()
        self.sweep()
        return Loaded(data, "built", seconds, waited)

    def _hold(self, digest: str, sealed: Sealed) -> None:
        """Keep an entry in memory until it is on disk; the oldest leave when they exceed the size limit."""
        with DATABASE_LOCK:
            self._memory[digest] = sealed
            while (
                len(self._memory) > 1 and sum(len(s.payload) for s in self._memory.values()) > self.size_limit
            ):
                del self._memory[next(iter(self._memory))]

    def _publish(self, digest: str) -> bool:
        """Write one entry that is held in memory; it stays there when that fails."""
        with DATABASE_LOCK:
            sealed = self._memory.get(digest)
            if sealed is None:
                return True
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
                "write", lambda index: index.publish(digest, sealed, self.size_limit), None
            )
            if evicted is None:
                return False
            self.counters.add("evictions", evicted)
            self._memory.pop(digest, None)
            return True

    # Counting

    def count_use(self, digest: str, n: int = 1) -> None:
        """Count ``n`` uses of an entry beside its loads, which count themselves.

        In memory; written at exit, and by a thread about once a minute.
        """
        self.counters.use(digest, n)
        if time.monotonic() > self._flush_at:
            self._flush_at = time.monotonic() + FLUSH_SECONDS
            threading.Thread(target=self.flush, name="softcap-store-flush", daemon=True).start()

    def flush(self) -> None:
        """Write what is held in memory: counts, and entries not written yet. Never raises."""
        with DATABASE_LOCK:
            self._flush_at = time.monotonic() + FLUSH_SECONDS
            for digest in list(self._memory):
                self._publish(digest)
            counts, uses = self.counters.take()
            if not counts and not uses:
                return
            merged = self.database.can_write() and self.database.use(
                "count", lambda index: self._merge(index, counts, uses), False
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

    def sweep(self) -> int:
        """Remove temporary files, unused locks and quarantine by age; how many. Done after builds too."""
        if not self.database.can_write():
            return 0
        from softcap_runtime.store import repair

        return repair.sweep(self.folder)

    def export_bundle(
        self, path: str | os.PathLike[str], fingerprint: Mapping[str, str] | None = None
    ) -> int:
        """Write entries (those of ``fingerprint``, or all) into one file; how many.

        Raises OSError when the file cannot be written or the cache cannot be read.
        """
        from softcap_runtime.store import bundle

        return bundle.export(self, Path(path), fingerprint)

    def import_bundle(
        self, path: str | os.PathLike[str], expected_fingerprint: Mapping[str, str]
    ) -> ImportReport:
        """Take the entries of a bundle that fit ``expected_fingerprint``; the report names the rest.

        Raises OSError when the file cannot be read, ValueError when it is not a bundle or was changed: then
        nothing is taken.
        """
        from softcap_runtime.store import bundle

        return bundle.import_(self, Path(path), expected_fingerprint)

    def clear(self) -> int:
        """Remove every entry, on disk and in memory; how many. Safe while other processes run."""
        with DATABASE_LOCK:
            held = len(self._memory)
            self._memory.clear()
            if not self.database.can_write():
                return held
            return held + self.database.use("write", lambda index: index.remove_entries(), 0)

    # For the modules beside this one

    def has(self, digest: str) -> bool:
        """Whether there is a good entry under ``digest``; counts nothing as hit or miss."""
        return self.sealed(digest) is not None

    def sealed(self, digest: str) -> Sealed | None:
        """The verified entry under ``digest`` on disk; a bad one is treated as in ``load``."""
        return self.database.use("read", lambda index: self._read(index, digest), None)

    def put(self, digest: str, sealed: Sealed) -> bool:
        """Publish a verified entry; whether it is on disk. Where not, it is held in memory and counted."""
        self._hold(digest, sealed)
        published = self._publish(digest)
        if not published:
            self.counters.add("write_failures")
        return published

    @property
    def held_in_memory(self) -> int:
        """Entries that could not be written."""
        return len(self._memory)

    def reject_row(self, index: Index, rowid: int, bad: BadEntry) -> None:
        """Count a bad row and remove it where the folder is writable; nothing that it names is followed."""
        self.counters.add(bad.kind)
        log.warning("row %d of %s is not used: %s", rowid, self.folder, bad)
        if self.database.writable:
            index.remove_row(rowid)

    def _salvage(self, database: Path) -> None:
        from softcap_runtime.store.salvage import salvage

        def keep(digest: str, sealed: Sealed, hits: int) -> None:
            if self.put(digest, sealed):
                self.counters.use(digest, hits)

        saved = salvage(database, self.auth_key, keep, self.counters.add_stored)
        log.warning(
            "cache folder %s: %d entries of the bad database were good and are kept", self.folder, saved
        )

    # Processes

    def forget_parent(self) -> None:
        """In a forked child: the parent's connection, locks and counts are not ours."""
        self.database.forget_parent()
        self.counters = Counters()

    def close(self) -> None:
        """Write what is held and close the database; the store opens it again when used."""
        self.flush()
        self.database.close()
