"""The database of a folder, as a thing that never raises: opened when used, healed when bad."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from softcap_runtime.store import trust
from softcap_runtime.store.entry import printable
from softcap_runtime.store.locks import KeyLocks
from softcap_runtime.store.processes import DATABASE_LOCK

if TYPE_CHECKING:
    from softcap_runtime.store.index import Index

log = logging.getLogger(__name__)
T = TypeVar("T")

BUSY_SECONDS = 3.0  # how long one access waits for another process's transaction
RETRY_SECONDS = 5.0  # how long a database that stays locked is left alone

_INHERITED: list[object] = []  # connections of the parent process: closing one could roll back its work


class Database:
    """``fault``: why the disk is not used now, in one line; None once what failed works again.

    ``set_aside``: databases that this process found bad and moved, with the reason. ``bad``: called with
    ``corrupt`` or ``rejected`` for each; ``save``: called with the path of one that was moved.
    """

    def __init__(
        self, folder: Path, max_bytes: int, bad: Callable[[str], None], save: Callable[[Path], None]
    ) -> None:
        self.folder = folder
        self.set_aside: list[str] = []
        self.writable = False
        self.locks = KeyLocks(folder)
        self._max_bytes = max_bytes
        self._bad = bad
        self._save = save
        self._faults: dict[str, str] = {}
        self._logged: set[str] = set()
        self._index: Index | None = None
        self._inode: tuple[int, int] | None = None
        self._retry_at = 0.0

    @property
    def fault(self) -> str | None:
        """The oldest fault that lasts."""
        return next(iter(self._faults.values()), None)

    def foreseen(self) -> str | None:
        """``fault``; before the first use, what stands in the way of it. Opens and creates nothing."""
        if self._index is not None or self.fault is not None:
            return self.fault
        return trust.foresee(self.folder)

    def use(self, what: str, action: Callable[[Index], T], default: T, create: bool = False) -> T:
        """Run ``action`` on the open index; after a disk fault note it and give ``default``.

        Where there is no database yet it is made with ``create``; without, ``default`` is the answer. One that was
        replaced is opened anew; a damaged or foreign one is moved aside for a fresh one.
        """
        try:
            # Not at the top: with diskcache they take as long as opening a cache.
            import sqlite3

            from softcap_runtime.store.index import Moved
            from softcap_runtime.store.schema import Foreign, OtherVersion
        except (ImportError, OSError) as error:  # out of file descriptors
            self._unavailable(what, error)
            return default
        last: Exception | None = None
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
                    last = error
                    self.close()
                except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError, OtherVersion) as error:
                    self._unavailable(what, error)
                    return default
                except (sqlite3.DatabaseError, Foreign, UnicodeDecodeError) as error:
                    # The last when SQLite's message quotes a damaged name.
                    if not self._move_aside(error):
                        return default
            told = f"{last}" if isinstance(last, OSError) else "its database is replaced again and again"
            self.note(what, f"cache folder {self.folder}: {told}; not used now")
            return default

    def can_write(self, create: bool = True) -> bool:
        """Whether the database is open for writing; opens it, and notes why not."""
        return self.use("open", lambda _: self.writable, False, create)

    def is_empty(self) -> bool:
        """Whether the folder may be used and nobody has made a database in it, as who may only read it cannot."""
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
        """Keep a fault for people to see until ``what`` works again, and log it the first time."""
        self._faults[what] = line
        if line not in self._logged:
            self._logged.add(line)
            log.warning("%s", line)

    def forget_parent(self) -> None:
        """In a forked child: neither use nor close what the parent has open."""
        if self._index is not None:
            _INHERITED.append(self._index)
        self._index = None
        self.locks = KeyLocks(self.folder)

    def _opened(self, create: bool) -> Index | None:
        if self._index is not None:
            return self._index
        if time.monotonic() < self._retry_at:
            return None
        if not os.path.lexists(self.folder):
            if not create:
                return None
            problem = trust.foresee(self.folder)
            if problem is not None:
                self.note("open", problem)
                return None
            trust.make_private(self.folder)
        verdict = trust.check(self.folder)
        self.writable = verdict.writable
        if verdict.problem is not None:
            self.note("open", verdict.problem)
            return None
        from softcap_runtime.store import repair, schema
        from softcap_runtime.store.index import Index

        if not os.path.lexists(self.folder / schema.DBNAME):
            if not verdict.writable:
                self.note(
                    "open", f"cache folder {self.folder} is read-only and empty; prewarm it as its owner"
                )
                return None
            if not create:
                return None
            repair.create(self.folder, self.locks)
        self._inode = repair.inode(self.folder)
        self._index = Index(
            self.folder, writable=verdict.writable, busy_seconds=BUSY_SECONDS, max_bytes=self._max_bytes
        )
        self._faults.pop("open", None)
        return self._index

    def _unavailable(self, what: str, error: Exception) -> None:
        self.close()
        if "locked" in str(error):
            self._retry_at = time.monotonic() + RETRY_SECONDS
        self.note(what, f"cache folder {self.folder}: cannot {what}: {error}; working from memory meanwhile")

    def _move_aside(self, error: Exception) -> bool:
        """Move a bad database into quarantine and save its good entries; whether to try again."""
        from softcap_runtime.store import repair, schema

        self.close()
        reason = printable(str(error))
        self._bad("rejected" if isinstance(error, schema.Foreign) else "corrupt")
        line = f"cache folder {self.folder}: its database is not usable: {reason}"
        if not self.writable:
            self.note("open", f"{line}; it is read-only, ask its owner to remove it")
            return False
        try:
            moved = repair.set_aside(self.folder, self._inode, self.locks)
        except OSError as failure:
            self.note("open", f"{line}; it cannot be moved aside: {failure}")
            return False
        if moved is not None:
            log.warning("%s; moved to %s", line, moved)
            self.set_aside.append(f"{reason}; moved to {moved}")
            self._save(moved)
        return True
