"""The fingerprint: what must be equal for machine code to be usable here, as a flat dict of strings.

The compiler is not part of it, as a serving machine may have none. An entry records its compiler as provenance, and
the digest of its sources in the key's fields.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import sys

CPUINFO_BYTES = 16384  # one processor's block is 1-3 KB; the file of a 256-core machine is 400 KB


def fingerprint(device_type: str, device_index: int | None = None) -> dict[str, str]:
    """The fingerprint of this process for a device.

    ``device_type``: ``"cpu"``, ``"cuda"`` or another torch device type. ``device_index``: which of several devices
    (None: the current one). A missing device has a fingerprint that fits no entry; never raises.
    """
    if device_type == "cpu":
        return dict(_host())
    # Code for a GPU is the same whatever the machine around it.
    versions = {"package": version_of("softcap-runtime"), "torch": _torch(), "triton": version_of("triton")}
    return {**versions, "gpu": _gpu(device_type, device_index)}


def fingerprints(device_type: str) -> list[dict[str, str]]:
    """The fingerprint of every device of a type; where there is none, one that fits no entry."""
    import torch

    count = torch.cuda.device_count() if device_type == "cuda" else 0
    return [fingerprint(device_type, index) for index in range(count)] or [fingerprint(device_type)]


@functools.cache
def _host() -> dict[str, str]:
    import torch

    return {
        "package": version_of("softcap-runtime"),
        "torch": _torch(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "arch": os.uname().machine,
        "libc": _libc(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {_cpu_flags_digest()}",
    }


def _torch() -> str:
    import torch

    return f"{torch.__version__} {(torch.version.git_version or '')[:12]}".rstrip()


@functools.cache
def version_of(distribution: str) -> str:
    """The installed version of a distribution; "none" if it is not installed."""
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
    """A digest of the CPU's instruction sets as Linux reports them: code is compiled for the machine it runs on."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            head = file.read(CPUINFO_BYTES).decode("ascii", "replace")
    except OSError:
        return "unknown"
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", head, re.MULTILINE)
    return "unknown" if found is None else hashlib.sha256(" ".join(sorted(found[1].split())).encode()).hexdigest()[:16]


def _gpu(device_type: str, device_index: int | None) -> str:
    import torch

    if device_type != "cuda" or not torch.cuda.is_available():
        return f"no {device_type} device"
    index = torch.cuda.current_device() if device_index is None else device_index
    if not 0 <= index < torch.cuda.device_count():
        return f"no {device_type} device {index}"
    major, minor = torch.cuda.get_device_capability(index)
    runtime = f"cuda {torch.version.cuda}" if torch.version.hip is None else f"hip {torch.version.hip}"
    # The CUDA runtime's version, not the driver's: code is built against it, and newer drivers run older code.
    return f"{torch.cuda.get_device_name(index)} sm_{major}{minor} {runtime}"
