"""Block tables against the dense mask and against torch's own create_block_mask."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softcap_runtime.masks import (
    BlockTables,
    RowIntervals,
    band,
    block_tables,
    count_blocks,
    dense,
    query_tables,
    row_intervals,
)

from .oracle import MaskCase, blocks_of, listed, mask_cases

LENGTHS = (1, 2, 127, 128, 129, 1000, 4096)
WINDOWS = (None, 1, 2, 127, 128, 129, 5000)


def assert_tables(intervals: RowIntervals) -> None:
    """The tables, and the transposed ones, list the blocks of the dense mask and no other."""
    partial, full = blocks_of(dense(intervals, "cpu"))
    for tables, turn in ((block_tables(intervals, "cpu"), False), (query_tables(intervals, "cpu"), True)):
        got = listed(tables.partial_num, tables.partial_idx), listed(tables.full_num, tables.full_idx)
        want = (partial.mT, full.mT) if turn else (partial, full)
        assert torch.equal(got[0], want[0]), (intervals[:4], "partial", turn)
        assert torch.equal(got[1], want[1]), (intervals[:4], "full", turn)


def storage_bytes(tables: BlockTables) -> int:
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tables}
    return sum(sizes.values())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_len", LENGTHS[:-1])
def test_bands_on_the_grid(q_len: int, causal: bool) -> None:
    for kv_len, window in itertools.product(LENGTHS[:-1], WINDOWS):
        if not causal or q_len <= kv_len:
            assert_tables(band(q_len, kv_len, causal=causal, window=window))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_bands_over_long_keys(window: int | None, causal: bool, seed: int) -> None:
    for q_len in (1, 129, 4096, random.randint(1, 4096)):
        assert_tables(band(q_len, 4096, causal=causal, window=window))


@given(q_len=st.integers(1, 700), extra=st.integers(-300, 700), window=st.integers(1, 900), causal=st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_band(q_len: int, extra: int, window: int, causal: bool) -> None:
    kv_len = max(1, q_len + (abs(extra) if causal else extra))
    assert_tables(band(q_len, kv_len, causal=causal, window=window))


def stretched(case: MaskCase, factor: int) -> MaskCase:
    """The same mask with every key ``factor`` times as long: small cases, many blocks."""

    def keys(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat_interleave(factor, 1)

    def scaled(value: Tensor | int | None) -> Tensor | int | None:
        return None if value is None else value * factor

    return {
        "q_len": case["q_len"] * factor,
        "kv_len": case["kv_len"] * factor,
        "causal": case["causal"],
        "window": scaled(case["window"]),
        "attention_mask": keys(case["attention_mask"]),
        "document_ids": keys(case["document_ids"]),
        "prefix_lengths": scaled(case["prefix_lengths"]),
        "spans": scaled(case["spans"]),
        "cache_lengths": scaled(case["cache_lengths"]),
        "query_positions": None,  # a block of rows that stand apart has gaps: the test after the next
    }


@given(case=mask_cases(max_len=12), factor=st.integers(1, 90))
@settings(max_examples=120, deadline=None)
def test_any_mask(case: MaskCase, factor: int) -> None:
    assert_tables(row_intervals(**stretched(case, factor)))


@given(data=st.data(), q_len=st.integers(1, 300), kv_len=st.integers(1, 700))
@settings(max_examples=30, deadline=None)
def test_intervals_with_gaps_miss_nothing(data: st.DataObject, q_len: int, kv_len: int) -> None:
    """Intervals of one's own may leave gaps: then blocks are listed that need not be, never too few."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    ends = torch.randint(0, kv_len + 1, (2, q_len, 2), generator=generator, dtype=torch.int32).sort(-1).values
    lo, hi = ends.unbind(-1)
    empty = lo >= hi
    intervals = RowIntervals(q_len, kv_len, None, None, lo.masked_fill(empty, kv_len), hi.masked_fill(empty, 0))
    partial, full = blocks_of(dense(intervals, "cpu"))
    tables = block_tables(intervals, "cpu")
    assert torch.equal(listed(tables.full_num, tables.full_idx), full)
    assert bool((listed(tables.partial_num, tables.partial_idx) | ~partial).all())
    turned = query_tables(intervals, "cpu")
    assert torch.equal(
        listed(turned.partial_num, turned.partial_idx), listed(tables.partial_num, tables.partial_idx).mT
    )


def test_count_blocks() -> None:
    tables = block_tables(band(1024, 1024, causal=True, window=None), "cpu")
    assert count_blocks(tables) == (28, 8, 28)
    ids = torch.arange(1024)[None] // 256
    tables = block_tables(row_intervals(1024, 1024, causal=True, window=None, document_ids=ids), "cpu")
    assert count_blocks(tables) == (52, 8, 4)


@pytest.mark.parametrize("length", [131_072, 1_048_576])
@pytest.mark.parametrize("window", [None, 4096])
def test_long_bands_are_small(length: int, window: int | None) -> None:
    made = band(length, length, causal=True, window=window)
    tables, turned = block_tables(made, "cpu"), query_tables(made, "cpu")
    assert storage_bytes(tables) + storage_bytes(turned) < 2e6
    rows = length // 128
    visible = rows * (rows + 1) // 2
    if window is not None:
        hidden = rows - window // 128 - 1
        visible -= hidden * (hidden + 1) // 2
    for each in (tables, turned):
        assert int(each.partial_num.sum() + each.full_num.sum()) == visible
