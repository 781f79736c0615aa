"""Fork, exit, garbage collection: one lock for a process's database work, and who is told of forks and exits."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from multiprocessing import parent_process
from multiprocessing.util import Finalize, register_after_fork
from typing import Any

# SQLite's file locks belong to the process, and a fork must never happen in the middle of a transaction.
DATABASE_LOCK = threading.RLock()


# Each has ``flush``, at the end of the process: write what is held in memory; ``forget_parent``, in a forked child:
# nothing of the parent's connection, locks and counts is its own; and ``close``: flush, and close what is open.
_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()
_ABANDONED: list[Any] = []


def watch(watched: Any) -> None:
    """Tell ``watched`` about forks and exits until it is collected; close what was abandoned before."""
    while _ABANDONED:
        with contextlib.suppress(IndexError):  # another thread was faster
            _ABANDONED.pop().close()
    with DATABASE_LOCK:
        _WATCHED.add(watched)


def abandon(watched: Any) -> None:
    """Keep ``watched``, which nobody refers to any more, until the next ``watch`` closes it or the exit flushes it.

    For ``__del__``: the garbage collector runs it in the middle of anything. Closing there could wait for a
    transaction of this very thread, or close a connection that is being read.
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
