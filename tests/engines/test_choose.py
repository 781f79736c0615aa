"""Which engine serves a call: the rule, and that prewarming covers whatever it may pick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import NEEDS_FLEX

from softcap_runtime import AttentionConfig, EngineUnavailable, PrewarmRequest, Runtime, RuntimeSettings
from softcap_runtime.compat import torch_features
from softcap_runtime.engines import blocked_cpu as blocked
from softcap_runtime.engines import choose as rules
from softcap_runtime.engines import flex_cpu as flex
from softcap_runtime.engines.choose import choose
from softcap_runtime.engines.engine import Problem
from softcap_runtime.engines.spec import dtype_name
from softcap_runtime.masks.intervals import RowIntervals, band
from softcap_runtime.prewarm.prewarm import artifacts_of
from softcap_runtime.supply import Supply

CPU = torch.device("cpu")
SUPPLY = Supply(RuntimeSettings(cache_dir="not made"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv_len = draw(st.integers(1, 10_000))
    q_len = draw(st.one_of(st.just(1), st.just(kv_len), st.integers(1, kv_len)))
    mask = band(q_len, kv_len, causal=draw(st.booleans()), window=draw(st.none() | st.integers(1, 5000)))
    if draw(st.booleans()):
        row = torch.zeros(1, 1, dtype=torch.int32).expand(1, q_len)
        mask = RowIntervals(q_len, kv_len, None, None, row, row)
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return Problem(
        CPU,
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 64)),
        kv_heads * draw(st.sampled_from([1, 2, 8])),
        kv_heads,
        draw(st.sampled_from([64, 128, 256])),
        0.1,
        draw(st.sampled_from([None, 0.5, 50.0, 64.5, 1000.0])),
        mask,
        draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_prewarming_covers_whatever_auto_picks(problem: Problem) -> None:
    choice = choose(problem, "auto")
    assert choice.engine.refuses(problem) is None
    assert choice.engine.name == "blocked"
    assert choice.reason
    request = PrewarmRequest(
        config=AttentionConfig(softcap=problem.softcap, scale=problem.scale),
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        dtype=dtype_name(problem.dtype),
        train=problem.train,
    )
    assert set(choice.engine.artifacts(problem, SUPPLY.kernels(problem))) <= set(artifacts_of(SUPPLY, request))


@settings(max_examples=100, deadline=None)
@given(problem=problems(), other=problems())
def test_kernels_do_not_depend_on_sizes(problem: Problem, other: Problem) -> None:
    same = other._replace(dtype=problem.dtype, softcap=problem.softcap, train=problem.train, head_dim=problem.head_dim)
    same_kind = (same.mask.lo is None) == (problem.mask.lo is None)
    for name in ("flex", "blocked", "dense", "eager"):
        engine = rules.engine_named(name, CPU)
        if engine.refuses(problem) is None and (same_kind or name != "flex"):
            assert engine.artifacts(problem, SUPPLY.kernels(problem)) == engine.artifacts(same, SUPPLY.kernels(same))


def test_who_refuses_what() -> None:
    row = torch.zeros(1, 8, dtype=torch.int32)
    base = Problem(CPU, torch.float32, 1, 2, 1, 64, 0.1, 50.0, RowIntervals(8, 8, None, None, row, row), False)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("flex", {"train": True}, "no backward"),
        ("flex", {"dtype": torch.float64}, "torch.float64"),
        ("blocked", {"dtype": torch.float64}, "torch.float64"),
        ("dense", {"dtype": torch.float64}, "torch.float64"),
    ]
    for name, change, words in cases:
        assert choose(base, name).engine.name == name
        with pytest.raises(EngineUnavailable, match=words) as raised:
            choose(base._replace(**change), name)
        assert f"'{name}'" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert choose(base._replace(dtype=torch.float64), "eager").engine.name == "eager"
    assert choose(base._replace(dtype=torch.float64), "auto").engine.name == "eager"


@NEEDS_FLEX
def test_short_heads_without_avx512_are_not_for_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = band(40, 40, causal=True, window=None)
    for capability, head_dim, served in (("AVX2", 16, False), ("AVX2", 24, True), ("AVX512", 16, True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        problem = Problem(CPU, torch.float32, 1, 2, 1, head_dim, 0.1, 50.0, mask, False)
        assert (rules.engine_named("flex", CPU).refuses(problem) is None) == served
        if not served:
            with pytest.raises(EngineUnavailable, match="head_dim: 16, torch's product for heads below 24"):
                choose(problem, "flex")
            assert choose(problem, "auto").engine.name == "blocked"


@pytest.mark.parametrize("train", [False, True])
def test_a_torch_without_packages_has_the_library(monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    monkeypatch.setattr(torch_features, "FLEX_PACKAGES", False)
    problem = Problem(CPU, torch.float32, 1, 2, 1, 64, 0.1, 50.0, band(8, 8, causal=True, window=None), train)
    assert choose(problem, "auto").engine.name == "blocked"


def test_what_no_kernel_serves_falls_to_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the refusals of all kernels as its reason."""
    for module in (blocked, flex):
        refusing = module.ENGINE._replace(refuses=lambda problem, name=module.ENGINE.name: f"not for {name}")
        monkeypatch.setattr(module, "ENGINE", refusing)
    mask = band(8, 8, causal=True, window=None)
    choice = choose(Problem(CPU, torch.float32, 1, 2, 1, 64, 0.1, 50.0, mask, False), "auto")
    assert (choice.engine.name, choice.reason) == ("dense", "not for blocked; not for flex")


def test_stats_tell_engines_and_reasons(runtime: Runtime, seed: int) -> None:
    fresh = Runtime(RuntimeSettings(cache_dir=runtime.settings.cache_dir))
    config = AttentionConfig(softcap=50.0, scale=0.125)
    for length in (8, 8, 16):
        fresh.attention(*torch.randn(3, 1, 2, length, 64), config)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 8, 64))
    fresh.attention(q, k, v, config)
    fresh.attention(*torch.randn(3, 1, 2, 8, 64, dtype=torch.float64), config)
    rows = {row.engine: row for row in fresh.stats().engines}
    assert {name: row.plans for name, row in rows.items()} == {"blocked": 3, "eager": 1}
    assert all(row.reason for row in rows.values())
    (kernel,) = fresh.stats().kernels
    assert (kernel.op, kernel.dtype, kernel.plans) == ("attention", "", 3)
