"""One builder per key: threads of this process by a lock in memory, processes by a kernel lock on a file.

The kernel releases the file lock when its holder ends, however it ends. On a network filesystem the lock
holds between hosts only where the server keeps flock (NFS does by default); where flock is missing
altogether, each process builds for itself, which costs time and harms nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)

FOLDER = "locks"
LONGEST_WAIT_S = 1800.0  # a build may take 900 s; a builder that was stopped must not stop the machine


class KeyLocks:
    """The locks of one cache folder. Make a new one after fork."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._guard = threading.Lock()
        self._threads: dict[str, tuple[threading.Lock, int]] = {}
        self._logged: set[str] = set()

    @contextlib.contextmanager
    def thread(self, name: str) -> Iterator[float]:
        """Hold ``name`` against the other threads; gives the seconds waited."""
        with self._guard:
            lock, users = self._threads.get(name, (threading.Lock(), 0))
            self._threads[name] = lock, users + 1
        try:
            started = time.monotonic()
            held = lock.acquire(timeout=LONGEST_WAIT_S)
            try:
                yield time.monotonic() - started
            finally:
                if held:
                    lock.release()
        finally:
            with self._guard:
                lock, users = self._threads[name]
                if users == 1:
                    del self._threads[name]
                else:
                    self._threads[name] = lock, users - 1

    @contextlib.contextmanager
    def process(self, name: str, longest: float = LONGEST_WAIT_S) -> Iterator[float]:
        """Hold ``name`` against other processes; gives the seconds waited.

        Goes on without the lock after ``longest`` seconds, or where no lock can be taken: that is logged, and
        costs at most a second build.
        """
        lock, waited = self._acquired(name, longest)
        try:
            yield waited
        finally:
            if lock is not None:
                with contextlib.suppress(OSError):
                    lock.release()

    def _acquired(self, name: str, longest: float) -> tuple[FileLock | None, float]:
        try:
            # Not at the top: only who builds needs it, and its import takes as long as opening a cache.
            from filelock import FileLock

            _make_folder(self.folder)
            if not _has_flock(self.folder):
                self._go_on_without("its filesystem has no flock")
                return None, 0.0
            lock = FileLock(self.folder / f"{name}.lock", mode=0o600)
            started = time.monotonic()
            lock.acquire(timeout=longest)
            return lock, time.monotonic() - started
        except TimeoutError:  # filelock's own is one
            self._go_on_without(f"{name[:12]} is held for more than {longest:.0f} s")
            return None, longest
        except (OSError, ImportError) as error:
            self._go_on_without(str(error))
            return None, 0.0

    def _go_on_without(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            log.warning("locks in %s: %s; going on without, others may build the same", self.folder, reason)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)
    except FileExistsError:
        return


def _has_flock(folder: Path) -> bool:
    """Whether the filesystem has flock: without it filelock takes a lock that outlives a killed holder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)
    finally:
        os.close(descriptor)
    return True


def remove_unused(path: Path) -> bool:
    """Remove a lock file that nobody holds; whether it was removed. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
