"""The flex engine on CUDA: PyTorch's ``flex_attention`` forward with its logsumexp, and flex's own backward from it.

Both are compiled in each process, by ``torch.compile`` (see ``jit``): the sizes of heads and head_dim are constants
of a kernel, lengths become symbols at their first change. Our Triton kernels are faster on what they serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softcap_runtime.kernels.engine import Backward, Engine, Forward, Kernels, Problem, laid_out, scalars
from softcap_runtime.kernels.flex import (
    has_flex_attention,
    in_band,
    in_intervals,
    key_tables,
    mask_arguments,
)
from softcap_runtime.kernels.key import KernelSpec, MaskKind, dtype_name
from softcap_runtime.masks.blocks import BLOCK, query_tables
from softcap_runtime.torch_private import flex_backward, has_flex_backward

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# A tile of the tensor cores: what flex's kernels for GPUs multiply has this many columns at least.
MIN_HEAD_DIM = 16
FORWARD, BACKWARD = "flex_cuda_forward", "flex_cuda_backward"


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"this flex engine runs on CUDA, q is on {problem.device}"
    if not has_flex_attention():
        return f"torch {torch.__version__} has no flex_attention (2.5 and newer have)"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the flex engine serves float32, bfloat16 and float16"
    if problem.head_dim < MIN_HEAD_DIM:
        return f"head_dim: {problem.head_dim}, the flex engine serves {MIN_HEAD_DIM} and more on CUDA"
    if problem.train and not has_flex_backward():
        return f"torch {torch.__version__} does not show flex's backward where it is looked for"
    return None


def _spec(problem: Problem, op: str) -> KernelSpec:
    mask: MaskKind = "band" if problem.mask.lo is None else "intervals"
    capped = problem.softcap is not None
    return KernelSpec(op, problem.device.type, dtype_name(problem.dtype), problem.head_dim, capped, mask)


def _specs(problem: Problem) -> list[KernelSpec]:
    return [_spec(problem, op) for op in ((FORWARD, BACKWARD) if problem.train else (FORWARD,))]


def function(spec: KernelSpec) -> Callable[..., tuple[Tensor, ...]]:
    """What is compiled for ``spec``."""
    visible = in_band if spec.mask == "band" else in_intervals
    edges = 2 if spec.mask == "band" else 3

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *numbers: Tensor) -> Tensor:
        logit = score * numbers[0]
        return numbers[1] * torch.tanh(logit * numbers[2]) if spec.capped else logit

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        from torch.nn.attention.flex_attention import flex_attention

        rows, numbers = rest[4 : 4 + edges], rest[4 + edges :]

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return visible(b, h, i, j, *rows)

        def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score_mod(score, b, h, i, j, *numbers)

        mask = _block_mask(q, k, rest[:4], mask_mod)
        return flex_attention(
            q, k, v, score_mod=mod, block_mask=mask, scale=1.0, enable_gqa=True, return_lse=True
        )

    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        rows, numbers = rest[8 : 8 + edges], rest[8 + edges :]
        mask = _block_mask(q, k, rest[:8], visible)
        return flex_backward(grad_out, q, k, v, out, lse, score_mod, numbers, mask, rows)

    if spec.op == FORWARD:
        return forward
    inside = torch.compiler.allow_in_graph(backward)
    return lambda *tensors: inside(*tensors)


def _block_mask(q: Tensor, k: Tensor, tables: Sequence[Tensor], mask_mod: Any) -> BlockMask:
    """Of the tables over the keys, and over the queries where there are eight."""
    from torch.nn.attention.flex_attention import BlockMask

    queries: Sequence[Tensor | None] = tables[4:] or [None] * 4
    return BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]),
        kv_num_blocks=tables[0],
        kv_indices=tables[1],
        full_kv_num_blocks=tables[2],
        full_kv_indices=tables[3],
        q_num_blocks=queries[0],
        q_indices=queries[1],
        full_q_num_blocks=queries[2],
        full_q_indices=queries[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_mod,
    )


def _forward(problem: Problem, kernels: Kernels) -> Forward:
    compiled = kernels.runner(_spec(problem, FORWARD))
    fixed = [*key_tables(problem, kernels), *mask_arguments(problem), *scalars(problem)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = compiled([q, k, v, *fixed])
        return laid_out(out, q), lse

    return run


def _backward(problem: Problem, kernels: Kernels) -> Backward:
    compiled = kernels.runner(_spec(problem, BACKWARD))
    queries = query_tables(problem.mask, problem.device)
    fixed = [*key_tables(problem, kernels), *queries, *mask_arguments(problem), *scalars(problem)]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = compiled([*tensors, *fixed])
        _, q, k, v, *_ = tensors
        return laid_out(grad_q, q), laid_out(grad_k, k), laid_out(grad_v, v)

    return run


ENGINE = Engine("flex", _refuses, _specs, _forward, _backward)
