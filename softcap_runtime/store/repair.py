"""Creating, moving aside, verifying and sweeping: what heals a cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import locks as locks_
from softcap_runtime.store import schema, trust
from softcap_runtime.store.entry import BadEntry
from softcap_runtime.store.locks import KeyLocks

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index
    from softcap_runtime.store.report import Problem
    from softcap_runtime.store.stock import Stock

QUARANTINE = "quarantine"
TEMPORARY_S, LOCK_S, QUARANTINE_S = 3600.0, 86400.0, 7 * 86400.0  # how old each may get
_MAINTENANCE = "maintenance"
_LONGEST_WAIT_S = 10.0
_SQLITE_LOCK_BYTES = (512, 0x40000000)  # length and start of the range that SQLite's file locks use

# Kept open for good: closing any descriptor of a file drops every lock the process has on it.
_MOVED_ASIDE: list[int] = []


def inode(folder: Path) -> tuple[int, int]:
    """Which file the database is. Raises FileNotFoundError."""
    status = os.stat(folder / schema.DBNAME)
    return status.st_dev, status.st_ino


def create(folder: Path, locks: KeyLocks) -> None:
    """Make an empty database unless another process just did. Raises OSError, sqlite3.Error."""
    with locks.process(_MAINTENANCE, _LONGEST_WAIT_S):
        if not os.path.lexists(folder / schema.DBNAME):
            # Left by a database that is gone: SQLite would play it back into the new one.
            (folder / f"{schema.DBNAME}-journal").unlink(missing_ok=True)
            schema.create(folder)


def set_aside(folder: Path, bad: tuple[int, int] | None, locks: KeyLocks) -> Path | None:
    """Move the database, if it is still the ``bad`` file, with its journal into quarantine; where to.

    None when another process did so before. Raises OSError.
    """
    with locks.process(_MAINTENANCE, _LONGEST_WAIT_S):
        path = folder / schema.DBNAME
        if not os.path.lexists(path) or inode(folder) != bad:
            return None
        target = quarantine_path(folder, "db")
        _keep_sqlite_out(path)
        os.rename(path, target)
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder / f"{schema.DBNAME}-journal", f"{target}-journal")
        return target


def quarantine_path(folder: Path, suffix: str) -> Path:
    """A new name in the folder's quarantine. Raises OSError."""
    place = folder / QUARANTINE
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
        place.chmod(0o700)
    return place / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}.{suffix}"


def _keep_sqlite_out(path: Path) -> None:
    """Lock the file against other processes' SQLite, for good: their next access finds that it moved."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    _MOVED_ASIDE.append(descriptor)
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, *_SQLITE_LOCK_BYTES)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def sweep(folder: Path) -> int:
    """Remove temporary files, unused locks and old quarantine by age; how many. Never raises."""
    if trust.check(folder).problem is not None:
        return 0  # a link among its folders would lead the removal elsewhere
    now = time.time()
    removed = 0
    for pattern, oldest in (
        (f"{schema.DBNAME}.*.tmp", TEMPORARY_S),
        (f"{QUARANTINE}/*", QUARANTINE_S),
        (f"{locks_.FOLDER}/*.lock", LOCK_S),
    ):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode) or abs(now - status.st_mtime) < oldest:
                    continue
                removed += locks_.remove_unused(path) if path.suffix == ".lock" else _removed(path)
    return removed


def _removed(path: Path) -> bool:
    path.unlink()
    return True


def verify(stock: Stock, *, repair: bool) -> list[Problem]:
    """See ``Store.verify``."""
    from softcap_runtime.store.report import Problem

    stock.flush()
    known = len(stock.database.set_aside)
    nothing: list[Problem] = []
    problems = stock.database.use("verify", lambda index: list(_problems(stock, index, repair)), nothing)
    moved = [
        Problem(where=schema.DBNAME, what=line, repaired=True) for line in stock.database.set_aside[known:]
    ]
    if stock.fault is not None:
        problems.append(Problem(where=str(stock.folder), what=stock.fault, repaired=False))
    return moved + problems


def _problems(stock: Stock, index: Index, repair: bool) -> Iterator[Problem]:
    from softcap_runtime.store.inspection import document_of
    from softcap_runtime.store.report import Problem

    repair = repair and stock.database.can_write()
    damage = index.damage()
    if damage and repair:
        raise sqlite3.DatabaseError(damage[0])  # moved aside; the good entries go into a fresh database
    for line in damage:
        yield Problem(where=schema.DBNAME, what=line, repaired=False)
    for row in list(index.rows()):
        if row.reserved:
            continue
        try:
            digest = row.check()
            found = index.read(digest)
            if found is not None:
                entries_.verify(found.text, found.payload, digest, stock.auth_key)
                document_of(found.text)
        except BadEntry as bad:
            stock.counters.add(bad.kind)
            if repair:
                _quarantine_row(stock.folder, index, row.rowid)
            yield Problem(where=str(row.key)[:100], what=str(bad), repaired=repair)


def _quarantine_row(folder: Path, index: Index, rowid: int) -> None:
    text, value = index.raw_row(rowid)
    path = quarantine_path(folder, "entry")
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        for part in (text, value):
            file.write(part if isinstance(part, bytes) else str(part).encode("utf-8", "replace"))
            file.write(b"\n")
    index.remove_row(rowid)
