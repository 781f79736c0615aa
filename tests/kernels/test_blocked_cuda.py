"""The engine around the Triton kernels, with the specification in their place: what a CPU can prove of it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Sizes, expected, gradients, in_model_order, make_qkv, relative_error, visible
from torch import Tensor

from softcap_runtime import AttentionConfig, reference
from softcap_runtime.kernels import blocked_cuda, triton_attention, triton_gradient
from softcap_runtime.kernels.engine import Problem
from softcap_runtime.kernels.gpu_options import triton_version
from softcap_runtime.masks.intervals import band

CONFIG = AttentionConfig(softcap=50.0, scale=0.2, window=9)


def kernel(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    assert {x.shape[-1] for x in (q, k, v)} <= set(blocked_cuda.HEAD_DIMS)
    mask = visible(q.shape[2], k.shape[2], causal=True, window=CONFIG.window)
    return reference.attention(q, k, v, mask, scale=how["scale"], softcap=how["softcap"])


def backward_kernel(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **how: Any
) -> Any:
    assert torch.equal(out, kernel(q, k, v, **how)[0])
    return gradients(lambda *x: kernel(*x, **how)[0], (q, k, v), grad_out)[1]


@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 96, 100, 128, 192, 256])
def test_a_head_dim_between_those_of_the_kernels(
    head_dim: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "bind_forward", lambda *x, **how: partial(kernel, **how))
    monkeypatch.setattr(triton_gradient, "bind_backward", lambda *x, **how: partial(backward_kernel, **how))
    sizes = Sizes(2, 4, 2, 20, 33, head_dim)
    q, k, v = make_qkv(sizes)
    grad_out = torch.randn(q.shape)
    mask = band(20, 33, causal=True, window=CONFIG.window)
    problem = Problem(
        torch.device("cuda"), q.dtype, 2, 4, 2, head_dim, CONFIG.scale, CONFIG.softcap, mask, True
    )
    nothing: Any = SimpleNamespace(function=print)
    out, lse = blocked_cuda.forward(problem, nothing)(q, k, v)
    assert lse is not None
    grads = blocked_cuda.backward(problem, nothing)(grad_out, q, k, v, out, lse)
    want_out, want = gradients(lambda *x: expected(*x, CONFIG), (q, k, v), grad_out)
    assert head_dim in blocked_cuda.HEAD_DIMS or in_model_order(out)
    for mine, exact, x in zip((out, *grads), (want_out, *want), (q, q, k, v), strict=True):
        assert mine.shape == x.shape
        assert relative_error(mine, exact) <= 3e-6


def test_a_head_dim_beyond_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    mask = band(8, 8, causal=True, window=None)
    for head_dim, refused in ((256, False), (257, True)):
        problem = Problem(torch.device("cuda"), torch.float32, 1, 1, 1, head_dim, 0.1, 50.0, mask, False)
        assert (blocked_cuda.ENGINE.refuses(problem) is not None) == refused


def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    mask = band(8, 8, causal=True, window=None)
    problem = Problem(torch.device("cuda"), torch.float32, 1, 1, 1, 64, 0.1, 50.0, mask, False)
    for version, refused in (("3.2.0", True), ("3.3.1", False), ("4.0.0+git1", False), ("unknown", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        triton_version.cache_clear()
        answer = blocked_cuda.ENGINE.refuses(problem)
        assert (answer is not None and "triton 3.2 is too old" in answer) == refused
    triton_version.cache_clear()
