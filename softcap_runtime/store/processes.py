"""Fork, exit and garbage collection: one lock for all database work of a process, and who is told of these events."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from multiprocessing import parent_process
from multiprocessing.util import Finalize, register_after_fork
from typing import Any

# Held across a fork, which must not happen in the middle of a transaction: SQLite's file locks belong to the process.
DATABASE_LOCK = threading.RLock()


# Each has three methods. ``flush``, called at exit, writes what is held in memory. ``forget_parent``, called in a
# forked child, drops the parent's connection and counts. ``close`` flushes and closes the connection.
_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()
_ABANDONED: list[Any] = []


def watch(watched: Any) -> None:
    """Tell ``watched`` of forks and exits until it is collected; close what was abandoned before."""
    while _ABANDONED:
        with contextlib.suppress(IndexError):  # another thread was faster
            _ABANDONED.pop().close()
    with DATABASE_LOCK:
        _WATCHED.add(watched)


def abandon(watched: Any) -> None:
    """Keep ``watched``, to which nobody refers any more, until the next ``watch`` closes it or the exit flushes it.

    For ``__del__``, which the garbage collector can run at any point: closing there could wait for a transaction of
    this very thread, or close a connection that is being read.
    """
    _ABANDONED.append(watched)


def _in_forked_child() -> None:
    for watched in {*_WATCHED, *_ABANDONED}:
        watched.forget_parent()
    DATABASE_LOCK.release()


def _flush_all() -> None:
    for watched in {*_WATCHED, *_ABANDONED}:
        watched.flush()


def _flush_at_end_of_child(_: object = None) -> None:
    # A multiprocessing child ends without running atexit handlers; its finalizers do run.
    Finalize(None, _flush_all, exitpriority=0)


os.register_at_fork(
    before=DATABASE_LOCK.acquire, after_in_parent=DATABASE_LOCK.release, after_in_child=_in_forked_child
)
atexit.register(_flush_all)
register_after_fork(_flush_at_end_of_child, _flush_at_end_of_child)
if parent_process() is not None:
    _flush_at_end_of_child()
