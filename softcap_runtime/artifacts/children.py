"""Child processes that compile. None of them, nor a compiler that it runs, outlives the work that wants it.

A child leads a session of its own, so that it is killed together with its compilers. A Ctrl-C in the terminal then
reaches this process alone, which kills them. In it a guard runs the command, as no compiler notices by itself that this
process is gone: killed, it could not say so.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

# ``python -c GUARD FOLDER COMMAND...`` ends as the command does; with its standard input it ends all in its process
# group, and removes the folder.
_GUARD = """
import os, shutil, signal, subprocess, sys, threading
def end_with_parent():
    while os.read(0, 1):
        pass
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=end_with_parent, daemon=True).start()
code = subprocess.call(sys.argv[2:], stdin=subprocess.DEVNULL)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Stopped(BaseException):
    """The work that wanted a child has ended: no error of a kernel, which would be kept and shown as one."""


class Children:
    """The children of one piece of work, on whichever of its threads they are wanted."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._live: dict[subprocess.Popen[str], Path] = {}
        self._pipes: set[int] = set()
        self._stopped = False
        _ALL.add(self)

    def adopt_thread(self) -> None:
        """Children that this thread asks for are these from now on."""
        _LOCAL.children = self

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float
    ) -> tuple[int, str]:
        """Run a command that works in ``folder``; its exit code (a signal's is negative) and what it wrote to standard
        error.

        So it imports nothing from the current folder, which may be anybody's. It ends when this process does, however
        it ends. Raises OSError, subprocess.TimeoutExpired, and Stopped when ``stop``
        was called.
        """
        theirs, ours = os.pipe()
        self._pipes.add(ours)
        guarded = [sys.executable, "-I", "-S", "-c", _GUARD, str(folder), *command]
        try:
            child = self._start(guarded, environment, folder, theirs)
            try:
                _, stderr = child.communicate(timeout=timeout)
            except BaseException:
                _kill(child)
                raise
            finally:
                with self._guard:
                    del self._live[child]
        finally:
            os.close(theirs)
            self._pipes.discard(ours)  # first, as its number may be another's then
            os.close(ours)
        if self._stopped:
            raise Stopped
        return child.returncode, stderr

    def stop(self) -> None:
        """Kill what runs and remove its folders; no other child starts."""
        with self._guard:
            self._stopped = True
            live = dict(self._live)
        for child in live:
            _kill(child)
        for folder in live.values():
            _remove(folder)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, stdin: int
    ) -> subprocess.Popen[str]:
        with self._guard:  # so that ``stop`` meets every child that was started
            if self._stopped:
                raise Stopped
            child = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._live[child] = folder
            return child


def current() -> Children:
    """Those of the work that this thread does, else of the process: for a call's own build, or in the background."""
    found: Children = getattr(_LOCAL, "children", _PROCESS)
    return found


def _kill(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _remove(folder: Path) -> None:
    for _ in range(20):  # a compiler that is being killed may write another file meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _stop_all() -> None:
    for each in list(_ALL):
        each.stop()


def _in_forked_child() -> None:
    """What runs is the parent's, and a lock that it held would never be released here.

    Nor may a pipe stay open here, whose end tells a child of the parent's that the parent is gone.
    """
    global _ALL, _LOCAL, _PROCESS
    for each in list(_ALL):
        for pipe in each._pipes:
            with contextlib.suppress(OSError):
                os.close(pipe)
    _ALL, _LOCAL = weakref.WeakSet(), threading.local()
    _PROCESS = Children()


_ALL: weakref.WeakSet[Children] = weakref.WeakSet()
_LOCAL = threading.local()
_PROCESS = Children()
atexit.register(_stop_all)
os.register_at_fork(after_in_child=_in_forked_child)
