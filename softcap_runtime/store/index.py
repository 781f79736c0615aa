"""The index of a cache: a diskcache.Cache that trusts nothing it reads and never touches another file.

diskcache itself unpickles rows, opens and removes files that rows name, obeys settings found in the database, writes
25 transactions on every open and waits 60 s for a lock. ``Index`` inspects a database before using it, opens it
without a write (read-only if need be) on one connection, and takes only str keys and bytes values.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diskcache

from softcap_runtime.store import schema
from softcap_runtime.store.entry import MAX_DOCUMENT, BadEntry, Sealed
from softcap_runtime.store.key import is_digest

COUNTERS_KEY = "counters"
MODE_RAW = 1
CLOCK_STEP_S = 60.0  # a last use further in the future than this comes from a wrong clock


class Moved(sqlite3.OperationalError):
    """The open database is no longer the one at its path."""


class BytesDisk(diskcache.Disk):
    """str keys and bytes values, both within the row; anything else in a row is refused, never followed."""

    def put(self, key: Any) -> tuple[str, bool]:
        """The key, unchanged. Raises TypeError unless it is a str."""
        if type(key) is not str:
            raise TypeError(f"key: {type(key).__name__}, expected str")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """The key of a row. Raises BadEntry unless it is text stored raw."""
        if type(key) is not str or raw != 1:
            raise BadEntry("rejected", "its key is not plain text")
        return key

    def store(self, value: Any, read: bool, key: Any = None) -> tuple[int, int, None, bytes]:
        """The columns of a value. Raises TypeError unless it is bytes."""
        if type(value) is not bytes:
            raise TypeError(f"value: {type(value).__name__}, expected bytes")
        return len(value), MODE_RAW, None, value

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> bytes:
        """The value of a row. Raises BadEntry unless it is bytes within the row."""
        if mode != MODE_RAW or filename is not None or type(value) is not bytes:
            raise BadEntry("rejected", f"its value is not plain bytes (mode {mode!r}, file {filename is not None})")
        return value

    def remove(self, file_path: Any) -> None:
        """Remove nothing: no file that a row names is ours."""


class Row(NamedTuple):
    """A row without its value."""

    rowid: int
    key: Any
    raw: Any
    text: Any
    mode: Any
    filename: Any
    value_type: str
    value_bytes: int
    last_used: Any
    hits: Any

    def check(self) -> str:
        """The digest of the row's entry. Raises BadEntry for a row of any other form."""
        columns = self.raw, self.mode, self.filename, self.value_type
        if columns != (1, MODE_RAW, None, "blob") or not is_digest(self.key):
            raise BadEntry("rejected", "it does not have the form of an entry")
        return str(self.key)


class Index(diskcache.Cache):
    """An open, inspected database. One connection: callers hold one lock around every use.

    Raises schema.Foreign, schema.OtherVersion, FileNotFoundError (no database), sqlite3.DatabaseError
    (damaged), sqlite3.OperationalError or OSError (cannot be opened or read now).
    """

    _con: Any = None  # in place of diskcache's, which opens one for each thread

    def __init__(self, folder: Path, *, writable: bool, busy_seconds: float, max_bytes: int) -> None:
        # Not super().__init__: see the module's docstring.
        self._directory = str(folder)
        self._path = folder / schema.DBNAME
        self._max_bytes = max_bytes
        self._txn_id: int | None = None
        self._disk = BytesDisk(self._directory)
        for name, value in schema.SETTINGS.items():
            setattr(self, name, value)
        schema.check_journal(folder)
        schema.check_header(folder)
        self._inode = schema.inode(folder)
        self._con = sqlite3.connect(
            f"{self._path.resolve().as_uri()}?mode={'rw' if writable else 'ro'}",
            uri=True,
            timeout=busy_seconds,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._con.text_factory = lambda raw: raw.decode("utf-8", "replace")
            self._con.execute("PRAGMA trusted_schema = OFF")
            self._con.execute("PRAGMA cell_size_check = ON")
            for name in ("mmap_size", "cache_size", "synchronous"):
                self._con.execute(f"PRAGMA {name} = {schema.SETTINGS[f'sqlite_{name}']}")
            if writable:
                # Another tool may have left it in WAL mode; SQLite writes nothing if the mode is right already.
                self._con.execute("PRAGMA journal_mode = delete").fetchall()
            schema.check_schema(self._con)
            self.check_place()
        except BaseException:
            self._con.close()
            raise

    def close(self) -> None:
        """Close the connection; the index cannot be used afterwards."""
        self._con.close()

    @contextlib.contextmanager
    def _transact(self, retry: bool = False, filename: Any = None) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        """diskcache's transaction, but with SQLite's own error, and rolled back if COMMIT fails (disk full)."""
        execute = self._con.execute
        if self._txn_id == threading.get_ident():
            yield execute, self._disk.remove
            return
        execute("BEGIN IMMEDIATE")
        self._txn_id = threading.get_ident()
        try:
            # After BEGIN: moving a database aside takes its lock, so nobody can do it from here on.
            self.check_place()
            yield execute, self._disk.remove
            execute("COMMIT")
        except BaseException:
            if self._con.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    execute("ROLLBACK")
            raise
        finally:
            self._txn_id = None

    def check_place(self) -> None:
        """Raise Moved when another process moved the database aside, or the folder is gone."""
        if schema.inode(self._path.parent) != self._inode:
            raise Moved(f"{self._path} was replaced")

    def read(self, digest: str) -> Sealed | None:
        """The entry stored under ``digest``, its seals not yet verified. Raises BadEntry for an odd row."""
        self.check_place()
        sizes = "SELECT length(value), length(tag) FROM Cache WHERE key = ? AND raw = 1"
        for value_bytes, text_length in self._con.execute(sizes, (digest,)).fetchall():
            if (value_bytes or 0) > self._max_bytes:
                raise BadEntry("rejected", f"its value has {value_bytes} bytes, expected at most {self._max_bytes}")
            if (text_length or 0) > MAX_DOCUMENT:
                raise BadEntry(
                    "rejected", f"its document has {text_length} characters, expected at most {MAX_DOCUMENT}"
                )
        payload, text = self.get(digest, tag=True)
        return None if payload is None else Sealed(text, payload)

    def publish(self, digest: str, entry: Sealed, size_limit: int) -> int:
        """Store an entry and evict the least recently used others down to ``size_limit`` bytes; returns how many."""
        # Keeps this entry, then the most recently used that fit. Entries used in the future (a clock ran ahead) are
        # evicted first: they would outlive the others for years.
        evict = (
            "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM (SELECT rowid, total(length(value)) OVER"
            " (ORDER BY key IS ? DESC, access_time <= ? DESC, access_time DESC, rowid DESC) AS kept"
            " FROM Cache WHERE key IS NOT ?) WHERE kept > ?)"
        )
        with self._transact() as (execute, _):
            self.set(digest, entry.payload, tag=entry.text)
            now = time.time() + CLOCK_STEP_S
            return int(execute(evict, (digest, now, COUNTERS_KEY, size_limit)).rowcount)

    def merge(self, uses: Mapping[str, int], counters: Callable[[bytes | None], bytes]) -> None:
        """Add ``uses`` to the entries' counts, and rewrite the counters row, in one transaction."""
        with self._transact() as (execute, _):
            use = "UPDATE Cache SET access_count = access_count + ?, access_time = ? WHERE key = ? AND raw = 1"
            for digest, count in uses.items():
                execute(use, (count, time.time(), digest))
            self.set(COUNTERS_KEY, counters(self.counters()))

    def counters(self) -> bytes | None:
        """The stored counters; None when there are none in a usable form."""
        try:
            data = self.get(COUNTERS_KEY)
        except BadEntry:
            return None
        return data if isinstance(data, bytes) else None

    def rows(self) -> list[Row]:
        """Every row but the counters."""
        select = (
            f"SELECT rowid, key, raw, CASE WHEN length(tag) <= {MAX_DOCUMENT} THEN tag END, mode, filename,"
            " typeof(value), length(value), access_time, access_count"
            " FROM Cache WHERE key IS NOT ? OR raw IS NOT 1 ORDER BY rowid"
        )
        return [Row._make(row) for row in self._con.execute(select, (COUNTERS_KEY,)).fetchall()]

    def raw_row(self, rowid: int) -> tuple[Any, Any]:
        """Text and value of a row, unchecked, for the quarantine; (None, None) if there is no such row."""
        found = self._con.execute("SELECT tag, value FROM Cache WHERE rowid = ?", (rowid,)).fetchall()
        return found[0] if found else (None, None)

    def remove_rows(self, rowids: Iterable[int]) -> None:
        """Delete rows; files that they name are not touched."""
        with self._transact() as (execute, _):
            for rowid in rowids:
                execute("DELETE FROM Cache WHERE rowid = ?", (rowid,))

    def remove_entries(self) -> int:
        """Delete every row but the counters; returns how many."""
        with self._transact() as (execute, _):
            return int(execute("DELETE FROM Cache WHERE key IS NOT ? OR raw IS NOT 1", (COUNTERS_KEY,)).rowcount)

    def totals(self) -> tuple[int, int]:
        """The number of entries, and their bytes."""
        select = "SELECT count(*), total(length(value)) FROM Cache WHERE key IS NOT ?"
        ((entries, size),) = self._con.execute(select, (COUNTERS_KEY,)).fetchall()
        return int(entries), int(size)

    def damage(self) -> list[str]:
        """What SQLite's own integrity check finds; reads the whole file."""
        lines = self._con.execute("PRAGMA integrity_check(20)")
        return [str(line) for (line,) in lines if line != "ok"]
