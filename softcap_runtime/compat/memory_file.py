"""Bytes as a file that a loader of shared libraries can open, without a name on any disk."""

from __future__ import annotations

import itertools
import os


class MemoryFile:
    """A file in memory with a path, gone when closed (what has been loaded from it stays mapped)."""

    _counter = itertools.count(1)

    def __init__(self, data: bytes) -> None:
        self._fd = os.memfd_create("softcap_kernel", os.MFD_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.close(self._fd)
            raise

    def __enter__(self) -> str:
        # The loader takes a library whose path it has seen for the one it has, and descriptors are reused: spell
        # each path in its own way, a "./" for every 1 in the binary digits of a counter.
        digits = f"{next(self._counter):b}"
        return f"/proc/self/{''.join('./' if digit == '1' else '/' for digit in digits)}fd/{self._fd}"

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)
