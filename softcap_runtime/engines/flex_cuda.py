"""The flex engine on CUDA: PyTorch's ``flex_attention`` with its logsumexp, and flex's own backward.

Each process compiles both with ``torch.compile`` (see ``jit``), for given heads and head_dim and any lengths. Our
Triton kernels are faster where they serve.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.compat import torch_features
from softcap_runtime.compat.torch_private import flex_backward, has_flex_backward
from softcap_runtime.cuda.options import has_triton
from softcap_runtime.engines.engine import (
    Engine,
    Kernels,
    MaskedBackward,
    MaskedForward,
    Problem,
    laid_out,
    per_mask,
    scalars,
)
from softcap_runtime.engines.flex_cpu import is_visible, kernel_spec, mask_tensors
from softcap_runtime.engines.jit import Compiled
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.masks.blocks import BlockTables, assemble, query_tables

# A tile of the tensor cores has 16 columns at least; at 512 flex finds no block that fits a GPU (H100, torch 2.11).
HEAD_DIMS = range(16, 257)
FORWARD, BACKWARD = "flex_cuda_forward", "flex_cuda_backward"


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"this flex engine runs on CUDA, q is on {problem.device}"
    if not torch_features.FLEX_ON_CUDA:
        return f"torch {torch.__version__} is too old for the flex engine on CUDA (2.7 and newer serve)"
    if not has_triton():
        return "triton is not installed"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the flex engine serves float32, bfloat16 and float16"
    if problem.head_dim not in HEAD_DIMS:
        return f"head_dim: {problem.head_dim}, the flex engine serves 16 to 256 on CUDA"
    if problem.train and not has_flex_backward():
        return f"torch {torch.__version__} does not show flex's backward where it is looked for"
    return None


def _compiled(problem: Problem, op: str) -> Compiled:
    return Compiled(kernel_spec(problem, op), function, 0 if op == FORWARD else 1)


def _artifacts(problem: Problem, kernels: Kernels) -> list[Compiled]:
    return [_compiled(problem, op) for op in ((FORWARD, BACKWARD) if problem.train else (FORWARD,))]


def function(spec: KernelSpec) -> Callable[..., tuple[Tensor, ...]]:
    """The function compiled for ``spec``, of q, k, v, block tables, the mask's tensors, scale, cap and 1 / cap."""

    # Without types, as ``is_visible``.
    def logit(score, b, h, i, j, scale, cap=None, inv_cap=None):  # type: ignore[no-untyped-def]
        scaled = score * scale
        return scaled if cap is None else cap * torch.tanh(scaled * inv_cap)

    def gradient(score, b, h, i, j, grad, scale, cap=None, inv_cap=None):  # type: ignore[no-untyped-def]
        if cap is None:
            return grad * scale
        bounded = torch.tanh(score * scale * inv_cap)
        return grad * scale * (1 - bounded * bounded)

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        from torch.nn.attention import flex_attention as flex

        # Before torch 2.9 a flag asked for it, of which later versions warn.
        asked = {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}
        rows, numbers = rest[4:7], rest[7:]
        mask = assemble(
            (q.shape[2], k.shape[2]), BlockTables(*rest[:4]), None, lambda b, h, i, j: is_visible(b, h, i, j, *rows)
        )
        out, kept = flex.flex_attention(
            q,
            k,
            v,
            score_mod=lambda score, b, h, i, j: logit(score, b, h, i, j, *numbers),
            block_mask=mask,
            scale=1.0,
            enable_gqa=True,
            **asked,
        )
        return out, getattr(kept, "lse", kept)

    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        rows, numbers = rest[8:11], rest[11:]
        mask = assemble((q.shape[2], k.shape[2]), BlockTables(*rest[:4]), BlockTables(*rest[4:8]), is_visible)
        return flex_backward(grad_out, q, k, v, out, lse, logit, gradient, numbers, mask, rows)

    if spec.op == FORWARD:
        return forward
    # Dynamo does not know flex's backward; the compiler behind it does.
    inside = torch.compiler.allow_in_graph(backward)
    return lambda *tensors: inside(*tensors)


def _forward(problem: Problem, kernels: Kernels) -> MaskedForward:
    compiled = kernels.get(_compiled(problem, FORWARD))
    fixed = [*mask_tensors(problem, kernels), *scalars(problem)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = compiled([q, k, v, *fixed])
        return laid_out(out, q), lse

    return run


def _backward(problem: Problem, kernels: Kernels) -> MaskedBackward:
    compiled = kernels.get(_compiled(problem, BACKWARD))
    *tables, lo, hi, row_stride = mask_tensors(problem, kernels)
    by_queries = query_tables(problem.mask, problem.device)
    fixed = [*tables, *by_queries, lo, hi, row_stride, *scalars(problem)]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = compiled([*tensors, *fixed])
        _, q, k, v, *_ = tensors
        return laid_out(grad_q, q), laid_out(grad_k, k), laid_out(grad_v, v)

    return run


ENGINE = Engine("flex", _refuses, _artifacts, per_mask(_forward), per_mask(_backward))
