"""Our BlockMask against the one that torch evaluates element by element."""

from __future__ import annotations

import random

import pytest
import torch

from softcap_runtime.compat import torch_features
from softcap_runtime.masks import RowIntervals, band, block_mask, dense, form_of, intervals_of, row_intervals

from .oracle import listed

flex = pytest.importorskip("torch.nn.attention.flex_attention")


def assert_same_as_torch(intervals: RowIntervals) -> None:
    if not torch_features.MASK_LENGTHS and (intervals.q_len % 128 or intervals.kv_len % 128):
        pytest.skip("this torch's masks are of whole blocks")
    ours = block_mask(intervals, "cpu")
    batch = ours.kv_num_blocks.shape[0]
    theirs = flex.create_block_mask(ours.mask_mod, batch, None, intervals.q_len, intervals.kv_len, device="cpu")
    assert ours.shape == theirs.shape
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for num, idx in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        mine = listed(getattr(ours, num), getattr(ours, idx))
        # A copy: before torch 2.7 a row of one column may have any stride.
        columns = getattr(theirs, idx).clone(memory_format=torch.contiguous_format)
        assert torch.equal(mine, listed(getattr(theirs, num), columns)), (num, intervals[:4])
    elements = flex.create_mask(ours.mask_mod, batch, None, intervals.q_len, intervals.kv_len, device="cpu")
    assert torch.equal(elements[:, 0], dense(intervals, "cpu"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 127, 128, 129, 5000])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 1000])
def test_bands(length: int, window: int | None, causal: bool, seed: int) -> None:
    for offset in (0, 128, random.randint(1, 300)):
        assert_same_as_torch(band(length, length + offset, causal=causal, window=window))


@pytest.mark.parametrize("window", [None, 1000])
def test_long_bands(window: int | None) -> None:
    assert_same_as_torch(band(4096, 4096, causal=True, window=window))


@pytest.mark.parametrize("batch", [1, 3])
def test_padding_and_documents(batch: int, seed: int) -> None:
    length = random.randint(200, 700)
    mask = torch.zeros(batch, length, dtype=torch.int64)
    for row in mask:
        first, last = sorted(random.sample(range(length + 1), 2))
        row[first:last] = 1
    ids = (torch.rand(batch, length) < 0.01).cumsum(1)
    for window in (None, random.randint(1, length)):
        assert_same_as_torch(
            row_intervals(length, length, causal=True, window=window, attention_mask=mask, document_ids=ids)
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 4096])
def test_form_survives_copies(window: int | None, causal: bool) -> None:
    made = band(256, 512, causal=causal, window=window)
    mask = block_mask(made, "cpu")
    assert form_of(mask) == (causal, window)
    assert form_of(mask.to("cpu")) == (causal, window)
    assert intervals_of(mask) == made


def test_form_of_other_masks() -> None:
    mask = torch.ones(1, 130, dtype=torch.bool)
    made = row_intervals(130, 130, causal=True, window=None, attention_mask=mask)
    assert form_of(block_mask(made, "cpu")) is None
    assert intervals_of(block_mask(made, "cpu")) is made
    theirs = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 130, 130, device="cpu")
    assert form_of(theirs) is None
    assert intervals_of(theirs) is None
