"""One builder per key: a file lock of the operating system, between threads and processes, that ends with its holder.

On a network filesystem it holds between hosts only if the server supports flock (NFS does by default). Without flock
each process builds for itself, which costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from softcap_runtime.store import trust

log = logging.getLogger(__name__)

FOLDER = "locks"
LONGEST_WAIT_S = 1800.0  # a build may take 900 s; a suspended builder must not block everyone else


@contextlib.contextmanager
def hold(folder: Path, name: str, longest: float = LONGEST_WAIT_S) -> Iterator[float]:
    """Hold the lock ``name`` of the cache ``folder``; yields the seconds waited for it.

    Goes on without the lock after ``longest`` seconds, or if no lock can be taken: this is logged, and costs at most
    a second build.
    """
    lock, waiting_since, place = None, None, folder / FOLDER
    try:
        # Imported here: only builders need it, and it takes as long to import as a cache to open.
        from filelock import FileLock

        trust.make_private(place)
        if not _has_flock(place):
            raise OSError("its filesystem has no flock")
        wanted = FileLock(place / f"{name}.lock", mode=0o600)  # a new object each time, so that it excludes threads too
        try:
            wanted.acquire(blocking=False)
        except TimeoutError:  # filelock's own is one
            waiting_since = time.monotonic()
            wanted.acquire(timeout=longest)
        lock = wanted
    except TimeoutError:
        _warn_once(place, f"{name[:12]} is held for more than {longest:.0f} s")
    except (OSError, ImportError) as error:
        _warn_once(place, str(error))
    try:
        yield 0.0 if waiting_since is None else time.monotonic() - waiting_since
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                lock.release()


@functools.lru_cache(maxsize=100)
def _warn_once(place: Path, reason: str) -> None:
    log.warning("locks in %s: %s; continuing without, others may build the same", place, reason)


def _has_flock(folder: Path) -> bool:
    """Whether the filesystem has flock: without it, filelock's lock would outlive a killed holder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)
    finally:
        os.close(descriptor)
    return True


def remove_unused(path: Path) -> bool:
    """Remove a lock file unless somebody holds it; returns whether it was removed. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
