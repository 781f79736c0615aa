"""``softcap_approx``: from the settings to the Triton kernels, and no further; what it costs in precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import Sizes, make_qkv
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
from softcap_runtime.cuda.triton import attention as triton_attention
from softcap_runtime.cuda.triton import gradient as triton_gradient
from softcap_runtime.cuda.triton.call import factors
from softcap_runtime.engines import blocked_cuda
from softcap_runtime.engines.engine import Problem
from softcap_runtime.masks.intervals import band

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)


@pytest.mark.parametrize("approx", [False, True])
def test_the_setting_reaches_the_problem(
    warm_cache: Path, approx: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=warm_cache, softcap_approx=approx))
    problems: list[Problem] = []
    engine = runtime.supply.engine
    monkeypatch.setattr(
        runtime.supply, "engine", lambda problem, asked: problems.append(problem) or engine(problem, asked)
    )
    q, k, v = (x.requires_grad_() for x in make_qkv(Sizes(1, 4, 2, 20, 20)))
    runtime.attention(q, k, v, CONFIG).sum().backward()
    assert [(problem.train, problem.softcap_approx) for problem in problems] == [(True, approx)]


@pytest.mark.parametrize("approx", [False, True])
def test_the_problem_reaches_both_kernels(approx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def bind(*tensors: Tensor, approx: bool, **how: Any) -> Callable[..., tuple[Tensor, ...]]:
        seen.append(approx)
        return lambda *x: x[: 2 if len(x) == 3 else 3]

    monkeypatch.setattr(triton_attention, "bind_forward", bind)
    monkeypatch.setattr(triton_gradient, "bind_backward", bind)
    mask = band(8, 8, causal=True, window=None)
    problem = Problem(torch.device("cuda"), torch.bfloat16, 1, 1, 1, 64, 0.125, 50.0, mask, True, approx)
    nothing: Any = SimpleNamespace(function=print)
    x = torch.zeros(1, 1, 8, 64)
    blocked_cuda.ENGINE.forward(problem, nothing)(x, x, x)
    blocked_cuda.ENGINE.backward(problem, nothing)(x, x, x, x, x, x)
    assert seen == [approx, approx]


def test_each_has_a_kernel_of_its_own() -> None:
    """The form is a compile-time argument, so it is part of what Triton and our launcher look a kernel up by."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        exact, approx = (factors(dtype, 0.125, 50.0, how).form for how in (False, True))
        assert exact != approx
        plain = [factors(dtype, 0.125, None, how) for how in (False, True)]
        assert plain[0] == plain[1]


def test_the_stated_error_of_a_logit() -> None:
    """An instruction off by 2**-11 of tanh, the worst that PTX allows, moves a logit by at most softcap * 5e-4."""
    x = torch.linspace(-300, 300, 10001, dtype=torch.float64)
    for softcap in (0.1, 30.0, 50.0):
        exact = softcap * torch.tanh(x / softcap)
        worst = softcap * torch.tanh(x / softcap) * (1 + 2**-11)
        assert (exact - worst).abs().max() <= softcap * 5e-4


def test_nothing_changes_on_the_cpu(runtime: Runtime, warm_cache: Path, seed: int) -> None:
    approximate = Runtime(RuntimeSettings(cache_dir=warm_cache, softcap_approx=True))
    inputs = make_qkv(Sizes(1, 4, 2, 20, 20))
    assert torch.equal(approximate.attention(*inputs, CONFIG), runtime.attention(*inputs, CONFIG))
