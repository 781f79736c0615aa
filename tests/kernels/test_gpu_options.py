"""Kernel options as a pure function of the device's limits; no GPU needed."""

from __future__ import annotations

import pytest
import torch

from softcap_runtime.kernels.gpu_options import (
    DeviceLimits,
    choose,
    padded,
    shared_bytes,
    split_count,
    splits_backward,
)

CARDS = {
    "100 KB": DeviceLimits(99 * 1024, (8, 9), 128),
    "164 KB": DeviceLimits(163 * 1024, (8, 0), 108),
    "228 KB": DeviceLimits(227 * 1024, (9, 0), 132),
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_block_fits_every_card(card: str, dtype: torch.dtype, head_dim: int) -> None:
    limits = CARDS[card]
    directions = ["forward", "dq", "decode", *(("dk", "dv") if splits_backward(head_dim) else ("dkdv",))]
    for direction in directions:
        options = choose(limits, dtype, head_dim, direction)  # type: ignore[arg-type]
        used = shared_bytes(options, dtype, head_dim, direction)  # type: ignore[arg-type]
        assert used <= limits.shared_bytes, (direction, options, used)
        assert padded(options.block_m) == options.block_m >= 16
        assert padded(options.block_n) == options.block_n >= 16


def test_a_larger_card_gets_a_larger_block() -> None:
    small = choose(CARDS["100 KB"], torch.bfloat16, 256, "forward")
    large = choose(CARDS["228 KB"], torch.bfloat16, 256, "forward")
    assert large.block_m * large.block_n > small.block_m * small.block_n


def test_decoding_splits_the_keys_until_the_card_is_full() -> None:
    limits = CARDS["228 KB"]
    assert split_count(limits, programs=1000, keys=8192, block_n=64) == 1
    assert split_count(limits, programs=8, keys=8192, block_n=64) > 8
    assert split_count(limits, programs=8, keys=64, block_n=64) == 1
