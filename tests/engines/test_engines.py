"""Every engine's results against the specification in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.oracle import mask_cases, oracle
from support.helpers import (
    FORWARD_TOLERANCE,
    HEAD_DIM,
    LAYOUTS,
    UNCAPPED_HEAD_DIM,
    Case,
    Sizes,
    cases,
    dense_tolerance,
    expected,
    hf_eager,
    in_model_order,
    make_qkv,
    masks,
    relative_error,
    visible,
)
from support.rounding import logsumexp_error, output_error

from softcap_runtime import AttentionConfig, Runtime, reference
from softcap_runtime.engines.engine import Call
from softcap_runtime.masks.intervals import RowIntervals, row_intervals

PACKAGED = ["flex", "blocked", "eager"]


def check(runtime: Runtime, case: Case, dtype: torch.dtype, tolerance: float) -> None:
    check_each({runtime: tolerance}, case, dtype)


def check_each(tolerances: dict[Runtime, float], case: Case, dtype: torch.dtype) -> None:
    q, k, v = case.inputs(dtype)
    want = case.expected(q, k, v)
    blind = ~case.visible().any(-1).expand(case.sizes.batch, -1)[:, None, :, None].expand_as(q)
    for runtime, tolerance in tolerances.items():
        with torch.no_grad():
            out = runtime.attention(q, k, v, case.config, **case.masks)
        engine = runtime.settings.engine
        assert out.shape == q.shape, engine
        assert out.dtype == dtype, engine
        assert in_model_order(out), engine
        assert relative_error(out, want) <= tolerance, engine
        assert not out[blind].any(), engine


@settings(max_examples=200, deadline=None)
@given(case=mask_cases())
def test_the_definition_in_helpers_is_the_one_of_the_masks(case: dict[str, Any]) -> None:
    # Two definitions written apart, one in loops and one in tensors, so that neither is its own judge.
    if case["q_len"] > case["kv_len"] and case["query_positions"] is None:
        case = {**case, "document_ids": None, "cache_lengths": None}
    want = oracle(case)
    assert torch.equal(visible(**case).expand_as(want), want)


@settings(max_examples=180, deadline=None)
@given(case=cases())
def test_any_mask_on_any_layout(runtimes: dict[str, Runtime], case: Case) -> None:
    tolerance = FORWARD_TOLERANCE[torch.float32]
    check_each({runtimes[engine]: tolerance for engine in PACKAGED}, case, torch.float32)


@settings(max_examples=60, deadline=None)
@given(case=cases(), cap=st.floats(0.1, 1000.0))
def test_any_mask_in_half_precision(runtimes: dict[str, Runtime], case: Case, cap: float) -> None:
    # One head_dim: flex has a kernel for each, which takes half a minute to build.
    config, sizes = case.config.model_copy(update={"softcap": cap}), case.sizes._replace(head_dim=HEAD_DIM)
    case = case._replace(config=config, sizes=sizes)
    flex_, blocked, eager = (runtimes[engine] for engine in PACKAGED)
    check_each({flex_: 3e-3, blocked: 4e-3, eager: 3e-3}, case, torch.bfloat16)
    tolerance = FORWARD_TOLERANCE[torch.float16]
    check_each(dict.fromkeys((flex_, blocked, eager), tolerance), case._replace(masks={}), torch.float16)


@pytest.mark.parametrize("engine", ["blocked", "eager"])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_logsumexp(runtimes: dict[str, Runtime], engine: str, case: Case) -> None:
    q, k, v = case.inputs()
    sizes = case.sizes
    mask = row_intervals(sizes.q_len, sizes.kv_len, causal=case.config.causal, window=case.config.window, **case.masks)
    call = Call(mask, case.config.scale, case.config.softcap, engine, True)
    _, lse = runtimes[engine].forward(q, k, v, call)
    _, want = reference.attention(
        q.double(), k.double(), v.double(), case.visible(), scale=call.scale, softcap=call.softcap
    )
    assert lse is not None
    assert lse.shape == want.shape
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want))
    seen = ~torch.isneginf(want)
    error, size = (lse - want)[seen].abs(), want[seen].abs()
    # exp(lse) is what the backward divides by: a relative error of 2e-6 there is an absolute one of the lse. That
    # holds on average; one row in a million is near what a float32 sum of head_dim products may be off by.
    assert error.sum() <= (2e-6 + 2e-7 * size).sum()
    eps = sizes.head_dim * torch.finfo(torch.float32).eps / 2
    bound = logsumexp_error(q, k, case.config, case.visible(), eps)[seen]
    assert bool((error <= bound + 2e-7 * size).all())


# The dense engine compiles in the process, seconds for a new shape class: one class, many masks in it.
@settings(max_examples=60, deadline=None)
@given(data=st.data(), causal=st.booleans(), length=st.sampled_from([37, 96, 130]), seed=st.integers(0, 2**31))
def test_any_mask_on_the_dense_engine(
    runtimes: dict[str, Runtime], data: Any, causal: bool, length: int, seed: int
) -> None:
    sizes = Sizes(3, 4, 2, length - 5, length)
    config = AttentionConfig(
        softcap=data.draw(st.sampled_from([0.1, 50.0, 1000.0])),
        scale=0.125,
        window=data.draw(st.one_of(st.none(), st.integers(1, length))),
        causal=causal,
    )
    made = data.draw(masks(sizes))
    case = Case(sizes, config, made, "transposed", seed)
    check(runtimes["dense"], case, torch.float32, dense_tolerance(config))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 129), (128, 128), (129, 257), (5, 1100), (300, 2300)])
def test_lengths_at_the_edges_of_blocks(
    runtimes: dict[str, Runtime], layout: str, lengths: tuple[int, int], seed: int
) -> None:
    tolerances = {runtimes["flex"]: 2e-6, runtimes["blocked"]: 2e-6}  # the eager engine has no blocks
    for window, causal in ((None, True), (100, True), (100, False)):
        config = AttentionConfig(softcap=50.0, scale=0.125, window=window, causal=causal)
        check_each(tolerances, Case(Sizes(2, 4, 2, *lengths), config, {}, layout, seed), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_by_flex(runtimes: dict[str, Runtime], dtype: torch.dtype, seed: int) -> None:
    sizes, masks = Sizes(3, 8, 2, 1, 300), [{}]
    masks.append({"attention_mask": torch.arange(300) >= torch.tensor([[0], [299], [300]])})
    masks.append({"cache_lengths": torch.tensor([1, 300, 128])})
    for window, causal in ((None, True), (1, True), (129, True), (300, False), (1000, True)):
        config = AttentionConfig(softcap=50.0, scale=0.125, window=window, causal=causal)
        for given_masks, layout in itertools.product(masks, LAYOUTS):
            case = Case(sizes, config, given_masks, layout, seed)
            check(runtimes["flex"], case, dtype, FORWARD_TOLERANCE[dtype])
    q, k, v = make_qkv(sizes, dtype)
    # Bands that the operator's callers alone can make: nothing is seen.
    for left, right in ((0, 0), (300, 301), (-5, -1)):
        call = Call(RowIntervals(1, 300, left, right, None, None), 0.125, 50.0, "flex", False)
        assert not runtimes["flex"].forward(q, k, v, call)[0].any()


@pytest.mark.parametrize("engine", ["auto", *PACKAGED, "dense"])
def test_batch_rows_of_nothing_but_padding(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    mask = torch.tensor([[0] * 32 + [1] * 64, [0] * 96, [1] * 40 + [0] * 56])
    config = AttentionConfig(softcap=50.0, scale=0.125)
    q, k, v = make_qkv(Sizes(3, 4, 2, 91, 96))
    out = runtimes[engine].attention(q, k, v, config, mask)
    assert not out[1].any()
    assert not out[0, :, :27].any()
    assert bool(torch.isfinite(out).all())
    assert relative_error(out, expected(q, k, v, config, attention_mask=mask)) <= 2e-6


@pytest.mark.parametrize("engine", PACKAGED)
def test_a_packed_batch_gives_what_its_documents_give(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    runtime = runtimes[engine]
    lengths = [1, 100, 29, 130, 7, 1]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    q, k, v = make_qkv(Sizes(1, 4, 2, sum(lengths), sum(lengths)))
    for window in (None, 20):
        config = AttentionConfig(softcap=50.0, scale=0.125, window=window)
        packed = runtime.attention(q, k, v, config, document_ids=ids)
        alone = [
            runtime.attention(*parts, config)
            for parts in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        ]
        # Both are within 1e-6 of the exact result; sums may run in another order.
        assert relative_error(packed, torch.cat(alone, 2)) <= 2e-6


@pytest.mark.parametrize(
    ("dtype", "limits"),
    [
        (torch.float32, {"flex": 2e-6, "blocked": 5e-7, "eager": 2e-6}),
        (torch.bfloat16, {"flex": 3e-3, "blocked": 2.5e-3, "eager": 3e-3}),
        (torch.float16, {"flex": 1e-3, "blocked": 1e-3, "eager": 1e-3}),
    ],
    ids=str,
)
def test_error_figures(runtimes: dict[str, Runtime], dtype: torch.dtype, limits: dict[str, float], seed: int) -> None:
    """The stated limits, and never above eager model code on the same inputs."""
    for head_dim, factor, softcap, window in itertools.chain.from_iterable(
        ((dim, 1.0, 50.0, None), (dim, 1.0, 50.0, 200), (dim, 4.0, 30.0, None)) for dim in (64, 128, 256)
    ):
        config = AttentionConfig(softcap=softcap, scale=head_dim**-0.5, window=window)
        q, k, v = make_qkv(Sizes(1, 8, 4, 512, 512, head_dim), dtype, factor=factor)
        want = expected(q, k, v, config)
        mask = visible(512, 512, causal=True, window=window)
        theirs = relative_error(hf_eager(q, k, v, config, mask), want)
        for engine, limit in limits.items():
            if engine == "flex" and head_dim != HEAD_DIM:
                continue  # it has a kernel per head_dim, the others serve any with the same one
            error = relative_error(runtimes[engine].attention(q, k, v, config), want)
            figures = f"{engine} D{head_dim} x{factor} w{window}: {error:.2e}, eager model code {theirs:.2e}"
            # The eager engine is the same formula, its sums in another order.
            own = engine == "eager" and dtype == torch.float32
            assert error <= theirs * (1.1 if own else 1.0), figures
            if factor == 1.0:  # the limits are for inputs of unit variance
                assert error <= limit, figures


@pytest.mark.parametrize("engine", ["blocked", "eager", "flex"])
@pytest.mark.parametrize("softcap", [0.1, 1.0, 50.0, 64.0, 65.0, 1000.0, None])
def test_large_inputs(runtimes: dict[str, Runtime], engine: str, softcap: float | None, seed: int) -> None:
    """Inputs scaled by 100: logits of some 1e4 before the cap, each off by 1e-3 in float32 whoever computes it."""
    config = AttentionConfig(softcap=softcap, scale=0.125)
    head_dim = UNCAPPED_HEAD_DIM if softcap is None else HEAD_DIM
    q, k, v = make_qkv(Sizes(1, 4, 2, 200, 200, head_dim), factor=100.0)
    out = runtimes[engine].attention(q, k, v, config)
    mask = visible(200, 200, causal=True, window=None)
    eps = torch.finfo(torch.float32).eps
    bound = output_error(q, k, v, config, mask, eps, FORWARD_TOLERANCE[torch.float32]).norm()
    error = (out.double() - expected(q, k, v, config)).norm()
    print(f"{engine} {softcap}: {error / bound:.1e} of its bound")
    assert error <= bound
    assert math.isfinite(float(out.abs().max()))


def test_float64_by_the_eager_engine(runtimes: dict[str, Runtime], seed: int) -> None:
    config = AttentionConfig(softcap=50.0, scale=0.125)
    q, k, v = make_qkv(Sizes(2, 4, 2, 70, 70), torch.float64)
    for engine in ("auto", "eager"):
        out = runtimes[engine].attention(q, k, v, config)
        assert out.dtype == torch.float64
        assert relative_error(out, expected(q, k, v, config)) <= 1e-14  # some ulps of float64
