"""The definition of the masks, element by element, and random masks to compare with it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from softcap_runtime.masks import BLOCK

MaskCase = dict[str, Any]


def visible_pair(case: MaskCase, b: int, i: int, j: int) -> bool:
    """Whether query row i of batch row b sees key j, straight from the words of the specification."""
    q_len, kv_len = case["q_len"], case["kv_len"]
    causal, window = case["causal"], case["window"]

    def row(name: str) -> Any:
        tensor = case[name]
        return None if tensor is None else tensor[b if tensor.shape[0] > 1 else 0].tolist()

    cache = row("cache_lengths")
    position = (kv_len if cache is None else cache) - q_len + i
    places = case["query_positions"]
    if places is not None:
        position = int(places[i] if places.dim() == 1 else places[b if places.shape[0] > 1 else 0, i])
    if cache is not None and j >= cache:
        return False
    mask = row("attention_mask")
    if mask is not None and not mask[j]:
        return False
    ids = row("document_ids")
    if ids is not None and (position < 0 or ids[position] != ids[j]):
        return False
    if window is not None and abs(position - j) >= window:
        return False
    if not causal or j <= position:
        return True
    spans = list(row("spans") or [])
    prefix = row("prefix_lengths")
    if prefix is not None:
        spans.append([0, prefix])
    return any(start <= position < end and start <= j < end for start, end in spans)


def oracle(case: MaskCase) -> Tensor:
    """bool ``[B, q_len, kv_len]``."""
    batched = {**case, "query_positions": None} if _shared_positions(case) else case
    batch = max([1] + [value.shape[0] for value in batched.values() if isinstance(value, Tensor)])
    cells = [
        [[visible_pair(case, b, i, j) for j in range(case["kv_len"])] for i in range(case["q_len"])]
        for b in range(batch)
    ]
    return torch.tensor(cells)


def _shared_positions(case: MaskCase) -> bool:
    places = case["query_positions"]
    return places is not None and places.dim() == 1


def blocks_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(partial, full) blocks of a dense mask ``[B, q_len, kv_len]``: bool ``[B, rows, cols]``."""
    batch, q_len, kv_len = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -kv_len % BLOCK, 0, -q_len % BLOCK))
    rows, cols = padded.shape[1] // BLOCK, padded.shape[2] // BLOCK
    seen = padded.view(batch, rows, BLOCK, cols, BLOCK).sum((2, 4))
    full = seen == BLOCK * BLOCK
    return (seen > 0) & ~full, full


def listed(num: Tensor, idx: Tensor) -> Tensor:
    """The blocks that one pair of tables lists: bool ``[B, rows, cols]``; a block listed twice fails."""
    assert num.dtype == idx.dtype == torch.int32
    assert num.shape == idx.shape[:3]
    assert idx.stride(-1) == 1
    batch, _, rows, cols = idx.shape
    assert int(idx.min()) >= 0
    assert int(idx.max()) < cols
    counts = torch.zeros(batch, rows, cols, dtype=torch.int32)
    entries = torch.arange(cols) < num[:, 0, :, None]
    counts.scatter_add_(-1, idx[:, 0].to(torch.int64), entries.to(torch.int32))
    assert int(counts.max()) <= 1
    return counts > 0


@st.composite
def mask_cases(draw: st.DrawFn, max_len: int = 24) -> MaskCase:
    """Arguments of ``row_intervals``: any combination of kinds, each tensor with one batch row or all."""
    kv_len = draw(st.integers(1, max_len))
    causal = draw(st.booleans())
    placed = draw(st.booleans())
    q_len = draw(st.integers(1, kv_len if causal and not placed else max_len))
    batch = draw(st.integers(1, 3))

    def rows(one_row: st.SearchStrategy[Any]) -> Tensor | None:
        count = draw(st.sampled_from([0, 0, 1, batch]))
        if not count:
            return None
        return torch.tensor([draw(one_row) for _ in range(count)])

    @st.composite
    def padding(draw: st.DrawFn) -> list[int]:
        first, last = sorted(draw(st.tuples(st.integers(0, kv_len), st.integers(0, kv_len))))
        return [int(first <= j < last) for j in range(kv_len)]

    @st.composite
    def ids(draw: st.DrawFn) -> list[int]:
        steps = draw(st.lists(st.sampled_from([0, 0, 0, 1, 7]), min_size=kv_len, max_size=kv_len))
        return [sum(steps[: j + 1]) - 3 for j in range(kv_len)]

    slots = draw(st.integers(1, 3))

    @st.composite
    def disjoint_spans(draw: st.DrawFn) -> list[list[int]]:
        cuts = sorted(draw(st.lists(st.integers(0, kv_len), min_size=2 * slots, max_size=2 * slots)))
        return draw(st.permutations([cuts[2 * n : 2 * n + 2] for n in range(slots)]))

    attention_mask = rows(padding())
    if attention_mask is not None and draw(st.booleans()):
        attention_mask = attention_mask.bool()
    query_positions = None
    if placed:
        place = st.lists(st.integers(0, kv_len - 1), min_size=q_len, max_size=q_len)
        count = draw(st.sampled_from([0, 1, batch]))
        query_positions = torch.tensor([draw(place) for _ in range(count)] if count else draw(place))
    return {
        "q_len": q_len,
        "kv_len": kv_len,
        "causal": causal,
        "window": draw(st.one_of(st.none(), st.integers(1, max_len + 2), st.just(2**40))),
        "attention_mask": attention_mask,
        "document_ids": rows(ids()),
        "prefix_lengths": rows(st.integers(0, kv_len)),
        "spans": rows(disjoint_spans()),
        "cache_lengths": rows(st.integers(min(q_len, kv_len), kv_len)),
        "query_positions": query_positions,
    }
