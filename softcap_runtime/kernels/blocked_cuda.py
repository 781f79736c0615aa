"""The blocked engine on CUDA: our Triton kernels, forward with logsumexp and backward.

Which kernels a call needs follows from its tensors' layout as well, so they are found at the first call of a layout:
loaded from the cache, where Triton is not even imported, or compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.kernels.cubin import CubinSpec, Function
from softcap_runtime.kernels.engine import Backward, Engine, Forward, Kernels, Problem
from softcap_runtime.kernels.gpu_options import (
    HEAD_DIMS,
    OLDEST_TRITON,
    BlockOptions,
    Direction,
    has_triton,
    triton_version,
)

# A plan's tensors have one layout or a few; more than this number is a caller that invents them.
MAX_LAYOUTS = 64


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"the Triton kernels run on CUDA, q is on {problem.device}"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, this torch is built for AMD's"
    if not has_triton():
        return "triton is not installed"
    if triton_version() < OLDEST_TRITON:
        return "triton {}.{} is too old, {}.{} and newer compile the kernels".format(
            *triton_version(), *OLDEST_TRITON
        )
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the Triton kernels serve float32, bfloat16 and float16"
    if problem.head_dim > max(HEAD_DIMS):
        return f"head_dim: {problem.head_dim}, the Triton kernels serve up to {max(HEAD_DIMS)}"
    return None


class _GpuKernels(NamedTuple):
    """``GpuKernels`` for the calls of one problem."""

    kernels: Kernels
    problem: Problem

    def function(self, spec: CubinSpec) -> Function:
        return self.kernels.function(self.problem, spec)

    def options(self, q: Tensor, direction: Direction) -> BlockOptions:
        return self.kernels.options(q.device.index, q.dtype, q.shape[-1], direction)


def _how(problem: Problem, kernels: Kernels) -> dict[str, Any]:
    mask = problem.mask
    return {
        "kernels": _GpuKernels(kernels, problem),
        "scale": problem.scale,
        "softcap": problem.softcap,
        "left": mask.left,
        "right": mask.right,
        "approx": problem.softcap_approx,
    }


def _bound(bind: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """A call that binds once for each layout of its tensors: their strides, and whether they are aligned."""
    ready: dict[tuple[object, ...], Callable[..., Any]] = {}

    def run(*tensors: Tensor) -> Any:
        key = (*[x.data_ptr() & 15 for x in tensors], *[x.stride() for x in tensors])
        bound = ready.get(key)
        if bound is None:
            if len(ready) >= MAX_LAYOUTS:
                ready.clear()
            bound = ready[key] = bind(*tensors, **how)
        return bound(*tensors)

    return run


def _forward(problem: Problem, kernels: Kernels) -> Forward:
    from softcap_runtime.kernels import triton_attention

    return _bound(triton_attention.bind_forward, train=problem.train, **_how(problem, kernels))


def _backward(problem: Problem, kernels: Kernels) -> Backward:
    from softcap_runtime.kernels import triton_gradient

    return _bound(triton_gradient.bind_backward, **_how(problem, kernels))


ENGINE = Engine("blocked", _refuses, lambda problem: [], _forward, _backward)
