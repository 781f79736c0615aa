"""In what order the kernel options are preferred, on cards of 100 KB to 228 KB; no GPU needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from softcap_runtime.cuda import options as gpu_options
from softcap_runtime.cuda.options import BlockOptions, DeviceLimits, choose

SIZES = (101376, 166912, 232448)
HOPPER = DeviceLimits(232448, (9, 0), 132)
EVERY = [
    (dtype, dim, direction)
    for dtype, dim in itertools.product((torch.bfloat16, torch.float32), gpu_options.HEAD_DIMS)
    for direction in ("forward", "dq", "decode", *(("dk", "dv") if gpu_options.splits_backward(dim) else ("dkdv",)))
]


def test_a_larger_card_never_gets_a_worse_block() -> None:
    for dtype, dim, direction in EVERY:
        order = gpu_options.candidates((9, 0), dtype, dim, direction)
        places = [order.index(choose(DeviceLimits(size, (9, 0)), dtype, dim, direction)) for size in SIZES]
        assert places == sorted(places, reverse=True), (dtype, dim, direction)


def test_the_best_block_fits_an_h100() -> None:
    for dtype, dim, direction in EVERY:
        best = gpu_options.candidates((9, 0), dtype, dim, direction)[0]
        assert choose(HOPPER, dtype, dim, direction) == best
    assert choose(HOPPER, torch.bfloat16, 256, "forward") == BlockOptions(128, 64, 8, 2)


def test_what_was_measured_on_hopper_stays_there() -> None:
    """Blackwell's consumer cards and Ampere have no wgmma, which the Hopper blocks were chosen for."""
    for capability in ((8, 0), (8, 9), (12, 0)):
        for dtype, dim, direction in EVERY:
            assert gpu_options.candidates(capability, dtype, dim, direction) == gpu_options.candidates(
                (8, 0), dtype, dim, direction
            )


def test_a_card_too_small_is_named() -> None:
    with pytest.raises(ValueError, match="16384 bytes of shared memory a block are too few for the dk kernel"):
        choose(DeviceLimits(16384, (8, 9)), torch.bfloat16, 256, "dk")
