"""The blocked engine on CUDA: our Triton kernels, forward with logsumexp and backward.

Triton compiles them at their first use in a process, or takes them from its own cache on disk; none of them is in
ours.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.kernels.engine import Backward, Engine, Forward, Kernels, Problem

HEAD_DIMS = (64, 96, 128, 256)


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"the Triton kernels run on CUDA, q is on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the Triton kernels serve float32, bfloat16 and float16"
    if problem.head_dim not in HEAD_DIMS:
        return f"head_dim: {problem.head_dim}, the Triton kernels serve {HEAD_DIMS}"
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


def forward(problem: Problem, kernels: Kernels) -> Forward:
    """Bind the forward kernel to the mask and the scalars."""
    from softcap_runtime.kernels import triton_attention

    how = _how(problem)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return triton_attention.forward(q, k, v, **how)

    return run


def backward(problem: Problem, kernels: Kernels) -> Backward:
    """Bind the backward kernels."""
    from softcap_runtime.kernels import triton_attention

    how = _how(problem)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return triton_attention.backward(*tensors, **how)

    return run


ENGINE = Engine("blocked", _refuses, lambda problem: [], forward, backward)
