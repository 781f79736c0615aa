"""The blocked engine on CUDA: our Triton kernels, forward with logsumexp and backward.

Triton compiles them at their first use in a process, or takes them from its own cache on disk; none of them is in
ours. A head_dim between theirs is filled up with zeros, which change no logit: a copy of q, k and v, where any other
engine would hold S x S logits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.kernels.engine import Backward, Engine, Forward, Kernels, Problem, laid_out
from softcap_runtime.kernels.gpu_options import HEAD_DIMS


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"the Triton kernels run on CUDA, q is on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the Triton kernels serve float32, bfloat16 and float16"
    if problem.head_dim > max(HEAD_DIMS):
        return f"head_dim: {problem.head_dim}, the Triton kernels serve up to {max(HEAD_DIMS)}"
    return None


def _how(problem: Problem) -> dict[str, Any]:
    mask = problem.mask
    return {
        "scale": problem.scale,
        "softcap": problem.softcap,
        "left": mask.left,
        "right": mask.right,
        "lo": mask.lo,
        "hi": mask.hi,
        "approx": problem.softcap_approx,
    }


def _filled(x: Tensor) -> Tensor:
    """``x`` with zeros up to the next head_dim of a kernel."""
    head_dim = x.shape[-1]
    width = min(size for size in HEAD_DIMS if size >= head_dim)
    return x if width == head_dim else torch.nn.functional.pad(x, (0, width - head_dim))


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """A kernel's result without the columns that ``_filled`` gave ``like``, in the layout of an output."""
    return x if x.shape == like.shape else laid_out(x[..., : like.shape[-1]], like)


def forward(problem: Problem, kernels: Kernels) -> Forward:
    """Bind the forward kernel to the mask and the scalars."""
    from softcap_runtime.kernels import triton_attention

    how = _how(problem)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = triton_attention.forward(_filled(q), _filled(k), _filled(v), **how)
        return _cut(out, q), lse

    return run


def backward(problem: Problem, kernels: Kernels) -> Backward:
    """Bind the backward kernels."""
    from softcap_runtime.kernels import triton_attention

    how = _how(problem)

    def run(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = triton_attention.backward(
            _filled(grad_out), _filled(q), _filled(k), _filled(v), _filled(out), lse, **how
        )
        return _cut(grads[0], q), _cut(grads[1], k), _cut(grads[2], v)

    return run


ENGINE = Engine("blocked", _refuses, lambda problem: [], forward, backward)
