"""Child processes that compile. Neither they nor the compilers that they run outlive the work that needs them.

A child leads its own session, so that it is killed together with its compilers; a Ctrl-C in the terminal reaches only
this process, which then kills them. The child is a guard that runs the command: no compiler notices by itself that
this process is gone, and if killed, this process cannot tell it.
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

# ``python -c GUARD FOLDER COMMAND...`` runs the command and exits as it does. When its standard input ends, it removes
# the folder and kills its process group.
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
    """The work that needed a child was cancelled. No Exception: those are kept and shown as errors of a kernel."""


class Children:
    """The child processes of one piece of work, whichever of its threads starts them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._live: dict[subprocess.Popen[str], Path] = {}
        self._pipes: set[int] = set()
        self._stopped = False
        _ALL.add(self)

    def adopt_thread(self) -> None:
        """From now on, children that this thread starts belong to these."""
        _LOCAL.children = self

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float
    ) -> tuple[int, str]:
        """Run a command in ``folder``; returns its exit code (negative for a signal) and its standard error.

        ``folder`` is private, so that Python imports nothing from a current folder that others can write to. The
        command ends with this process, however that ends. Raises OSError, subprocess.TimeoutExpired (``timeout`` in
        seconds), and Stopped if ``stop`` was called.
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
            self._pipes.discard(ours)  # before closing, which frees the number for another file
            os.close(ours)
        if self._stopped:
            raise Stopped
        return child.returncode, stderr

    def stop(self) -> None:
        """Kill all children, remove their folders, and start no more."""
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
        with self._guard:  # so that ``stop`` finds every child that was started
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
    """The children of this thread's work; else those of the process, for builds by a call or in the background."""
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
    """Start anew: running children are the parent's, and a lock held at the fork would never be released here.

    Pipes must be closed here: their end tells the parent's children that the parent is gone.
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
