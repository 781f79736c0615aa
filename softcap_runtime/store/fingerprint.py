"""What must be equal for machine code to be usable here: a flat dict of strings.

The compiler is not part of it: a serving machine may have none. Who builds an entry records the compiler as
provenance instead.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import sys
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
# What generated code depends on: the graphs, and where the numbers that they read are written.
CPU_CODE = ("kernels/graphs/**/*.py", "kernels/flex.py", "kernels/key.py", "masks/blocks.py")
# The block sizes are in a GPU kernel's key.
GPU_CODE = ("cuda/*.py", "kernels/cubin.py", "kernels/triton_*.py")
CPUINFO_BYTES = 16384  # one processor's block is 1-3 KB; the file of a 256-core machine is 400 KB


def fingerprint(device_type: str, device_index: int | None = None) -> dict[str, str]:
    """The fingerprint of this process for a device.

    ``device_type``: ``"cpu"``, ``"cuda"`` or another torch device type. ``device_index``: which of several
    (None: the current one). A device that is not there gives a fingerprint that fits no entry; never raises.
    """
    if device_type == "cpu":
        return dict(_host())
    # Code for a GPU is the same whatever the machine around it.
    return {**_around_gpus(), "gpu": _gpu(device_type, device_index)}


def fingerprints(device_type: str) -> list[dict[str, str]]:
    """The fingerprints of every device of a type; one that fits no entry where there is none."""
    import torch

    count = torch.cuda.device_count() if device_type == "cuda" else 0
    return [fingerprint(device_type, index) for index in range(count)] or [fingerprint(device_type)]


@functools.cache
def _host() -> dict[str, str]:
    import torch

    return {
        "package": _package(CPU_CODE),
        "torch": _torch(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "arch": os.uname().machine,
        "libc": _libc(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {_cpu_flags_digest()}",
    }


@functools.cache
def _around_gpus() -> dict[str, str]:
    return {"package": _package(GPU_CODE), "torch": _torch(), "triton": _version("triton")}


def _torch() -> str:
    import torch

    return f"{torch.__version__} {(torch.version.git_version or '')[:12]}".rstrip()


def _package(code: tuple[str, ...]) -> str:
    """Our version and a digest of the sources that generated code depends on."""
    digest = hashlib.sha256()
    for pattern in code:
        for name, source in _sources(pattern):
            digest.update(f"{name} {len(source)}\n".encode())
            digest.update(source)
    return f"{_version('softcap-runtime')} {digest.hexdigest()[:16]}"


def _sources(pattern: str) -> list[tuple[str, bytes]]:
    """The files of a pattern, by name.

    What was compiled from them where an image was stripped of its sources; the whole archive where the package is
    imported from a zip file.
    """
    paths = sorted(PACKAGE_ROOT.glob(pattern)) or sorted(PACKAGE_ROOT.glob(f"{pattern}c"))
    if paths:
        return [(path.relative_to(PACKAGE_ROOT).as_posix(), path.read_bytes()) for path in paths]
    return [(pattern, path.read_bytes()) for path in PACKAGE_ROOT.parents if path.is_file()]


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    except (ValueError, OSError):
        return "not glibc"


def _cpu_flags_digest() -> str:
    """A digest of the instruction sets the kernel reports; code is compiled for the machine it runs on."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            head = file.read(CPUINFO_BYTES).decode("ascii", "replace")
    except OSError:
        return "unknown"
    for line in head.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return hashlib.sha256(" ".join(sorted(value.split())).encode()).hexdigest()[:16]
    return "unknown"


def _gpu(device_type: str, device_index: int | None) -> str:
    import torch

    if device_type != "cuda" or not torch.cuda.is_available():
        return f"no {device_type} device"
    index = torch.cuda.current_device() if device_index is None else device_index
    if not 0 <= index < torch.cuda.device_count():
        return f"no {device_type} device {index}"
    major, minor = torch.cuda.get_device_capability(index)
    runtime = f"cuda {torch.version.cuda}" if torch.version.hip is None else f"hip {torch.version.hip}"
    # A newer driver runs older code, but not the reverse; the runtime version is what code is built against.
    return f"{torch.cuda.get_device_name(index)} sm_{major}{minor} {runtime}"
