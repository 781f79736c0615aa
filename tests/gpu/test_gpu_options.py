"""The kernel options for cards of 100 KB to 228 KB of shared memory; no GPU needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from softcap_runtime.kernels import gpu_options
from softcap_runtime.kernels.gpu_options import BlockOptions, DeviceLimits, choose

CARDS = {
    "99 KB (RTX 3090, 4090)": DeviceLimits(101376, (8, 9), 128),
    "99 KB (RTX 5090)": DeviceLimits(101376, (12, 0), 170),
    "163 KB (A100)": DeviceLimits(166912, (8, 0), 108),
    "227 KB (H100, H200)": DeviceLimits(232448, (9, 0), 132),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERY = [
    (dtype, dim, direction)
    for dtype, dim in itertools.product(DTYPES, gpu_options.HEAD_DIMS)
    for direction in (
        "forward",
        "dq",
        "decode",
        *(("dk", "dv") if gpu_options.splits_backward(dim) else ("dkdv",)),
    )
]


@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_fits_every_card(card: str) -> None:
    limits = CARDS[card]
    for dtype, dim, direction in EVERY:
        options = choose(limits, dtype, dim, direction)
        assert gpu_options.shared_bytes(options, direction, dim, dtype.itemsize) <= limits.shared_bytes
        assert all(size & (size - 1) == 0 for size in options[:3]), options
        assert options.block_m >= 16 <= options.block_n, "tl.dot needs 16 by 16"


def test_a_larger_card_never_gets_smaller_blocks() -> None:
    for dtype, dim, direction in EVERY:
        order = gpu_options.candidates((9, 0), dtype, dim, direction)
        places = [
            order.index(choose(DeviceLimits(size, (9, 0)), dtype, dim, direction))
            for size in (101376, 166912, 232448)
        ]
        assert places == sorted(places, reverse=True)


def test_head_dim_256_on_a_100_kb_card_takes_a_smaller_block() -> None:
    small, large = CARDS["99 KB (RTX 3090, 4090)"], CARDS["227 KB (H100, H200)"]
    for direction in ("forward", "dq", "dk", "dv"):
        assert choose(small, torch.bfloat16, 256, direction) != choose(large, torch.bfloat16, 256, direction)


def test_the_measured_options_of_an_h100() -> None:
    limits = CARDS["227 KB (H100, H200)"]
    assert choose(limits, torch.bfloat16, 256, "forward") == BlockOptions(128, 64, 8, 2)
    assert choose(limits, torch.bfloat16, 128, "dkdv") == BlockOptions(64, 64, 4, 2)
    assert choose(limits, torch.bfloat16, 96, "dq") == choose(limits, torch.bfloat16, 128, "dq")


def test_a_card_too_small_is_named() -> None:
    with pytest.raises(
        ValueError, match="16384 bytes of shared memory a block are too few for the dk kernel"
    ):
        choose(DeviceLimits(16384, (8, 9)), torch.bfloat16, 256, "dk")


@pytest.mark.parametrize(
    ("programs", "keys", "splits"), [(256, 8192, 3), (8, 8192, 64), (2048, 8192, 1), (1, 100, 1)]
)
def test_shares_of_a_decoding_call(programs: int, keys: int, splits: int) -> None:
    assert gpu_options.split_count(CARDS["227 KB (H100, H200)"], programs, keys, 32) == splits
