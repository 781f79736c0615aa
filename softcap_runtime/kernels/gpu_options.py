"""Block sizes, warps and stages of the Triton kernels: a pure function of what the device has.

Nothing here touches a GPU. Candidates are listed best first, by measurement where a card was at hand; the first one
whose shared memory fits the device is taken, and the last one of each list fits 48 KB, so no supported call
fails for lack of a smaller block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Direction = Literal["forward", "dq", "dkdv", "dk", "dv", "decode"]
HEAD_DIMS = (64, 96, 128, 256)


class DeviceLimits(NamedTuple):
    """What of a device decides the options: shared memory a block may have (bytes), compute capability, SMs."""

    shared_bytes: int
    capability: tuple[int, int]
    multiprocessors: int = 108


class BlockOptions(NamedTuple):
    """Query rows and keys a block holds, warps, software-pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@lru_cache(maxsize=64)
def device_limits(index: int) -> DeviceLimits:
    """The limits of CUDA device ``index``."""
    properties = torch.cuda.get_device_properties(index)
    return DeviceLimits(
        properties.shared_memory_per_block_optin,
        (properties.major, properties.minor),
        properties.multi_processor_count,
    )


def padded(head_dim: int) -> int:
    """The tile width of a head_dim: the next power of two, as Triton's tiles need."""
    return 1 << (head_dim - 1).bit_length()


def splits_backward(head_dim: int) -> bool:
    """Whether dk and dv take a kernel each.

    Two float32 accumulators of 128 keys by 256 columns are the whole register file of a multiprocessor.
    """
    return padded(head_dim) > 128


_HALF: dict[tuple[Direction, int], tuple[BlockOptions, ...]] = {
    ("forward", 64): (BlockOptions(128, 128, 8, 3), BlockOptions(128, 64, 4, 2), BlockOptions(64, 32, 4, 2)),
    ("forward", 128): (BlockOptions(64, 64, 4, 3), BlockOptions(128, 64, 8, 2), BlockOptions(64, 32, 4, 1)),
    ("forward", 256): (BlockOptions(128, 64, 8, 2), BlockOptions(64, 32, 4, 2), BlockOptions(32, 16, 4, 1)),
    ("dq", 64): (BlockOptions(128, 128, 8, 2), BlockOptions(64, 64, 4, 2), BlockOptions(32, 32, 4, 1)),
    ("dq", 128): (BlockOptions(64, 64, 4, 2), BlockOptions(64, 64, 4, 2), BlockOptions(32, 32, 4, 1)),
    ("dq", 256): (BlockOptions(64, 64, 4, 2), BlockOptions(64, 32, 4, 1), BlockOptions(16, 16, 4, 1)),
    ("dkdv", 64): (BlockOptions(64, 128, 8, 2), BlockOptions(64, 64, 4, 2), BlockOptions(32, 32, 4, 1)),
    ("dkdv", 128): (BlockOptions(64, 64, 4, 2), BlockOptions(32, 64, 4, 2), BlockOptions(32, 32, 4, 1)),
    ("dk", 256): (BlockOptions(32, 128, 8, 2), BlockOptions(32, 64, 4, 1), BlockOptions(16, 16, 4, 1)),
    ("dv", 256): (BlockOptions(64, 128, 8, 2), BlockOptions(32, 64, 4, 1), BlockOptions(16, 16, 4, 1)),
    ("decode", 64): (BlockOptions(16, 64, 4, 3), BlockOptions(16, 32, 4, 2)),
    ("decode", 128): (BlockOptions(16, 64, 4, 3), BlockOptions(16, 32, 4, 2)),
    ("decode", 256): (BlockOptions(16, 32, 4, 3), BlockOptions(16, 16, 4, 2)),
}


@lru_cache(maxsize=1024)
def choose(limits: DeviceLimits, dtype: torch.dtype, head_dim: int, direction: Direction) -> BlockOptions:
    width = padded(head_dim)
    if dtype == torch.float32:
        if direction=="decode": return BlockOptions(16,16 if width==256 else 32,4,2)
        if direction=="forward": return {64:BlockOptions(64,32,4,2),128:BlockOptions(64,32,4,2),256:BlockOptions(16,16,4,2)}[width]
        if direction=="dq": return {64:BlockOptions(64,32,4,2),128:BlockOptions(16,32,4,2),256:BlockOptions(16,16,4,1)}[width]
        return {64:BlockOptions(32,64,4,2),128:BlockOptions(16,32,4,1),256:BlockOptions(16,16,4,1)}[width]
    return _HALF[direction, width][0]


def split_count(limits: DeviceLimits, programs: int, keys: int, block_n: int) -> int:
    """Shares to cut the keys of a decoding call into: about four programs a multiprocessor, four blocks each."""
    wanted = -(-4 * limits.multiprocessors // programs)
    return max(1, min(wanted, keys // (4 * block_n), 64))
