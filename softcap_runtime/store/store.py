"""The store: look up, build once per machine, publish; and the questions that people ask of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import locks
from softcap_runtime.store.entry_store import EntryStore
from softcap_runtime.store.key import Key

if TYPE_CHECKING:
    from softcap_runtime.store.report import EntryInfo, Explanation, ImportReport, Problem, StoreStatus

Build = Callable[[], bytes]
Describe = Callable[[], Mapping[str, str]]


class Loaded(NamedTuple):
    """``data``, its ``source``, ``seconds`` to get it, and seconds ``waited`` for another builder before that."""

    data: bytes
    source: Literal["disk", "memory", "built"]
    seconds: float
    waited: float


class Store(EntryStore):
    """Bytes by key in ``folder``, shared by every process of a machine.

    ``size_limit``: bytes of payload; the least recently used entries are evicted first. ``auth_key``: entries without
    its HMAC are refused. A folder that cannot or must not be used raises nothing: the store then works from memory,
    logs the reason once, and keeps it in ``fault``. Safe with threads, fork and spawn.

    Raises ValueError for a size limit below 1 or an empty ``auth_key``.
    """

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
        self.sweep()
        return Loaded(data, "built", seconds, waited)

    # Questions of people. Only they import pydantic and its models.

    def entries(self) -> list[EntryInfo]:
        """Every usable entry, least recently used first. All other rows are counted as rejected and removed."""
        from softcap_runtime.store import inspection

        return inspection.entries(self)

    def status(self) -> StoreStatus:
        """The state of the folder and the counters of every process."""
        from softcap_runtime.store import inspection

        return inspection.status(self)

    def explain(self, key: Key) -> Explanation:
        """Whether ``key`` would hit and, if not, the nearest entry and the fields that differ."""
        from softcap_runtime.store import inspection

        return inspection.explain(self, key)

    def verify(self, repair: bool = False) -> list[Problem]:
        """Read and check everything; ``repair`` moves what is bad into the folder's quarantine."""
        from softcap_runtime.store import inspection

        return inspection.verify(self, repair=repair)

    def sweep(self) -> int:
        """Remove old temporary files, unused locks and quarantined files, as after a build; returns how many."""
        if not self.database.can_write():
            return 0
        from softcap_runtime.store import quarantine

        return quarantine.sweep(self.folder)

    def export_bundle(self, path: str | os.PathLike[str], fingerprint: Mapping[str, str] | None = None) -> int:
        """Write the entries of ``fingerprint`` (None: all) into one file; returns how many.

        Raises bundle.Incomplete, and writes nothing, if one of them is bad or not authenticated: else only the
        machines that lack it would notice. Raises OSError if the file cannot be written or the cache cannot be read.
        """
        from softcap_runtime.store import bundle

        return bundle.export(self, Path(path), fingerprint)

    def import_bundle(self, path: str | os.PathLike[str], expected_fingerprint: Mapping[str, str]) -> ImportReport:
        """Import the entries of a bundle that fit ``expected_fingerprint``; the report names the rest.

        Raises OSError if the file cannot be read; ValueError if it is not a bundle, was changed, or its fitting
        entries exceed the size limit. Nothing is imported then.
        """
        from softcap_runtime.store import bundle

        return bundle.import_(self, Path(path), expected_fingerprint)
