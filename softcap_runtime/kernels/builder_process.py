"""The builder as a child process: ``python -m softcap_runtime.kernels.builder_process SPEC_JSON FILE``.

It ends, and its compilers with it, when the process that wants the kernel is gone: killed, it could not say so.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import threading
from pathlib import Path


def _end_with_parent(folder: Path) -> None:
    while os.read(0, 1):  # the other end is closed when the parent ends
        pass
    shutil.rmtree(folder, ignore_errors=True)
    if os.getpgrp() == os.getpid():  # as ``children`` starts it: nobody else is in the group
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, args=(Path(sys.argv[2]).parent,), daemon=True).start()
    runpy.run_module("softcap_runtime.kernels.graphs.builder", run_name="__main__")
