"""The flex kernel as a graph to export: every size, stride, mask, cap and scale is a run-time argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from softcap_runtime.engines.flex_cpu import is_visible
from softcap_runtime.engines.graphs.softcap import capped, tanh, tanh_half
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.masks.blocks import BlockTables, assemble


class Graph(NamedTuple):
    """What is exported: a module, example inputs, and torch.export's ``dynamic_shapes`` for them."""

    module: nn.Module
    example: tuple[Tensor, ...]
    dynamic: tuple[Any, ...]


class FlexForward(nn.Module):
    """``(q, k, v, partial_num, partial_idx, full_num, full_idx, lo, hi, row_stride, scale[, cap, inv_cap])``."""

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        """Attention ``[B, Hq, Sq, D]``, laid out ``[B, Sq, Hq, D]`` in memory as the example q is."""
        from torch.nn.attention.flex_attention import flex_attention

        tables, rows, scalars = BlockTables(*rest[:4]), rest[4:7], rest[7:]
        bend = tanh if self.spec.torch_dtype == torch.float32 else tanh_half

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            logit = score * scalars[0]
            return capped(logit, scalars[1], scalars[2], bend) if self.spec.capped else logit

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return is_visible(b, h, i, j, *rows)

        block_mask = assemble((q.shape[2], k.shape[2]), tables, None, mask_mod)
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=1.0, enable_gqa=True)  # type: ignore[return-value]


def flex_forward(spec: KernelSpec) -> Graph:
    """The graph of ``spec``."""
    dim = torch.export.Dim.DYNAMIC
    dtype, head_dim = spec.torch_dtype, spec.head_dim

    batch, num_heads, num_kv_heads, q_len, kv_len, q_blocks, kv_blocks = 2, 8, 4, 640, 896, 5, 7
    taken = {batch, num_heads, num_kv_heads, q_len, kv_len, q_blocks, kv_blocks}

    def heads(count: int, length: int) -> Tensor:
        # Memory order B, S, H, D, as projections produce it: the output takes q's order.
        return _distinct((batch, length, count, head_dim), taken, dtype).transpose(1, 2)

    q, k, v = heads(num_heads, q_len), heads(num_kv_heads, kv_len), heads(num_kv_heads, kv_len)
    tables: list[Tensor] = []
    for _ in range(2):
        tables.append(_distinct((batch, 1, q_blocks), taken, torch.int32))
        tables.append(_distinct((batch, 1, q_blocks, kv_blocks), taken, torch.int32))
    # A static size: with a symbolic one the generated C++ refers to a size that it does not declare (torch 2.13). The
    # kernel reads what the rows of the call need and no more, so shorter vectors serve, and longer ones.
    rows = [torch.empty(size, dtype=torch.int32) for size in ((2**24,), (2**24,), ())]
    scalars = [torch.ones(()) for _ in range(3 if spec.capped else 1)]
    sizes = {0: dim, 1: dim, 2: dim}
    table_shapes = [{0: dim, 2: dim}, {0: dim, 2: dim, 3: dim}] * 2
    rest = (*table_shapes, *({} for _ in (*rows, *scalars)))
    return Graph(FlexForward(spec), (q, k, v, *tables, *rows, *scalars), (sizes, sizes, sizes, rest))


def _distinct(sizes: tuple[int, ...], taken: set[int], dtype: torch.dtype) -> Tensor:
    """An example tensor, last stride 1, whose other strides are like no number of the graph so far.

    torch.export gives equal numbers one symbol, and a stride that is size times stride of another dimension that
    expression: a kernel would then read with the wrong one. ``taken`` holds the numbers that symbols have already,
    the dynamic sizes first; the strides and those products are added to it. Strides are multiples of 8.
    """
    strides = [1]
    for size in reversed(sizes[1:]):
        product = size * strides[0]
        taken.add(product)
        step = product + 8 - product % 8
        while step in taken:
            step += 8
        taken.add(step)
        strides.insert(0, step)
    return torch.empty_strided(sizes, strides, dtype=dtype)
