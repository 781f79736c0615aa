"""How the blocked engine cuts a problem up: blocks of query rows, each against the keys that its rows see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softcap_runtime.kernels.engine import Problem
from softcap_runtime.kernels.products import compute_dtype
from softcap_runtime.masks.blocks import key_ranges
from softcap_runtime.masks.intervals import edges


def block_rows(q_len: int, dtype: torch.dtype) -> int:
    """Query rows of a block, for products in ``dtype``.

    Smaller blocks waste less on the causal diagonal, larger ones make better products. Forward + backward with 64 rows
    against 128, B1 Hq8 Hkv4 D256 float32: 8.4 against 9.2 ms at 256 tokens, 23.0 against 23.8 at 512, 285 against 284
    at 2,048. With bf16 tiles (AMX) 64, 128 and 256 rows take 9.8, 8.8 and 9.4 ms at 256 tokens, 22.6, 17.5 and 18.8 at
    512, 67, 54 and 50 at 1,024; 128, 256 and 512 take 162, 145 and 163 ms at 2,048.
    """
    rows = 64 if q_len <= 512 else 128
    return 2 * rows if dtype == torch.bfloat16 else rows


class Block(NamedTuple):
    """Query rows ``[first, end)`` against the keys ``[lo, hi)`` that any of them sees."""

    first: int
    end: int
    lo: int
    hi: int

    def chunks(self, size: int) -> Iterator[tuple[int, int]]:
        """The keys in pieces of at most ``size``."""
        for lo in range(self.lo, self.hi, size):
            yield lo, min(lo + size, self.hi)


class Walk:
    """The blocks of a problem, batch row by batch row, with the vectors that the fused kernels read."""

    def __init__(self, problem: Problem) -> None:
        lo, hi = edges(problem.mask, "cpu")
        self.lo, self.hi = list(lo.unbind(0)), list(hi.unbind(0))
        self.cols = torch.arange(problem.mask.kv_len, dtype=torch.int32, device="cpu")
        self.rows = block_rows(problem.mask.q_len, compute_dtype(problem.dtype))
        self.heads = problem.num_heads
        ranges = key_ranges(problem.mask, self.rows)
        if isinstance(ranges, list):
            self.ranges = [ranges]
        else:
            bounds = torch.stack([ranges.lo_min, ranges.hi_max], -1).tolist()
            self.ranges = [[(a, b) if a < b else (0, 0) for a, b in row] for row in bounds]

    def blocks(self, batch_row: int) -> Iterator[Block]:
        """The blocks of a batch row, in the order of its queries."""
        q_len = self.lo[0].shape[0]
        row = self.ranges[min(batch_row, len(self.ranges) - 1)]
        for place, (lo, hi) in enumerate(row):
            yield Block(place * self.rows, min((place + 1) * self.rows, q_len), lo, hi)

    def keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` ``[Hkv, Skv, D]`` as the products want it, at once where several blocks read it; else as it is.

        That is in ``dtype`` and contiguous: rows that lie a projection's width apart cost 5 % of a float32 step, and
        bf16 tiles (AMX) take three times as long for ``q k^T``.
        """
        if len(self.ranges[0]) == 1:
            return x
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous()

    def edges(self, batch_row: int, block: Block) -> list[Tensor]:
        """Of each row of the block, head after head, the first visible key and the one past the last.

        Both int32 ``[Hq * R]``.
        """
        row = min(batch_row, len(self.lo) - 1)
        # A sixth of the time of Tensor.repeat.
        return [torch.cat([side[row][block.first : block.end]] * self.heads) for side in (self.lo, self.hi)]
