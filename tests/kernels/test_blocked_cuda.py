"""The engine around the Triton kernels, with the specification in their place: what a CPU can prove of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Sizes, expected, gradients, make_qkv, relative_error
from torch import Tensor

from softcap_runtime import AttentionConfig, reference
from softcap_runtime.kernels import blocked_cuda, triton_attention, triton_gradient
from softcap_runtime.kernels.engine import Problem
from softcap_runtime.kernels.gpu_options import triton_version
from softcap_runtime.masks.intervals import RowIntervals, band, row_intervals

CONFIG = AttentionConfig(softcap=50.0, scale=0.2)
SIZES = Sizes(2, 4, 2, 40, 40, 64)
NO_KERNELS: Any = SimpleNamespace(function=print)


def problem(mask: RowIntervals, head_dim: int = 64) -> Problem:
    sizes = (SIZES.batch, SIZES.heads, SIZES.kv_heads, head_dim)
    scalars = (CONFIG.scale, CONFIG.softcap)
    return Problem(torch.device("cuda"), torch.float32, *sizes, *scalars, mask, True)


class Bound:
    """Stands in for what binds the kernels, and counts; what it returns is the specification."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards: list[list[tuple[int, ...]]] = []
        self.backwards: list[list[tuple[int, ...]]] = []
        monkeypatch.setattr(triton_attention, "bind_forward", self.bind_forward)
        monkeypatch.setattr(triton_gradient, "bind_backward", self.bind_backward)

    def bind_forward(self, *bound: Tensor, **how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        self.forwards.append([x.stride() for x in bound])

        def run(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
            mask = reference.visible(lo, hi, k.shape[2])
            return reference.attention(q, k, v, mask, scale=how["scale"], softcap=how["softcap"])

        return run

    def bind_backward(self, *bound: Tensor, **how: Any) -> Callable[..., tuple[Tensor, ...]]:
        self.backwards.append([x.stride() for x in bound])

        def run(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            mask = reference.visible(*rest[2:], k.shape[2])

            def attend(*x: Tensor) -> Tensor:
                return reference.attention(*x, mask, scale=how["scale"], softcap=how["softcap"])[0]

            return gradients(attend, (q, k, v), grad_out)[1]

        return run


def test_a_layout_is_bound_once_for_all_masks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Bound(monkeypatch)
    form = row_intervals(
        40, 40, causal=True, window=None, document_ids=torch.zeros(2, 40, dtype=torch.int32)
    ).form
    forward = blocked_cuda.ENGINE.forward(problem(form), NO_KERNELS)
    backward = blocked_cuda.ENGINE.backward(problem(form), NO_KERNELS)
    layouts = ("transposed", "contiguous")
    for number in range(8):
        q, k, v = make_qkv(SIZES, layout=layouts[number] if number < 2 else random.choice(layouts))
        ids = (torch.rand(2, 40) < 0.2).cumsum(1)
        edges = row_intervals(40, 40, causal=True, window=None, document_ids=ids).vectors
        grad_out = torch.randn(2, 40, 4, 64).transpose(1, 2)
        out, lse = forward(q, k, v, *edges)
        assert lse is not None
        grads = backward(grad_out, q, k, v, out.transpose(1, 2).contiguous().transpose(1, 2), lse, *edges)
        want, want_grads = gradients(lambda *x: expected(*x, CONFIG, document_ids=ids), (q, k, v), grad_out)  # noqa: B023
        for mine, exact in zip((out, *grads), (want, *want_grads), strict=True):
            assert relative_error(mine, exact) <= 3e-6
    assert len(kernels.forwards) == len({str(strides) for strides in kernels.forwards}) == 2
    assert len(kernels.backwards) == len({str(strides) for strides in kernels.backwards}) == 2


def test_layouts_are_bounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Bound(monkeypatch)
    monkeypatch.setattr(blocked_cuda, "MAX_LAYOUTS", 3)
    form = row_intervals(40, 40, causal=True, window=None, document_ids=torch.zeros(1, 40, dtype=torch.int32))
    forward = blocked_cuda.ENGINE.forward(problem(form.form), NO_KERNELS)
    for _ in range(2):
        for width in range(64, 72):
            q, k, v = (torch.randn(2, heads, 40, width)[..., :64] for heads in (4, 2, 2))
            out, _ = forward(q, k, v, *form.vectors)
            assert relative_error(out, expected(q, k, v, CONFIG)) <= 3e-6
    assert len(kernels.forwards) == 16


def test_a_head_dim_beyond_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_cuda, "has_triton", lambda: True)
    mask = band(40, 40, causal=True, window=None)
    for head_dim, refused in ((1, False), (80, False), (256, False), (257, True)):
        assert (blocked_cuda.ENGINE.refuses(problem(mask, head_dim)) is not None) == refused


def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_cuda, "has_triton", lambda: True)
    mask = band(40, 40, causal=True, window=None)
    for version, refused in (("3.2.0", True), ("3.3.1", False), ("4.0.0+git1", False), ("unknown", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        triton_version.cache_clear()
        answer = blocked_cuda.ENGINE.refuses(problem(mask))
        assert (answer is not None and "triton 3.2 is too old" in answer) == refused
    triton_version.cache_clear()
