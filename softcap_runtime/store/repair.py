"""Creating, moving aside, verifying and sweeping: what heals a cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from softcap_runtime.store import entry as entries_
from softcap_runtime.store import schema
from softcap_runtime.store.entry import BadEntry
from softcap_runtime.store.locks import KeyLocks

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index
    from softcap_runtime.store.report import Problem
    from softcap_runtime.store.store import Store

QUARANTINE = "quarantine"
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


def set_aside(folder: Path, bad: tuple[int, int] | None, locks: KeyLocks) -> str:
    """Move the database, if it is still the ``bad`` file, with its journal into quarantine; where to.

    Raises OSError.
    """
    with locks.process(_MAINTENANCE, _LONGEST_WAIT_S):
        path = folder / schema.DBNAME
        if not os.path.lexists(path) or inode(folder) != bad:
            return "quarantine by another process"
        target = quarantine_path(folder, "db")
        with _locked_for_sqlite(path):
            os.rename(path, target)
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder / f"{schema.DBNAME}-journal", f"{target}-journal")
        return str(target)


def quarantine_path(folder: Path, suffix: str) -> Path:
    """A new name in the folder's quarantine. Raises OSError."""
    place = folder / QUARANTINE
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
        place.chmod(0o700)
    return place / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}.{suffix}"


@contextlib.contextmanager
def _locked_for_sqlite(path: Path) -> Iterator[None]:
    """Keep other processes' SQLite out of the file, for good: their next transaction finds it moved."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    _MOVED_ASIDE.append(descriptor)
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, *_SQLITE_LOCK_BYTES)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    yield


def verify(store: Store, *, repair: bool) -> list[Problem]:
    """See ``Store.verify``."""
    from softcap_runtime.store.report import Problem

    store.flush()
    problems: list[Problem] = []

    def check(index: Index) -> None:
        problems.extend(Problem(where=schema.DBNAME, what=line, repaired=False) for line in index.damage())
        for row in list(index.rows()):
            if row.reserved:
                continue
            try:
                digest = row.check()
                found = index.read(digest)
                if found is not None:
                    entries_.verify(found.text, found.payload, digest, store.auth_key)
                    _validate(found.text)
            except BadEntry as bad:
                store.counters.add(bad.kind)
                if repair:
                    index.remove_row(row.rowid)
                problems.append(Problem(where=str(row.key)[:100], what=str(bad), repaired=repair))

    before = store.fault
    store.use("verify", check, None)
    if store.fault is not None and store.fault != before:
        problems.append(Problem(where=str(store.folder), what=store.fault, repaired=False))
    return problems


def _validate(text: str) -> None:
    from pydantic import ValidationError

    from softcap_runtime.store.report import Document

    try:
        Document.model_validate(entries_.parse(entries_.split(text)[0]))
    except ValidationError as error:
        raise BadEntry("rejected", f"its document is not valid: {error.errors()[0]['msg']}") from None
