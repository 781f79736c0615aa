"""The flex engine for CUDA, traced by torch's compiler and run on the CPU: what can be proved of it without a GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.helpers import Sizes, expected, gradients, in_model_order, make_qkv, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

from softcap_runtime import AttentionConfig
from softcap_runtime.compat.torch_private import has_flex_backward
from softcap_runtime.compat.torch_transforms import below_autograd
from softcap_runtime.engines import blocked_cuda, choose, flex_cuda
from softcap_runtime.engines.engine import Problem
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.masks.intervals import RowIntervals, band, row_intervals
from softcap_runtime.masks.memo import MaskMemo

pytestmark = pytest.mark.skipif(not has_flex_backward(), reason="this torch does not show flex's backward")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Kernels:
    """Compiles in this process, with the backend that traces everything and runs the traces as they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks = MaskMemo(2**20)
        self.get = functools.cache(lambda artifact: artifact.load(b""))
        self.counter = CompileCounterWithBackend("aot_eager")
        compiled = functools.partial(torch.compile, backend=self.counter)
        monkeypatch.setattr(torch, "compile", compiled)


def problem(mask: RowIntervals, sizes: Sizes, softcap: float | None, device: torch.device = CPU) -> Problem:
    batch, heads, kv_heads, *_, head_dim = sizes
    return Problem(device, torch.float32, batch, heads, kv_heads, head_dim, head_dim**-0.5, softcap, mask, True)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("softcap", [5.0, None])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_backward(softcap: float | None, packed: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(monkeypatch)
    for q_len, kv_len in ((300, 300), (200, 333), (514, 514), (140, 777), (650, 650)):
        sizes = Sizes(2, 4, 2, q_len, kv_len, 32)
        q, k, v = make_qkv(sizes)
        grad_out = torch.randn(q.shape)
        config = AttentionConfig(softcap=softcap, scale=32**-0.5, window=100)
        masks = {"document_ids": torch.arange(kv_len)[None].expand(2, -1) // 70} if packed else {}
        mask = row_intervals(q_len, kv_len, causal=True, window=100, **masks)
        call = problem(mask, sizes, softcap)
        with torch.no_grad(), below_autograd(False):  # as an operator's kernels run
            out, lse = flex_cuda.ENGINE.forward(call, kernels)(q, k, v, *call.mask.vectors)
            assert lse is not None
            grads = flex_cuda.ENGINE.backward(call, kernels)(grad_out, q, k, v, out, lse, *call.mask.vectors)
        want, want_grads = gradients(lambda *x: expected(*x, config, **masks), (q, k, v), grad_out)  # noqa: B023
        for mine, exact in zip((out, *grads), (want, *want_grads), strict=True):
            assert in_model_order(mine)
            assert relative_error(mine, exact) <= 3e-6
    # Forward and backward, each for equal lengths and for different ones.
    assert kernels.counter.frame_count == 4


def test_a_row_that_sees_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(monkeypatch)
    sizes = Sizes(1, 2, 1, 130, 130, 32)
    q, k, v = make_qkv(sizes)
    lo = torch.zeros(1, 130, dtype=torch.int32)
    hi = torch.arange(1, 131, dtype=torch.int32)[None].masked_fill(torch.arange(130) % 2 == 0, 0)
    lo = lo.masked_fill(hi == 0, 130)
    call = problem(RowIntervals(130, 130, None, None, lo, hi), sizes, 5.0)
    with torch.no_grad():
        out, lse = flex_cuda.ENGINE.forward(call, kernels)(q, k, v, *call.mask.vectors)
        assert lse is not None
        grads = flex_cuda.ENGINE.backward(call, kernels)(torch.randn(q.shape), q, k, v, out, lse, *call.mask.vectors)
    assert not out[:, :, ::2].any()
    assert (lse[:, :, ::2] == -torch.inf).all()
    assert not grads[0][:, :, ::2].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_who_serves_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = band(300, 300, causal=True, window=None)
    call = problem(mask, Sizes(1, 4, 2, 300, 300, 64), 50.0, CUDA)
    for engine in (flex_cuda, blocked_cuda):
        monkeypatch.setattr(engine, "has_triton", lambda: True)
    assert choose.choose(call, "auto").engine.name == "blocked"
    assert choose.choose(call, "flex").engine is flex_cuda.ENGINE
    for engine in (flex_cuda, blocked_cuda):
        monkeypatch.setattr(engine, "has_triton", lambda: False)
    without_triton = choose.choose(call, "auto")
    assert without_triton.engine.name == "dense"
    assert "triton is not installed" in without_triton.reason


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_cuda, "has_triton", lambda: True)
    mask = band(8, 8, causal=True, window=None)
    call = problem(mask, Sizes(1, 2, 1, 8, 8, 64), 50.0, CUDA)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"device": CPU}, "runs on CUDA"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"head_dim": 8}, "head_dim: 8"),
        ({"head_dim": 257}, "head_dim: 257"),
    ]
    assert flex_cuda.ENGINE.refuses(call) is None
    for change, words in changes:
        assert words in str(flex_cuda.ENGINE.refuses(call._replace(**change)))


def test_its_kernels_are_named_for_prewarming() -> None:
    mask = band(8, 8, causal=True, window=None)
    call = problem(mask, Sizes(1, 2, 1, 8, 8, 64), 50.0, CUDA)
    forward = KernelSpec("flex_cuda_forward", "cuda", "float32", 64, True)
    kernels: Any = None  # it asks for nothing to tell what it needs
    both = flex_cuda.ENGINE.artifacts(call, kernels)
    assert [one.describe() for one in both] == [forward, forward._replace(op="flex_cuda_backward")]
    assert [one.describe() for one in flex_cuda.ENGINE.artifacts(call._replace(train=False), kernels)] == [forward]
    assert [one.key() for one in both] == [None, None]
