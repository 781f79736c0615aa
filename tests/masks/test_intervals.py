"""Row intervals against the definition of the masks, element by element."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from softcap_runtime.masks import UNBOUNDED, RowIntervals, band, dense, row_intervals

from .oracle import MaskCase, mask_cases, oracle


@given(case=mask_cases())
@settings(max_examples=400, deadline=None)
def test_intervals_are_the_definition(case: MaskCase) -> None:
    intervals = row_intervals(**case)
    expected = oracle(case)
    assert torch.equal(dense(intervals, "cpu").expand_as(expected), expected)
    if intervals.lo is not None and intervals.hi is not None:
        lo, hi, kv_len = intervals.lo, intervals.hi, case["kv_len"]
        assert lo.dtype == hi.dtype == torch.int32
        assert lo.is_contiguous()
        assert hi.is_contiguous()
        seen = lo < hi
        assert bool((((lo >= 0) & (hi <= kv_len)) | ~seen).all())
        assert bool((seen | ((lo == kv_len) & (hi == 0))).all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 127, 2**40])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 9), (9, 9), (4, 130), (130, 130)])
def test_band_is_the_definition(q_len: int, kv_len: int, window: int | None, causal: bool) -> None:
    made = band(q_len, kv_len, causal=causal, window=window)
    position = torch.arange(q_len)[:, None] + (kv_len - q_len)
    distance = position - torch.arange(kv_len)
    expected = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        expected &= distance >= 0
    if window is not None:
        expected &= distance.abs() < window
    assert torch.equal(dense(made, "cpu")[0], expected)
    assert -UNBOUNDED <= made.left <= UNBOUNDED  # type: ignore[operator]
    assert -UNBOUNDED <= made.right <= UNBOUNDED  # type: ignore[operator]


def test_no_tensor_gives_the_band() -> None:
    made = row_intervals(5, 9, causal=True, window=3)
    assert made == band(5, 9, causal=True, window=3)
    assert made == RowIntervals(5, 9, 2, 5, None, None)


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_windows_that_can_not_be_are_refused(window: Any, error: type[Exception]) -> None:
    for mask in (None, torch.ones(1, 4, dtype=torch.bool)):
        with pytest.raises(error, match=f"^window: {window}, expected an integer of at least 1$"):
            row_intervals(4, 4, causal=True, window=window, attention_mask=mask)
    assert row_intervals(4, 4, causal=True) == row_intervals(4, 4, causal=True, window=None)


def test_empty_rows_have_one_form(seed: int) -> None:
    mask = torch.zeros(2, 6, dtype=torch.int64)
    mask[1, 3:] = 1
    made = row_intervals(6, 6, causal=True, window=None, attention_mask=mask)
    assert made.lo is not None
    assert made.hi is not None
    assert made.lo.tolist() == [[6] * 6, [6, 6, 6, 3, 3, 3]]
    assert made.hi.tolist() == [[0] * 6, [0, 0, 0, 4, 5, 6]]


def test_gemma3_window_bounds_spans_both_ways() -> None:
    """The window is multiplied onto the causal-or-span mask: it cuts the forward half of a long span too."""
    spans = torch.tensor([[[2, 9]]])
    seen = dense(row_intervals(10, 10, causal=True, window=3, spans=spans), "cpu")[0]
    assert seen[4].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]
    assert seen[9].nonzero()[:, 0].tolist() == [7, 8, 9]


def test_packed_rows_are_the_documents_one_by_one(seed: int) -> None:
    lengths = torch.randint(1, 40, (6,)).tolist()
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))[None]
    packed = dense(row_intervals(ids.shape[1], ids.shape[1], causal=True, window=9, document_ids=ids), "cpu")
    alone = [dense(band(n, n, causal=True, window=9), "cpu")[0] for n in lengths]
    assert torch.equal(packed[0], torch.block_diag(*alone).bool())


def test_needs_no_data(seed: int) -> None:
    """Fake tensors have none: any step that depends on data would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = row_intervals(
            16,
            32,
            causal=True,
            window=5,
            attention_mask=torch.ones(3, 32, dtype=torch.int64),
            document_ids=torch.zeros(1, 32, dtype=torch.int64),
            prefix_lengths=torch.ones(3, dtype=torch.int64),
            spans=torch.zeros(3, 2, 2, dtype=torch.int64),
            cache_lengths=torch.full((3,), 20),
        )
    assert made.lo is not None
    assert made.lo.shape == (3, 16)


UNCHECKED = {
    "prefix_lengths": ([[9], [-3]], [[4], [0]]),
    "spans": ([[[[2, 9]]], [[[3, 1]]], [[[-2, 2]]]], [[[[2, 4]]], [[[0, 0]]], [[[0, 2]]]]),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_what_nobody_checks_is_cut_to_the_keys(name: str) -> None:
    """As docs/reference/masks.md says of GPUs, where the contents of arguments aren't looked at."""
    for pair in zip(*UNCHECKED[name], strict=True):
        found, wanted = (row_intervals(4, 4, causal=True, window=None, **{name: torch.tensor(x)}) for x in pair)
        assert torch.equal(dense(found, "cpu"), dense(wanted, "cpu"))


@pytest.mark.parametrize(
    ("name", "values", "seen"),
    [
        ("cache_lengths", [6], [[0, 4], [0, 4]]),
        ("cache_lengths", [1], [[4, 0], [0, 1]]),
        ("query_positions", [-1, 7], [[4, 0], [0, 4]]),
    ],
)
def test_rows_that_stand_beside_the_keys(name: str, values: list[int], seen: list[list[int]]) -> None:
    found = row_intervals(2, 4, causal=True, window=None, **{name: torch.tensor(values)})
    assert torch.stack(found.vectors, -1)[0].tolist() == seen


def test_nothing_that_is_in_an_argument_leads_out_of_the_keys(seed: int) -> None:
    for _ in range(200):
        rows, keys = random.randint(1, 9), random.randint(9, 20)
        shapes = {
            "attention_mask": (2, keys),
            "document_ids": (2, keys),
            "prefix_lengths": (2,),
            "spans": (2, 3, 2),
            "cache_lengths": (2,),
            "query_positions": (2, rows),
        }
        chosen = random.sample(list(shapes), random.randint(1, 6))
        masks = {name: torch.randint(-30, 30, shapes[name]) for name in chosen}
        window = random.choice([None, 3])
        found = row_intervals(rows, keys, causal=random.random() < 0.7, window=window, **masks)
        lo, hi = found.vectors[:2]
        assert bool(((lo >= 0) & (lo <= keys) & (hi >= 0) & (hi <= keys)).all())
