"""A GPU that is not here, as far as torch tells of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from softcap_runtime.cuda.options import DeviceLimits, device_limits


def tell_of(limits: DeviceLimits, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let torch describe every GPU as one with ``limits``; whoever takes that back clears ``device_limits``' cache."""
    major, minor = limits.capability
    properties = SimpleNamespace(
        shared_memory_per_block_optin=limits.shared_bytes,
        major=major,
        minor=minor,
        multi_processor_count=limits.multiprocessors,
    )
    set_attribute(torch.cuda, "get_device_properties", lambda index: properties)
    device_limits.cache_clear()
