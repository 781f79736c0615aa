"""The digest of an artifact's source files, which is a part of its key; each artifact names its own files."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from softcap_runtime.errors import SoftcapRuntimeError

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def digest(*names: str) -> str:
    """16 hex digits over the contents of package files, named by their path below the package (``cpu/kernel.cpp``).

    If an image was stripped of a Python source, its compiled file counts instead; if the package is imported from a
    zip file, the whole archive. Raises SoftcapRuntimeError for a missing file.
    """
    found = hashlib.sha256()
    for name in names:
        content = _content(name)
        found.update(f"{name} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()[:16]


def _content(name: str) -> bytes:
    archives = [path for path in ROOT.parents if path.is_file()]
    compiled = [ROOT / f"{name}c"] if name.endswith(".py") else []
    for path in (ROOT / name, *compiled, *archives):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise SoftcapRuntimeError(f"source {name} of a kernel is missing from {ROOT}; install softcap-runtime anew")
