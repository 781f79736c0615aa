"""Which blocks of 128 x 128 a mask computes, from row intervals alone.

The tables are the int32 tensors of torch's ``BlockMask``: per row of blocks how many columns are partly
visible and which, and the same for those wholly visible (every element of the block: rows past ``q_len`` and
keys past ``kv_len`` count as hidden, as in ``create_block_mask``). The columns of a row come in no promised
order, and what stands behind the first ``num`` entries is any valid column.

Tables are exact for every mask of ``band`` and ``row_intervals`` whose rows stand side by side: their intervals leave
no gap. Where they do (``query_positions``) inside one block of rows, columns in the gap are listed as partial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.compat import torch_features
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals, edges

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


class BlockTables(NamedTuple):
    """``num``: int32 ``[B or 1, 1, rows]``; ``idx``: int32 ``[B or 1, 1, rows, cols]``, with last stride 1.

    The ``idx`` of band masks are views whose rows overlap in a small storage: read them, do not write.
    """

    partial_num: Tensor
    partial_idx: Tensor
    full_num: Tensor
    full_idx: Tensor


def block_tables(intervals: RowIntervals, device: torch.device | str) -> BlockTables:
    """The tables over the keys, per block of queries; no host-device synchronisation.

    Band forms cost O(rows of blocks), times ``window / 128`` for a sliding window; interval forms
    O(q_len + rows x columns of blocks).
    """
    q_len, kv_len, left, right = intervals[:4]
    if left is not None and right is not None:
        return _band_tables(q_len, kv_len, left, right, device)
    return _interval_tables(intervals, device)


def query_tables(intervals: RowIntervals, device: torch.device | str) -> BlockTables:
    """The transposed tables that flex's backward reads: per block of keys, the query blocks that see it."""
    q_len, kv_len, left, right = intervals[:4]
    if left is not None and right is not None:
        # Key j is seen by the rows ``j - right < i <= j - left``: a band again.
        first = -UNBOUNDED if right >= UNBOUNDED else 1 - right
        past = UNBOUNDED if left <= -UNBOUNDED else 1 - left
        return _band_tables(kv_len, q_len, first, past, device)
    computed, full = computed_blocks(intervals, device)
    return BlockTables(*_ordered((computed & ~full).mT), *_ordered(full.mT))


def computed_blocks(intervals: RowIntervals, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Which blocks are computed, and which of them are full: bool ``[B or 1, rows, cols]`` both."""
    start, full_start, full_num, any_num = _interval_edges(intervals, device)
    columns = torch.arange(_blocks(intervals.kv_len), dtype=torch.int32, device=device)
    return _inside(columns, start, any_num), _inside(columns, full_start, full_num)


def assemble(lengths: tuple[int, int], keys: BlockTables, queries: BlockTables | None, mask_mod: Any) -> BlockMask:
    """torch's ``BlockMask`` of tables over the keys and, for flex's backward, over the queries."""
    # Imported here: it takes a tenth of a second, and the engines need the tables alone.
    from torch.nn.attention.flex_attention import BlockMask

    queries = queries or keys  # not read by a forward, and torch 2.8 and older want some
    size: dict[str, Any] = {"seq_lengths": lengths} if torch_features.MASK_LENGTHS else {}
    return BlockMask(
        **size,
        kv_num_blocks=keys.partial_num,
        kv_indices=keys.partial_idx,
        full_kv_num_blocks=keys.full_num,
        full_kv_indices=keys.full_idx,
        q_num_blocks=queries.partial_num,
        q_indices=queries.partial_idx,
        full_q_num_blocks=queries.full_num,
        full_q_indices=queries.full_idx,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_mod,
    )


def count_blocks(tables: BlockTables) -> tuple[int, int, int]:
    """How many blocks are (skipped, partial, full), over all batch rows; waits for the device."""
    partial, full = int(tables.partial_num.sum()), int(tables.full_num.sum())
    return tables.partial_idx.numel() - partial - full, partial, full


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def _partial_columns(start: Tensor, full_start: Tensor, full_num: Tensor, width: int) -> Tensor:
    """``[..., rows, width]``: the columns from start on, less the full ones; may run past the last column."""
    columns = torch.arange(width, dtype=torch.int32, device=start.device)
    past_left = columns >= (full_start - start)[..., None]
    return (columns + start[..., None]).add_(past_left * full_num[..., None])


# --- bands: a row of blocks is one step of arithmetic away from the next


def _ramp(start: int, top: int, count: int, device: torch.device | str) -> Tensor:
    """``start, start + 1, ...`` kept within ``[0, top]``: int32 ``[count]``."""
    return torch.arange(start, start + count, dtype=torch.int32, device=device).clamp_(0, top)


def _band_tables(q_len: int, kv_len: int, left: int, right: int, device: torch.device | str) -> BlockTables:
    rows, cols, whole_cols = _blocks(q_len), _blocks(kv_len), kv_len // BLOCK
    cut = q_len % BLOCK > 0
    # Block row r holds query rows 128 r to 128 r + 127. Its columns are [start, end), the full ones among
    # them [full_start, full_end): all four climb by one a row, clipped to the sequence.
    start_at, full_start_at = left // BLOCK, _blocks(left + BLOCK - 1)
    full_end_at, end_at = right // BLOCK, _blocks(right + BLOCK - 1)
    start = _ramp(start_at, cols, rows, device)
    full_start = _ramp(full_start_at, cols, rows, device)
    full_num = (_ramp(full_end_at, whole_cols, rows, device) - full_start).clamp_(min=0)
    any_num = (_ramp(end_at, cols, rows, device) - start).clamp_(min=0)
    last_start = min(max(rows - 1 + start_at, 0), cols)
    if cut:  # none of the last row's blocks is full, all that it sees are partial
        full_num[-1:].fill_(0)
        any_num[-1:].fill_(max(min(_blocks(q_len - 1 + right), cols) - last_start, 0))

    if not cut and full_start_at + rows <= 1 and full_end_at >= 0:  # partial on the right alone
        partial_idx = _climbing(full_end_at, rows, cols, device)
    elif not cut and start_at >= 0 and full_end_at >= whole_cols == cols:  # partial on the left alone
        partial_idx = _climbing(start_at, rows, cols, device)
    else:
        # Both margins are a column wide at least, and clipping them to the sequence never makes them wider.
        width = min(full_start_at - start_at + end_at - full_end_at, cols)
        table = _partial_columns(start, full_start, full_num, width)
        if cut:  # the last row is partial all along: it gets the full width
            partial_idx = _overlapping(table[:-1], _ramp(last_start, cols - 1, cols, device), cols)
        else:
            partial_idx = _overlapping(table, table.new_zeros(cols - width), cols)
    full_idx = _band_full_columns(full_start, cols, whole_cols, full_start_at, full_end_at)
    own_strides = partial_idx.device.type == "cpu" or torch_features.MASK_STRIDES
    if not own_strides and partial_idx.stride() != full_idx.stride():
        partial_idx, full_idx = partial_idx.contiguous(), full_idx.contiguous()
    return BlockTables((any_num - full_num)[None, None], partial_idx, full_num[None, None], full_idx)


def _band_full_columns(full_start: Tensor, cols: int, top: int, start_at: int, end_at: int) -> Tensor:
    """``[1, 1, rows, cols]``: the full columns of each row, ``top`` of them whole, in little storage."""
    rows, device = full_start.shape[0], full_start.device
    if start_at + rows <= 1:  # every row starts at column 0
        return _ramp(0, cols - 1, cols, device).as_strided((1, 1, rows, cols), (0, 0, 0, 1))
    if start_at >= 0:  # every row starts one column after the row before
        return _climbing(start_at, rows, cols, device)
    if end_at >= top:  # every row ends at the last whole column: list them from there
        falling = _ramp(top - cols, cols - 1, cols, device).flip(0)
        return falling.as_strided((1, 1, rows, cols), (0, 0, 0, 1))
    # Rows start at 0 and later begin to climb: a table as wide as the longest of them.
    turns = (min(max(row, 0), rows - 1) for row in (-start_at, top - end_at))
    width = max(min(row + end_at, top) - max(row + start_at, 0) for row in turns)
    width = min(max(width, 1), cols)
    # Written in place: at a million tokens this is a megabyte, and copying it costs more than computing it.
    storage = torch.empty(rows * width + cols - width, dtype=torch.int32, device=device)
    columns = torch.arange(width, dtype=torch.int32, device=device)
    torch.add(full_start[:, None], columns, out=storage[: rows * width].view(rows, width))
    storage[rows * width :].zero_()
    return storage.clamp_(max=cols - 1).as_strided((1, 1, rows, cols), (0, 0, width, 1))


def _climbing(start: int, rows: int, cols: int, device: torch.device | str) -> Tensor:
    """``[1, 1, rows, cols]``: row r is ``start + r, start + r + 1, ...``, all rows in one ramp."""
    return _ramp(start, cols - 1, rows + cols, device).as_strided((1, 1, rows, cols), (0, 0, 1, 1))


def _overlapping(table: Tensor, rest: Tensor, cols: int) -> Tensor:
    """``[1, 1, rows, cols]``: the rows of a narrow table, each reaching into the next ones and the rest."""
    storage = torch.cat([table.flatten(), rest.flatten()]).clamp_(max=cols - 1)
    rows = (storage.shape[0] - cols) // table.shape[1] + 1
    return storage.as_strided((1, 1, rows, cols), (0, 0, table.shape[1], 1))


# --- intervals: minima and maxima of 128 rows


def by_block(rows: Tensor, block: int) -> Tensor:
    """``[B, q_len]`` as ``[B, blocks, block]``; a short last block repeats its last row."""
    missing = -rows.shape[1] % block
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
    return rows.view(rows.shape[0], -1, block)


def _interval_edges(intervals: RowIntervals, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row of blocks, int32 ``[B, rows]``: first column, first full column, counts of full and of any."""
    lo, hi = (by_block(rows, BLOCK) for rows in edges(intervals, device))
    start = lo.amin(-1) // BLOCK
    any_num = ((hi.amax(-1) + (BLOCK - 1)) // BLOCK - start).clamp_(min=0)
    full_start = (lo.amax(-1) + (BLOCK - 1)) // BLOCK
    full_num = (hi.amin(-1) // BLOCK - full_start).clamp_(min=0)
    if intervals.q_len % BLOCK:
        full_num[:, -1:].fill_(0)
    return start, full_start, full_num, any_num


def _interval_tables(intervals: RowIntervals, device: torch.device | str) -> BlockTables:
    cols = _blocks(intervals.kv_len)
    start, full_start, full_num, any_num = _interval_edges(intervals, device)
    columns = torch.arange(cols, dtype=torch.int32, device=device)
    partial_idx = _partial_columns(start, full_start, full_num, cols).clamp_(max=cols - 1)
    full_idx = (columns + full_start[..., None]).clamp_(max=cols - 1)
    return BlockTables((any_num - full_num)[:, None], partial_idx[:, None], full_num[:, None], full_idx[:, None])


def _inside(columns: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """bool ``[B, rows, cols]``: ``start <= column < start + count``."""
    return (columns >= start[..., None]) & (columns < (start + count)[..., None])


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """bool ``[B, rows, cols]`` as (num ``[B, 1, rows]``, idx ``[B, 1, rows, cols]``), without a sort."""
    place = wanted.cumsum(-1, dtype=torch.int32)
    cols = wanted.shape[-1]
    # Wanted columns go to their rank, the others to an extra slot that is cut off.
    slot = torch.where(wanted, place - 1, cols).to(torch.int64)
    values = torch.arange(cols, dtype=torch.int32, device=wanted.device).expand_as(slot)
    idx = values.new_zeros(*slot.shape[:-1], cols + 1).scatter(-1, slot, values)[..., :cols]
    return place[..., -1][:, None].contiguous(), idx[:, None].contiguous()
