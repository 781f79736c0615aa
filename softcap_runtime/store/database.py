"""The database of a folder: opened at first use, moved into quarantine when bad; disk faults are noted, not raised."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from softcap_runtime.store import trust
from softcap_runtime.store.entry import printable
from softcap_runtime.store.processes import DATABASE_LOCK

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index

log = logging.getLogger(__name__)
T = TypeVar("T")

BUSY_SECONDS = 3.0  # how long one access waits for another process's transaction
RETRY_SECONDS = 5.0  # how long to leave a locked database alone

_INHERITED: list[object] = []  # connections of the parent process: closing one could roll back its work


class Database:
    """The database in ``folder``; calls ``count`` with ``corrupt`` or ``rejected`` for each bad one that it finds.

    ``moved``: a line for each database that this process moved into quarantine, with the reason. ``writable``:
    whether the folder can be written; valid once the database is open.
    """

    def __init__(self, folder: Path, max_bytes: int, count: Callable[[str], None]) -> None:
        self.folder = folder
        self.moved: list[str] = []
        self.writable = False
        self._max_bytes = max_bytes
        self._count = count
        self._faults: dict[str, str] = {}
        self._logged: set[str] = set()
        self._index: Index | None = None
        self._inode: tuple[int, int] | None = None
        self._retry_at = 0.0

    @property
    def fault(self) -> str | None:
        """Why the disk is not used, in one line: the oldest fault that persists; None while everything works."""
        return next(iter(self._faults.values()), None)

    def probe_fault(self) -> str | None:
        """``fault``, or before the first use what would prevent it. Opens and creates nothing."""
        if self._index is not None or self.fault is not None:
            return self.fault
        return trust.probe(self.folder)

    def use(self, what: str, action: Callable[[Index], T], default: T, create: bool = False) -> T:
        """Run ``action`` on the open index; on a disk fault, note it under ``what`` and return ``default``.

        ``create`` makes a missing database; without it the result is ``default``. A database that was replaced is
        reopened; a damaged or foreign one moves into quarantine and a new one takes its place.
        """
        try:
            # Not at the top: with diskcache they take as long as opening a cache.
            import sqlite3

            from softcap_runtime.store.index import Moved
            from softcap_runtime.store.schema import Foreign, OtherVersion
        except (ImportError, OSError) as error:  # out of file descriptors
            self._unavailable(what, error)
            return default
        replaced: Exception | None = None
        with DATABASE_LOCK:
            for _ in range(3):
                try:
                    index = self._opened(create)
                    if index is None:
                        return default
                    result = action(index)
                    self._faults.pop(what, None)
                    return result
                except (Moved, FileNotFoundError, NotADirectoryError) as error:
                    replaced = error
                    self.close()
                except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError, OtherVersion) as error:
                    self._unavailable(what, error)
                    return default
                except (sqlite3.DatabaseError, Foreign, UnicodeDecodeError) as error:
                    # UnicodeDecodeError when SQLite's message quotes a damaged name.
                    if not self._move_aside(error, "rejected" if isinstance(error, Foreign) else "corrupt"):
                        return default
            why = replaced if isinstance(replaced, OSError) else "its database is replaced again and again"
            self.note(what, f"cache folder {self.folder}: {why}; not used now")
            return default

    def can_write(self, create: bool = True) -> bool:
        """Whether the database is open for writing; opens it, and notes why not."""
        return self.use("open", lambda _: self.writable, False, create)

    def is_empty(self) -> bool:
        """Whether the folder is usable and holds no database yet."""
        from softcap_runtime.store import schema

        no_database = not os.path.lexists(self.folder / schema.DBNAME)
        return no_database and trust.check(self.folder).problem is None

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with DATABASE_LOCK:
            index, self._index = self._index, None
            if index is not None:
                index.close()

    def note(self, what: str, line: str) -> None:
        """Keep a fault as ``fault`` until ``what`` works again, and log it the first time."""
        self._faults[what] = line
        if line not in self._logged:
            self._logged.add(line)
            log.warning("%s", line)

    def forget_parent(self) -> None:
        """In a forked child: neither use nor close the parent's connection."""
        if self._index is not None:
            _INHERITED.append(self._index)
        self._index = None

    def _opened(self, create: bool) -> Index | None:
        if self._index is not None:
            return self._index
        if time.monotonic() < self._retry_at:
            return None
        problem = None
        if not os.path.lexists(self.folder):
            if not create:
                return None
            problem = trust.probe(self.folder)
            if problem is None:
                trust.make_private(self.folder)
        if problem is None:
            problem, self.writable, *_ = trust.check(self.folder)
        from softcap_runtime.store import quarantine, schema
        from softcap_runtime.store.index import Index

        missing = problem is None and not os.path.lexists(self.folder / schema.DBNAME)
        if missing and not self.writable:
            problem = f"cache folder {self.folder} is read-only and empty; prewarm it as its owner"
        if problem is not None:
            self.note("open", problem)
            return None
        if missing:
            if not create:
                return None
            quarantine.create_database(self.folder)
        self._inode = schema.inode(self.folder)
        self._index = Index(self.folder, writable=self.writable, busy_seconds=BUSY_SECONDS, max_bytes=self._max_bytes)
        self._faults.pop("open", None)
        return self._index

    def _unavailable(self, what: str, error: Exception) -> None:
        self.close()
        if "locked" in str(error):
            self._retry_at = time.monotonic() + RETRY_SECONDS
        self.note(what, f"cache folder {self.folder}: cannot {what}: {error}; working from memory meanwhile")

    def _move_aside(self, error: Exception, kind: str) -> bool:
        """Move a bad database into quarantine; returns whether to try again with a new one."""
        from softcap_runtime.store import quarantine

        self.close()
        self._count(kind)
        reason = printable(str(error))
        message = f"cache folder {self.folder}: its database is not usable: {reason}"
        if not self.writable:
            self.note("open", f"{message}; it is read-only, ask its owner to remove it")
            return False
        try:
            target = quarantine.move_database(self.folder, self._inode)
        except OSError as failure:
            self.note("open", f"{message}; it cannot be moved aside: {failure}")
            return False
        if target is not None:
            self.moved.append(f"{reason}; moved to {target}")
            log.warning("%s; moved to %s; its entries are built again when needed", message, target)
        return True
