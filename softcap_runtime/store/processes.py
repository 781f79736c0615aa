"""Fork, exit, threads, garbage: one lock for a process's database work, and who is told of forks and exits."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import Protocol

# SQLite's file locks belong to the process, and a fork must never happen in the middle of a transaction.
DATABASE_LOCK = threading.RLock()


class Watched(Protocol):
    """What is told about forks and exits."""

    def flush(self) -> None:
        """At the end of the process: write what is held in memory."""

    def forget_parent(self) -> None:
        """In a forked child: nothing of the parent's connection, locks and counts is ours."""

    def close(self) -> None:
        """Write what is held in memory and close what is open."""


_WATCHED: weakref.WeakSet[Watched] = weakref.WeakSet()
_ABANDONED: list[Watched] = []


def watch(watched: Watched) -> None:
    """Tell ``watched`` about forks and exits for as long as it lives."""
    with DATABASE_LOCK:
        _WATCHED.add(watched)


def abandon(watched: Watched) -> None:
    """Have ``watched``, whose owner is gone, closed by the next ``close_abandoned`` or at exit.

    For finalizers: the garbage collector calls them in the middle of anything. Closing there could wait for a
    transaction of this very thread, or close a connection that is being read.
    """
    _ABANDONED.append(watched)


def close_abandoned() -> None:
    """Close what was abandoned; not to be called while a database is in use."""
    while _ABANDONED:
        try:
            abandoned = _ABANDONED.pop()
        except IndexError:  # another thread was faster
            return
        abandoned.close()


def _in_forked_child() -> None:
    for watched in list(_WATCHED):
        watched.forget_parent()
    DATABASE_LOCK.release()


def _flush_all() -> None:
    for watched in list(_WATCHED):
        watched.flush()


def _flush_at_end_of_child(_: object = None) -> None:
    # A multiprocessing child ends without running atexit handlers; its finalizers do run.
    from multiprocessing.util import Finalize

    Finalize(None, _flush_all, exitpriority=0)


def _install() -> None:
    from multiprocessing import parent_process
    from multiprocessing.util import register_after_fork

    os.register_at_fork(
        before=DATABASE_LOCK.acquire, after_in_parent=DATABASE_LOCK.release, after_in_child=_in_forked_child
    )
    atexit.register(_flush_all)
    register_after_fork(_flush_at_end_of_child, _flush_at_end_of_child)
    if parent_process() is not None:
        _flush_at_end_of_child()


_install()
