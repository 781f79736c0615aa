"""Masks that the CPU library reads for warm calls: the same as ``masks`` makes of them, and never a wrong one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpu.kernels import NARROW, NATIVE, Kernel, Libraries
from softcap_runtime import AttentionConfig, Runtime
from softcap_runtime.engines.blocked_cpu import FindIntervals, bind_intervals
from softcap_runtime.masks import check_mask_arguments, row_intervals
from softcap_runtime.masks.padding import has_holes

CPU = torch.device("cpu")
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8)
CONFIG = AttentionConfig(softcap=50.0, scale=0.125)


def finder(libraries: Libraries, kernel: Kernel) -> FindIntervals:
    kernels: Any = SimpleNamespace(get=lambda artifact: libraries(kernel))
    return bind_intervals(kernels)


@st.composite
def tokens(draw: st.DrawFn, batch: int, kv_len: int, kind: str) -> Tensor:
    """A padding mask or document ids, now and then one that is wrong; whole rows, or a part of longer ones."""
    rows, wide = draw(st.sampled_from([1, batch])), kv_len + draw(st.sampled_from([0, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    if kind == "ids":
        steps = torch.randint(0, draw(st.sampled_from([1, 2, 9])), (rows, wide), generator=generator)
        made = (steps == 1).cumsum(1) - draw(st.sampled_from([0, 5]))
        made = made.to(draw(st.sampled_from(INTEGERS)))
    else:
        keys, edge = torch.arange(wide), torch.randint(0, wide + 1, (2, rows, 1), generator=generator)
        made = ((keys >= edge[0] // 2) & (keys < wide - edge[1] // 2)).to(
            draw(st.sampled_from([torch.bool, *INTEGERS]))
        )
        if draw(st.booleans()):
            made = torch.ones_like(made)
    if draw(st.integers(0, 3)) == 0:
        row, key = draw(st.integers(0, rows - 1)), draw(st.integers(0, wide - 1))
        made[row, key] = draw(st.integers(0, 3))
    return made[:, :kv_len]


@pytest.mark.parametrize("kernel", [NATIVE[0], NARROW[0], NARROW[3]], ids=str)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_they_are_those_of_the_specification(libraries: Libraries, kernel: Kernel, data: st.DataObject) -> None:
    batch, kv_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    q_len = data.draw(st.one_of(st.just(kv_len), st.integers(1, 44)))
    causal, window = data.draw(st.booleans()), data.draw(st.one_of(st.none(), st.integers(1, 50)))
    kinds = data.draw(st.sampled_from([("mask",), ("ids",), ("mask", "ids")]))
    mask, ids = (data.draw(tokens(batch, kv_len, kind)) if kind in kinds else None for kind in ("mask", "ids"))
    found = finder(libraries, kernel)(batch, q_len, kv_len, causal, window, mask, ids)
    given: Any = {"attention_mask": mask, "document_ids": ids}
    try:
        check_mask_arguments(q_len, kv_len, batch, CPU, causal=causal, holes=True, **given)
    except ValueError:
        assert found is None
        return
    if mask is not None and has_holes(mask):
        assert found is None
        return
    if found is None:  # another may serve what this does not
        strides = [x.stride(1) for x in (mask, ids) if x is not None]
        assert set(strides) != {1} or (ids is not None and ids.dtype == torch.uint8)
        return
    if mask is not None and bool(mask.all()):
        given["attention_mask"] = None
    want = row_intervals(q_len, kv_len, causal=causal, window=window, **given)
    assert len(found) == len(want.vectors)
    # A mask of ones may bring rows that are all alike.
    pairs = zip(found, want.vectors, strict=True)
    assert all(torch.equal(mine, other.expand_as(mine)) for mine, other in pairs)
    assert all((x.dtype, x.is_contiguous()) == (torch.int32, True) for x in found)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.ones(2, 9, dtype=torch.int16),
        torch.ones(2, 9),
        torch.ones(3, 9, dtype=torch.int64),
        torch.ones(2, 8, dtype=torch.int64),
        torch.ones(9, dtype=torch.int64),
        torch.ones(2, 9, 1, dtype=torch.int64),
        torch.ones(9, 2, dtype=torch.int64).T,
        torch.ones(2, 9, dtype=torch.int64, device="meta"),
        torch.ones(2, 9, dtype=torch.int64).to_sparse(),
        "none",
    ],
    ids=lambda x: "none" if isinstance(x, str) else f"{x.dtype}-{tuple(x.shape)}-{x.device}-{x.layout}",
)
def test_what_it_does_not_read(libraries: Libraries, tokens: Any) -> None:
    find = finder(libraries, NATIVE[0])
    assert find(2, 9, 9, True, None, tokens, None) is None
    assert find(2, 9, 9, True, None, None, tokens) is None
    assert find(2, 9, 9, True, None, torch.ones(2, 9, dtype=torch.bool), tokens) is None


def test_bool_is_no_document_id(libraries: Libraries) -> None:
    assert finder(libraries, NATIVE[0])(1, 4, 4, True, None, None, torch.ones(1, 4, dtype=torch.bool)) is None


@pytest.mark.parametrize("train", [False, True])
def test_a_warm_call_is_as_a_cold_one(runtime: Runtime, train: bool, seed: int) -> None:
    """Of one plan after another, wrong masks among them: whatever a call before it was given."""
    q, k, v = (torch.randn(2, heads, 30, 64, requires_grad=train) for heads in (4, 2, 2))
    ids = torch.arange(30)[None] // 7
    padded, falling = torch.ones(2, 30, dtype=torch.int64), ids.flip(1)
    padded[1, :9] = 0
    holes = padded.clone()
    holes[0, 4] = 0
    good: list[dict[str, Tensor]] = [
        {},
        {"document_ids": ids},
        {"document_ids": ids.expand(2, -1) + torch.tensor([[0], [3]])},
        {"attention_mask": padded},
        {"attention_mask": padded, "document_ids": ids},
        {"attention_mask": holes},
        {"attention_mask": torch.ones(2, 30, dtype=torch.bool)},
    ]
    bad = [{"document_ids": falling}, {"attention_mask": 2 * padded}, {"attention_mask": padded[:, :29]}]
    eager = Runtime(runtime.settings.model_copy(update={"engine": "eager"}))
    for _ in range(3):
        for masks in good:
            out, want = (one.attention(q, k, v, CONFIG, **masks) for one in (runtime, eager))
            assert torch.allclose(out, want, atol=1e-5)
        for masks in bad:
            with pytest.raises(ValueError, match=next(iter(masks))):
                runtime.attention(q, k, v, CONFIG, **masks)


def test_a_mask_of_ones_is_a_band(runtime: Runtime) -> None:
    fresh = Runtime(runtime.settings)
    q, k, v = (torch.randn(2, heads, 37, 64) for heads in (4, 2, 2))
    fresh.attention(q, k, v, CONFIG)
    ((key, plan),) = fresh.plans.items()
    assert key.left is not None
    before = plan.hits
    fresh.attention(q, k, v, CONFIG, attention_mask=torch.ones(2, 37, dtype=torch.int64))
    assert plan.hits == before + 1
