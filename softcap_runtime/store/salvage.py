"""Bringing the good entries of a bad database into a fresh one: each is proven by its own checksum."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import schema
from softcap_runtime.store.entry import BadEntry, Sealed
from softcap_runtime.store.index import COUNTERS_KEY, BytesDisk
from softcap_runtime.store.key import is_digest

log = logging.getLogger(__name__)

LONGEST_S = 20.0  # rebuilding one kernel takes about as long


def salvage(
    database: Path,
    auth_key: bytes | None,
    keep: Callable[[str, Sealed, int], None],
    keep_counters: Callable[[bytes], None],
) -> int:
    """Hand every entry of ``database`` that still verifies to ``keep`` (digest, entry, hits); how many.

    Reads only the one table, and only if its definition is ours; gives up quietly where it cannot be read,
    and after ``LONGEST_S``.
    """
    deadline = time.monotonic() + LONGEST_S
    saved = 0
    try:
        connection = _open(database)
    except (sqlite3.Error, OSError, UnicodeDecodeError):
        return 0
    with contextlib.closing(connection):
        for rowid in sorted(_rowids(connection)):
            if time.monotonic() > deadline:
                log.warning("%s: gave up saving entries after %.0f s", database, LONGEST_S)
                break
            found = _row(connection, rowid)
            if found is None:
                continue
            key, text, payload, hits = found
            if key == COUNTERS_KEY:
                keep_counters(payload)
                continue
            try:
                entries_.verify(text, payload, key, auth_key)
            except BadEntry:
                continue
            keep(key, Sealed(text, payload), hits)
            saved += 1
    return saved


def _open(database: Path) -> sqlite3.Connection:
    # Immutable: no journal is played back, no lock taken, nothing written.
    uri = f"{database.resolve().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.execute("PRAGMA trusted_schema = OFF")
        # Makes SQLite read a file that is shorter than its header says.
        connection.execute("PRAGMA writable_schema = ON")
        found = connection.execute("SELECT type, sql FROM sqlite_master WHERE name = 'Cache'").fetchall()
        if found != [("table", schema.STATEMENTS["Cache"])]:
            raise sqlite3.DatabaseError("its table is not ours")
    except BaseException:
        connection.close()
        raise
    return connection


def _rowids(connection: sqlite3.Connection) -> set[int]:
    """The rows that the table, or where it is damaged its index, still leads to."""
    found: set[int] = set()
    for hint in ("NOT INDEXED", "INDEXED BY Cache_key_raw"):
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            found.update(_first_column(connection, f"SELECT rowid FROM Cache {hint}"))
    return found


def _first_column(connection: sqlite3.Connection, select: str) -> Iterator[int]:
    for (value,) in connection.execute(select):
        yield value


def _row(connection: sqlite3.Connection, rowid: int) -> tuple[str, Any, bytes, int] | None:
    select = "SELECT key, raw, tag, mode, filename, value, access_count FROM Cache WHERE rowid = ?"
    try:
        ((key, raw, text, mode, filename, value, hits),) = connection.execute(select, (rowid,)).fetchall()
        disk = BytesDisk("")
        name, payload = disk.get(key, raw), disk.fetch(mode, filename, value, False)
    except (sqlite3.Error, BadEntry, ValueError):
        return None
    if name != COUNTERS_KEY and not is_digest(name):
        return None
    return name, text, payload, hits if type(hits) is int and 0 <= hits < 2**53 else 0
