"""Block sizes, warps and stages of the Triton kernels: a pure function of what the device has.

Nothing here touches a GPU except ``device_limits``. Candidates are listed best first; the first whose shared memory
fits the device is taken, and the last of each list fits every card since Ampere (99 KB), so no supported call
fails for lack of a smaller block.

What decided the Hopper lists (H100 80GB HBM3, torch 2.11, Triton 3.6, bf16, causal, S=8192, 2026-11-24): two blocks of
four warps that share a multiprocessor overlap one's matrix products with the other's softmax, which Triton's
pipeline does not do within a block; at head_dim 256 only one block fits, and eight warps with a large tile win.
Other architectures have not been measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Direction = Literal["forward", "dq", "dkdv", "dk", "dv", "decode"]
# Common head_dims, which tables of options show; all up to the largest are served.
HEAD_DIMS = (64, 96, 128, 256)
# What compiles the kernels at all (it comes with torch 2.7), and what compiles them for tensor maps.
OLDEST_TRITON, TRITON_WITH_DESCRIPTORS = (3, 3), (3, 4)
# A statistic of the query rows is padded to whole blocks of so many, the largest block there is.
PADDED_ROWS = 128
# Shares that the kernel which combines those of a decoding call is compiled for.
FEW_SPLITS, MAX_SPLITS = 8, 64


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


_Candidates = dict[tuple[Direction, int], list[tuple[int, int, int, int]]]

# Compute capability 9.0 and 10.x, half precision; then _HALF.
_HOPPER: _Candidates = {
    ("forward", 64): [(64, 64, 4, 3)],
    ("forward", 128): [(64, 64, 4, 3)],
    ("forward", 256): [(128, 64, 8, 2)],
    ("dq", 64): [(64, 64, 4, 3)],
    ("dq", 128): [(64, 64, 4, 2)],
    ("dq", 256): [(64, 64, 4, 2)],
    ("dkdv", 64): [(64, 64, 4, 3)],
    ("dkdv", 128): [(64, 64, 4, 2)],
    ("dk", 256): [(64, 64, 4, 2)],
    ("dv", 256): [(64, 128, 8, 2)],
    ("decode", 256): [(16, 32, 4, 3)],
}
_HALF: _Candidates = {
    ("forward", 64): [(128, 64, 4, 2), (64, 32, 4, 2)],
    ("forward", 128): [(128, 64, 8, 2), (64, 64, 4, 1), (32, 32, 4, 1)],
    ("forward", 256): [(64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)],
    ("dq", 64): [(64, 64, 4, 2), (32, 32, 4, 1)],
    ("dq", 128): [(64, 64, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
    ("dq", 256): [(32, 32, 4, 1), (16, 16, 4, 1)],
    ("dkdv", 64): [(64, 64, 4, 2), (32, 32, 4, 1)],
    ("dkdv", 128): [(64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)],
    ("dk", 256): [(32, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
    ("dv", 256): [(32, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
    ("decode", 64): [(16, 64, 4, 3), (16, 32, 4, 1)],
    ("decode", 128): [(16, 64, 4, 3), (16, 32, 4, 2), (16, 32, 4, 1)],
    ("decode", 256): [(16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1)],
}
# Three TF32 products a dot: their operands' halves live in registers, so blocks are small.
_SINGLE: _Candidates = {
    ("forward", 64): [(64, 32, 4, 2), (32, 32, 4, 1)],
    ("forward", 128): [(64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)],
    ("forward", 256): [(16, 16, 4, 2), (16, 16, 4, 1)],
    ("dq", 64): [(64, 32, 4, 2), (32, 32, 4, 1)],
    ("dq", 128): [(16, 32, 4, 2), (16, 16, 4, 1)],
    ("dq", 256): [(16, 16, 4, 1)],
    ("dkdv", 64): [(32, 64, 4, 2), (16, 32, 4, 1)],
    ("dkdv", 128): [(32, 32, 4, 1), (16, 16, 4, 1)],
    ("dk", 256): [(16, 16, 4, 1)],
    ("dv", 256): [(16, 16, 4, 1)],
    ("decode", 64): [(16, 32, 4, 2), (16, 16, 4, 1)],
    ("decode", 128): [(16, 32, 4, 2), (16, 16, 4, 1)],
    ("decode", 256): [(16, 16, 4, 2), (16, 16, 4, 1)],
}


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed; imports nothing. The search takes 50 us, and each new kind of call asks."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """Major and minor of the Triton that is installed, (99, 0) for a build without a version; imports nothing."""
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 99, 0


@lru_cache(maxsize=64)
def device_limits(index: int) -> DeviceLimits:
    """The limits of CUDA device ``index``."""
    properties = torch.cuda.get_device_properties(index)
    return DeviceLimits(
        getattr(properties, "shared_memory_per_block_optin", 48 * 1024),
        (properties.major, properties.minor),
        properties.multi_processor_count,
    )


def padded(size: int) -> int:
    """The next power of two: Triton's tiles have such sizes only."""
    return 1 << (size - 1).bit_length()


def tile_width(head_dim: int) -> int:
    """Columns of the tiles that hold a head: those past head_dim are neither read nor written."""
    return max(64, padded(head_dim))


def splits_backward(head_dim: int) -> bool:
    """Whether dk and dv take a kernel each.

    Two float32 accumulators of 128 keys by 256 columns are the whole register file of a multiprocessor.
    """
    return tile_width(head_dim) > 128


def key_directions(head_dim: int) -> list[Direction]:
    """The kernels that give dk and dv."""
    return ["dk", "dv"] if splits_backward(head_dim) else ["dkdv"]


def padded_rows(rows: int) -> int:
    """Rows of a statistics vector: whole blocks of the largest block, so kernels read it without a mask."""
    return -(-rows // PADDED_ROWS) * PADDED_ROWS


def decode_rows(dtype: torch.dtype) -> int:
    """Query rows a decoding block may pack (query heads of a group times rows); more take the forward kernel."""
    return 16 if dtype == torch.float32 else 64


def shared_bytes(options: BlockOptions, dtype: torch.dtype, head_dim: int, direction: Direction) -> int:
    """The shared memory Triton takes for a block, from above: checked with Triton 3.6 on sm_80 and sm_90.

    The tiles that stay, the tiles that stream through the pipeline's stages, what changes from one layout to another
    (the weights and their gradients; in float32 a tile too), and 1 KB for barriers and row statistics.
    """
    block_m, block_n, _, stages = options
    itemsize = dtype.itemsize
    if direction == "decode":
        block_m = decode_rows(dtype)
    if direction in ("forward", "decode"):
        rows = block_m + 2 * block_n * stages
    elif direction == "dq":
        rows = 2 * block_m + 2 * block_n * stages
    else:
        rows = (1 if direction == "dv" else 2) * block_n + 2 * block_m * stages
    width = tile_width(head_dim)
    scratch = 2 * block_m * block_n * itemsize
    if itemsize == 4:
        scratch += max(block_m, block_n) * width * itemsize
    # A decoding block's float32 sums go through shared memory on their way out.
    sums = block_m * width * 4 if direction == "decode" else 0
    return max(rows * width * itemsize + scratch, sums) + 1024


def candidates(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, direction: Direction
) -> list[BlockOptions]:
    """The options in order of preference, whatever the device's shared memory."""
    where = (direction, tile_width(head_dim))
    if dtype == torch.float32:
        return [BlockOptions(*values) for values in _SINGLE[where]]
    hopper = _HOPPER.get(where, []) if (9, 0) <= capability < (11, 0) else []
    return [BlockOptions(*values) for values in hopper + _HALF[where]]


@lru_cache(maxsize=1024)
def choose(limits: DeviceLimits, dtype: torch.dtype, head_dim: int, direction: Direction) -> BlockOptions:
    """The first of ``candidates`` that fits the device; ValueError, naming the limit, where none does."""
    for options in candidates(limits.capability, dtype, head_dim, direction):
        if shared_bytes(options, dtype, head_dim, direction) <= limits.shared_bytes:
            return options
    raise ValueError(
        f"device: {limits.shared_bytes} bytes of shared memory a block are too few for the {direction} kernel "
        f"(head_dim {head_dim}, {dtype}), expected at least 99 KB"
    )


def variants(limits: DeviceLimits, dtype: torch.dtype, head_dim: int, direction: Direction) -> list[BlockOptions]:
    """What ``choose`` gives, then the options near it that fit the device: worth a measurement."""
    first = choose(limits, dtype, head_dim, direction)
    m, n, warps, stages = first
    listed = candidates(limits.capability, dtype, head_dim, direction)
    near = [
        *((rows, n, warps, stages) for rows in (m // 2, 2 * m)),
        *((m, keys, warps, stages) for keys in (n // 2, 2 * n)),
        *((rows, n, 12 - warps, stages) for rows in (m, 2 * m)),
        *((m, n, warps, count) for count in (stages - 1, stages + 1)),
    ]
    # A decoding block has as many rows as its call; longer blocks than PADDED_ROWS read past their statistics.
    rows = (m, m) if direction == "decode" else (16, PADDED_ROWS)
    fit = [
        one
        for one in (*listed, *(BlockOptions(*values) for values in near))
        if rows[0] <= one.block_m <= rows[1]
        and one.block_n in (16, 32, 64, 128)
        and one.stages > 0
        and shared_bytes(one, dtype, head_dim, direction) <= limits.shared_bytes
    ]
    return list(dict.fromkeys([first, *fit]))


def directions(head_dim: int, train: bool) -> list[Direction]:
    """The kernels that have options, of inference or of training too."""
    return ["forward", "decode", *(["dq", *key_directions(head_dim)] if train else [])]


def table(limits: DeviceLimits) -> list[tuple[torch.dtype, int, Direction, BlockOptions]]:
    """The options of every kernel that a device with ``limits`` can run: dtype, head_dim, direction, options."""
    rows: list[tuple[torch.dtype, int, Direction, BlockOptions]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in HEAD_DIMS:
            for direction in directions(head_dim, train=True):
                with contextlib.suppress(ValueError):  # too little shared memory for any block
                    rows.append((dtype, head_dim, direction, choose(limits, dtype, head_dim, direction)))
    return rows


def split_count(limits: DeviceLimits, programs: int, keys: int, block_n: int) -> int:
    """Shares to cut the keys of a decoding call into: about four programs a multiprocessor, four blocks each."""
    wanted = -(-4 * limits.multiprocessors // programs)
    return max(1, min(wanted, keys // (4 * block_n), MAX_SPLITS))


def most_splits(splits: int) -> int:
    """The number of shares that a kernel must be compiled for to combine ``splits`` of them."""
    return FEW_SPLITS if splits <= FEW_SPLITS else MAX_SPLITS
