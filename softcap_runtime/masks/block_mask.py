"""Row intervals as torch's ``BlockMask``, for callers of ``flex_attention`` itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softcap_runtime.masks.blocks import assemble, block_tables, query_tables
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals, edges

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask(intervals: RowIntervals, device: torch.device | str) -> BlockMask:
    """A ``BlockMask`` ``[B or 1, 1, q_len, kv_len]``, including the lists that the backward on a GPU reads.

    Equal to what ``create_block_mask`` makes of the same mask, block for block and element for element, except that
    the columns of a row may come in another order. It is valid for these lengths only; making one for other lengths
    takes microseconds.
    """
    keys, queries = block_tables(intervals, device), query_tables(intervals, device)
    mask_mod: Any = _mask_mod(intervals, device)
    # Kept on the function, as every copy of a BlockMask (``.to``, pytrees) has the same one.
    mask_mod.row_intervals = intervals
    return assemble((intervals.q_len, intervals.kv_len), keys, queries, mask_mod)


def intervals_of(mask: BlockMask) -> RowIntervals | None:
    """The row intervals that ``block_mask`` made this from; None for anyone else's BlockMask."""
    return getattr(mask.mask_mod, "row_intervals", None)


def form_of(mask: BlockMask) -> tuple[bool, int | None] | None:
    """``(causal, window)`` of a band's mask that ``block_mask`` made, to remake it for other lengths; else None."""
    intervals = intervals_of(mask)
    if intervals is None or intervals.left is None or intervals.right is None:
        return None
    own = intervals.kv_len - intervals.q_len + 1  # one past the key at a row's own position, for row 0
    window = None if intervals.left <= -UNBOUNDED else own - intervals.left
    return intervals.right == own, window


def _mask_mod(intervals: RowIntervals, device: torch.device | str) -> MaskMod:
    """The function of the elements: one for each kind, so that a compiled kernel computes no more than it needs."""
    left, right = intervals.left, intervals.right
    if left is None or right is None:
        return _interval_mod(*edges(intervals, device))
    bounded_left, bounded_right = left > -UNBOUNDED, right < UNBOUNDED

    def both(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx >= q_idx + left) & (kv_idx < q_idx + right)

    def up_to(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx < q_idx + right

    def everything(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= 0

    if bounded_left:
        return both
    return up_to if bounded_right else everything


def _interval_mod(lo: Tensor, hi: Tensor) -> MaskMod:
    if lo.shape[0] > 1:

        def per_batch(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx >= lo[b, q_idx]) & (kv_idx < hi[b, q_idx])

        return per_batch

    # One row of intervals for any batch: it must not be indexed by b.
    row_lo, row_hi = lo[0], hi[0]

    def shared(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx >= row_lo[q_idx]) & (kv_idx < row_hi[q_idx])

    return shared
