"""Ctrl-C and SIGTERM for a command line: both end its work as KeyboardInterrupt does, children included."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn


def interrupted_by(*signals: signal.Signals) -> list[int]:
    """Make the first of ``signals`` raise KeyboardInterrupt, and append it to the list that is returned.

    Later ones are ignored, as the clean-up is under way. A signal that this process was started to ignore stays
    ignored.
    """
    caught: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        if not caught:
            caught.append(number)
            raise KeyboardInterrupt

    for one in signals:
        if signal.getsignal(one) != signal.SIG_IGN:
            signal.signal(one, interrupt)
    return caught


def leave(number: int) -> NoReturn:
    """End the process with the exit code that shells expect after signal ``number``.

    Not with ``sys.exit``, which would wait for a thread that waits for another process's build.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(128 + number)
