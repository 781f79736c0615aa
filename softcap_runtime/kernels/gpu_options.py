"""Block sizes, warps and stages of the Triton kernels: a pure function of what the device has.

Nothing here touches a GPU. Candidates are listed best first, by measurement where a card was at hand; the first one
whose shared memory fits the device is taken, and the last one of each list fits a card of 100 KB.
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
        getattr(properties, "shared_memory_per_block_optin", 48 * 1024),
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


Candidates = dict[tuple[Direction, int], tuple[BlockOptions, ...]]

# bfloat16 and float16, by direction and padded head_dim. The first of each list was the fastest on an H100.
_HALF: Candidates = {
    ("forward", 64): (BlockOptions(128, 128, 8, 3), BlockOptions(128, 64, 4, 2), BlockOptions(64, 32, 4, 2)),
    ("forward", 128): (BlockOptions(64, 64, 4, 3), BlockOptions(128, 64, 8, 2), BlockOptions(64, 32, 4, 1)),
    ("forward", 256): (BlockOptions(128, 64, 8, 2), BlockOptions(64, 32, 4, 2), BlockOptions(32, 16, 4, 1)),
    ("dq", 64): (BlockOptions(128, 128, 8, 2), BlockOptions(64, 64, 4, 2), BlockOptions(32, 32, 4, 1)),
    ("dq", 128): (BlockOptions(64, 64, 4, 2), BlockOptions(64, 32, 4, 1), BlockOptions(32, 32, 4, 1)),
    ("dq", 256): (BlockOptions(64, 64, 4, 2), BlockOptions(64, 32, 4, 1), BlockOptions(16, 16, 4, 1)),
    ("dkdv", 64): (BlockOptions(64, 128, 8, 2), BlockOptions(64, 64, 4, 2), BlockOptions(32, 32, 4, 1)),
    ("dkdv", 128): (BlockOptions(64, 64, 4, 2), BlockOptions(32, 64, 4, 2), BlockOptions(32, 32, 4, 1)),
    ("dk", 256): (BlockOptions(32, 128, 8, 2), BlockOptions(32, 64, 4, 1), BlockOptions(16, 16, 4, 1)),
    ("dv", 256): (BlockOptions(64, 128, 8, 2), BlockOptions(32, 64, 4, 1), BlockOptions(16, 16, 4, 1)),
    ("decode", 64): (BlockOptions(16, 64, 4, 3), BlockOptions(16, 32, 4, 2)),
    ("decode", 128): (BlockOptions(16, 64, 4, 3), BlockOptions(16, 32, 4, 1)),
    ("decode", 256): (BlockOptions(16, 32, 4, 3), BlockOptions(16, 16, 4, 1)),
}
_FLOAT: Candidates = {
    ("forward", 64): (BlockOptions(64, 32, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("forward", 128): (BlockOptions(64, 32, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("forward", 256): (BlockOptions(16, 16, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("dq", 64): (BlockOptions(64, 32, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("dq", 128): (BlockOptions(16, 32, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("dq", 256): (BlockOptions(16, 16, 4, 1),),
    ("dkdv", 64): (BlockOptions(32, 64, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("dkdv", 128): (BlockOptions(16, 32, 4, 1), BlockOptions(16, 16, 4, 1)),
    ("dk", 256): (BlockOptions(16, 16, 4, 1),),
    ("dv", 256): (BlockOptions(16, 16, 4, 1),),
    ("decode", 64): (BlockOptions(16, 32, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("decode", 128): (BlockOptions(16, 32, 4, 2), BlockOptions(16, 16, 4, 1)),
    ("decode", 256): (BlockOptions(16, 16, 4, 2), BlockOptions(16, 16, 4, 1)),
}
# Tiles of a block that stay, counted in query rows and in keys, and those that each pipeline stage holds.
_KEPT = {"forward": (1, 0), "decode": (1, 0), "dq": (2, 0), "dkdv": (0, 2), "dk": (0, 2), "dv": (0, 1)}
_STAGED = {"forward": (0, 2), "decode": (0, 2), "dq": (0, 2), "dkdv": (2, 0), "dk": (2, 0), "dv": (2, 0)}


def shared_bytes(options: BlockOptions, dtype: torch.dtype, head_dim: int, direction: Direction) -> int:
    """Shared memory of a program, as far as its tiles tell; Triton adds a little of its own."""
    rows = (options.block_m, options.block_n)
    kept = sum(tiles * size for tiles, size in zip(_KEPT[direction], rows, strict=True))
    staged = sum(tiles * size for tiles, size in zip(_STAGED[direction], rows, strict=True))
    return (kept + options.stages * staged) * padded(head_dim) * dtype.itemsize


@lru_cache(maxsize=1024)
def choose(limits: DeviceLimits, dtype: torch.dtype, head_dim: int, direction: Direction) -> BlockOptions:
    """The first candidate whose shared memory fits the device; the smallest where none does."""
    candidates = (_FLOAT if dtype == torch.float32 else _HALF)[direction, padded(head_dim)]
    for options in candidates:
        if shared_bytes(options, dtype, head_dim, direction) <= 0.95 * limits.shared_bytes:
            return options
    return candidates[-1]


def split_count(limits: DeviceLimits, programs: int, keys: int, block_n: int) -> int:
    """Shares to cut the keys of a decoding call into: about four programs a multiprocessor, four blocks each."""
    wanted = -(-4 * limits.multiprocessors // programs)
    return max(1, min(wanted, keys // (4 * block_n), 64))
