"""The entries of one folder: read and verified, published, counted; held in memory where the disk cannot take them."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import processes
from softcap_runtime.store.counters import Counters
from softcap_runtime.store.database import Database
from softcap_runtime.store.entry import BadEntry, NotAuthenticated, Sealed
from softcap_runtime.store.processes import DATABASE_LOCK

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index

log = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0


class Stock:
    """What ``Store`` keeps, without building anything. Never raises for what is on disk."""

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
        self._not_ours: set[str] = set()
        self._flush_at = time.monotonic() + FLUSH_SECONDS
        processes.close_abandoned()
        processes.watch(self)

    @property
    def fault(self) -> str | None:
        """Why the disk is not used, in one line; None before it was needed and once all works again."""
        return self.database.fault

    @property
    def held_in_memory(self) -> int:
        """Entries that could not be written."""
        return len(self._memory)

    # Reading

    def find(self, digest: str) -> tuple[bytes, Literal["disk", "memory"]] | None:
        """The payload under ``digest`` and where it was; counts nothing as hit or miss."""
        stored = self.sealed(digest)
        if stored is not None:
            return stored.payload, "disk"
        with DATABASE_LOCK:
            held = self._memory.get(digest)
        return None if held is None else (held.payload, "memory")

    def sealed(self, digest: str) -> Sealed | None:
        """The verified entry under ``digest`` on disk.

        A bad one is counted (``corrupt`` or ``rejected``), logged, removed where the folder is writable, and
        gives None. One that only lacks our HMAC stays, as others can use it; it is counted and logged once.
        """
        return self.database.use("read", lambda index: self._read(index, digest), None)

    def examine(self, digest: str) -> Sealed | BadEntry | None:
        """The entry under ``digest`` on disk, or why it must not be used; counts, logs and removes nothing."""
        return self.database.use("read", lambda index: self._examined(index, digest), None)

    def _examined(self, index: Index, digest: str) -> Sealed | BadEntry | None:
        try:
            found = index.read(digest)
            if found is not None:
                entries_.verify(found.text, found.payload, digest, self.auth_key)
            return found
        except BadEntry as bad:
            return bad

    def _read(self, index: Index, digest: str) -> Sealed | None:
        found = self._examined(index, digest)
        if not isinstance(found, BadEntry):
            return found
        another_key = isinstance(found, NotAuthenticated)
        if another_key and digest in self._not_ours:
            return None
        self.counters.add(found.kind)
        log.warning("cache entry %s of %s is not used: %s", digest[:12], self.folder, found)
        if another_key:
            self._not_ours.add(digest)
        elif self.database.writable:
            index.delete(digest)
        return None

    def reject_row(self, index: Index, rowid: int, bad: BadEntry) -> None:
        """Count a bad row and remove it where the folder is writable; nothing that it names is followed."""
        self.counters.add(bad.kind)
        log.warning("row %d of %s is not used: %s", rowid, self.folder, bad)
        if self.database.writable:
            index.remove_row(rowid)

    # Writing

    def put(self, digest: str, sealed: Sealed) -> bool:
        """Publish a verified entry; whether it is on disk. Where not, it is held in memory and counted."""
        self._hold(digest, sealed)
        published = self._publish(digest)
        if not published:
            self.counters.add("write_failures")
        return published

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
                "write", lambda index: index.publish(digest, sealed, self.size_limit), None, create=True
            )
            if evicted is None:
                return False
            self.counters.add("evictions", evicted)
            self._memory.pop(digest, None)
            return True

    def clear(self) -> int:
        """Remove every entry, on disk and in memory; how many. Safe while other processes run.

        In a read-only folder nothing is removed from disk: ``database.writable`` says so.
        """
        with DATABASE_LOCK:
            held = len(self._memory)
            self._memory.clear()
            if not self.database.can_write(create=False):
                return held
            return held + self.database.use("write", lambda index: index.remove_entries(), 0)

    def _salvage(self, database: Path) -> None:
        from softcap_runtime.store.salvage import salvage

        def keep(digest: str, sealed: Sealed, hits: int) -> None:
            if self.put(digest, sealed):
                self.counters.use(digest, hits)

        saved = salvage(database, self.auth_key, keep, self.counters.add_stored)
        log.warning(
            "cache folder %s: %d entries of the bad database were good and are kept", self.folder, saved
        )

    # Counting

    def count_use(self, digest: str) -> None:
        """Count a load of an entry; in memory, written at exit and by a thread about once a minute."""
        self.counters.use(digest, 1)
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

    # Processes

    def forget_parent(self) -> None:
        """In a forked child: the parent's connection, locks and counts are not ours."""
        self.database.forget_parent()
        self.counters = Counters()

    def close(self) -> None:
        """Write what is held and close the database; the store opens it again when used."""
        self.flush()
        self.database.close()
