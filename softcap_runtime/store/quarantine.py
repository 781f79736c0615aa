"""The files of a cache folder: create the database, move bad ones into quarantine, remove leftovers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

from softcap_runtime.store import locks, schema, trust

FOLDER = "quarantine"
TEMPORARY_S, LOCK_S, QUARANTINE_S = 3600.0, 86400.0, 7 * 86400.0  # the age at which each is removed
_MAINTENANCE = "maintenance"  # the lock for creating and moving a database
_LONGEST_WAIT_S = 10.0
_SQLITE_LOCK_BYTES = (512, 0x40000000)  # length and start of the range of SQLite's file locks

# Never closed: closing any descriptor of a file drops every lock that the process holds on it.
_MOVED: list[int] = []


def create_database(folder: Path) -> None:
    """Create an empty database unless another process just did. Raises OSError, sqlite3.Error."""
    with locks.hold(folder, _MAINTENANCE, _LONGEST_WAIT_S):
        if not os.path.lexists(folder / schema.DBNAME):
            # A leftover of a database that is gone; SQLite would replay it into the new one.
            (folder / f"{schema.DBNAME}-journal").unlink(missing_ok=True)
            schema.create(folder)


def move_database(folder: Path, bad: tuple[int, int] | None) -> Path | None:
    """Move the database and its journal into quarantine, if it still is the file ``bad`` (see ``schema.inode``).

    Returns the new path; None if another process has moved it already. Raises OSError.
    """
    with locks.hold(folder, _MAINTENANCE, _LONGEST_WAIT_S):
        path = folder / schema.DBNAME
        if not os.path.lexists(path) or schema.inode(folder) != bad:
            return None
        target = _new_path(folder, "db")
        _keep_sqlite_out(path)
        os.rename(path, target)
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder / f"{schema.DBNAME}-journal", f"{target}-journal")
        return target


def keep_row(folder: Path, *columns: object) -> None:
    """Write the columns of a bad row into a file in quarantine, one per line. Raises OSError."""
    path = _new_path(folder, "entry")
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        for column in columns:
            file.write(column if isinstance(column, bytes) else str(column).encode("utf-8", "replace"))
            file.write(b"\n")


def _new_path(folder: Path, suffix: str) -> Path:
    trust.make_private(folder / FOLDER)
    return folder / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}.{suffix}"


def _keep_sqlite_out(path: Path) -> None:
    """Lock the file for good, so that no other process's SQLite writes to it; their next access finds it moved."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    _MOVED.append(descriptor)
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
    """Remove old temporary files, unused locks and quarantined files; returns how many. Never raises."""
    if trust.check(folder).problem is not None:
        return 0  # a symbolic link inside could lead the removal elsewhere
    now, removed = time.time(), 0
    for pattern, oldest in (
        (f"{schema.DBNAME}.*.tmp", TEMPORARY_S),
        (f"{FOLDER}/*", QUARANTINE_S),
        (f"{locks.FOLDER}/*.lock", LOCK_S),
    ):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode) or abs(now - status.st_mtime) < oldest:
                    continue
                if path.suffix == ".lock":
                    removed += locks.remove_unused(path)
                else:
                    path.unlink()
                    removed += 1
    return removed
