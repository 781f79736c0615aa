"""Masks as row intervals: query row i of batch row b sees the keys ``lo <= j < hi``.

Causal, sliding window, padding, packed documents, prefixes, bidirectional spans and per-row caches all have that form
and combine by intersection, in O(rows), without an S x S mask. Plain causal and window masks need no tensors at all:
their rows are a band, two integers. Padding with holes adds a vector of the keys that are kept.

Query row i stands at key position ``kv_len - q_len + i`` (bottom-right); with a cache of ``n`` valid keys, at
``n - q_len + i``; or at any position that the caller gives, as no row depends on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcap_runtime.config import checked_count
from softcap_runtime.masks.padding import may_have_holes, padding_edges
from softcap_runtime.reference import visible

# Stands for "no bound": far above any length, and adding a row to it still fits int32.
UNBOUNDED = 2**30


class RowIntervals(NamedTuple):
    """Which keys each query row sees, as a band or as two vectors.

    ``left``, ``right``: the band form; row i sees ``max(0, i + left) <= j < min(kv_len, i + right)``, where
    ``-UNBOUNDED`` and ``UNBOUNDED`` stand for no bound. None in the interval form.
    ``lo``, ``hi``: the interval form; int32 ``[B, q_len]``, contiguous, within ``[0, kv_len]``, B may be 1. A
    row that sees nothing has ``lo == kv_len, hi == 0``, so it drops out of every minimum of ``lo`` and
    maximum of ``hi``. None in the band form.
    ``kept``: int32 ``[B, kv_len]``, contiguous, with the B of ``lo``: the number of consecutive kept keys that end at
    this one; no row sees a key whose number is 0. So one number tells whether a range of keys has holes. None: all keys
    are kept, as in the band form.
    """

    q_len: int
    kv_len: int
    left: int | None
    right: int | None
    lo: Tensor | None
    hi: Tensor | None
    kept: Tensor | None = None

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """``lo``, ``hi`` and, if there is one, ``kept``; empty for a band."""
        if self.lo is None or self.hi is None:
            return ()
        return (self.lo, self.hi) if self.kept is None else (self.lo, self.hi, self.kept)

    @property
    def form(self) -> RowIntervals:
        """The mask without contents: its vectors on the meta device. For what outlives a call."""
        if self.lo is None or self.hi is None:
            return self
        kept = None if self.kept is None else self.kept.to("meta")
        return self._replace(lo=self.lo.to("meta"), hi=self.hi.to("meta"), kept=kept)


def band(q_len: int, kv_len: int, *, causal: bool, window: int | None) -> RowIntervals:
    """The mask of causal and window alone, without tensors.

    A row at position p sees ``0 <= p - j < window`` when causal, ``|p - j| < window`` when not.
    """
    offset = kv_len - q_len
    reach = UNBOUNDED if window is None else min(window, UNBOUNDED)
    left = -UNBOUNDED if window is None else max(offset + 1 - reach, -UNBOUNDED)
    right = offset + 1 if causal else min(offset + reach, UNBOUNDED)
    return RowIntervals(q_len, kv_len, left, right, None, None)


def row_intervals(
    q_len: int,
    kv_len: int,
    *,
    causal: bool,
    window: int | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    spans: Tensor | None = None,
    cache_lengths: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> RowIntervals:
    """The intersection of everything given; a band if no tensor is given.

    ``attention_mask``: ``[B, kv_len]``, bool or 0/1; no row sees a key that is 0. Padding left, right or both moves
    ``lo`` and ``hi``; if there may be holes, ``kept`` is made too.
    ``document_ids``: ``[B, kv_len]``, non-decreasing integers; a position sees only keys with its own id.
    ``prefix_lengths``: ``[B]`` integers; the span ``[0, prefix)``.
    ``spans``: ``[B, N, 2]`` integers, half-open, disjoint, ``start == end`` for an unused slot; positions of
    one span see each other, both ways, and the window then bounds ``|p - j|``. Without causal everything is
    visible both ways already: neither prefixes nor spans change anything.
    ``cache_lengths``: ``[B]`` integers; the number of valid keys in each batch row, including the new ones.
    ``query_positions``: ``[q_len]`` or ``[B, q_len]`` integers; the key position of each query row, in any order;
    ``kv_len - q_len + i`` (or ``cache_lengths - q_len + i``) if not given.

    O(B * kv_len), no host-device synchronisation, traceable by torch.compile. B may be 1 in any tensor.
    Raises TypeError or ValueError for a window that is no integer of at least 1. Nothing else is checked here: see
    ``validate.check_mask_arguments``.
    """
    if window is not None:
        window = checked_count("window", window)
    kept = attention_mask if attention_mask is not None and may_have_holes(attention_mask) else None
    given = (attention_mask, document_ids, prefix_lengths, spans, cache_lengths, query_positions)
    devices = [tensor.device for tensor in given if tensor is not None]
    if not devices:
        return band(q_len, kv_len, causal=causal, window=window)

    own = None if query_positions is None else query_positions.to(torch.int32).view(-1, q_len)
    origin = kv_len - q_len if cache_lengths is None else cache_lengths.to(torch.int32)[:, None] - q_len

    def positions(shift: int = 0) -> Tensor:
        """The positions of the queries, plus ``shift``: ``[1, q_len]`` unless they differ between batch rows."""
        if own is not None:
            return own + shift
        start = shift + origin if isinstance(origin, int) else shift
        made = torch.arange(start, start + q_len, dtype=torch.int32, device=devices[0])[None]
        return made if isinstance(origin, int) else made + origin

    two_way = prefix_lengths is not None or spans is not None
    last_keys = own is None and cache_lengths is None and q_len <= kv_len

    def at_queries(per_key: Tensor) -> Tensor:
        return per_key[:, kv_len - q_len :] if last_keys else _at_positions(per_key, positions(), kv_len)

    hi = positions(1) if causal else torch.full_like(positions(), kv_len)
    if causal and two_way:
        hi = torch.maximum(hi, at_queries(_span_ends(kv_len, prefix_lengths, spans)))
    lo = None
    if window is not None:
        reach = min(window, UNBOUNDED)
        lo = positions(1 - reach)
        if two_way or not causal:
            hi = torch.minimum(hi, positions(reach))
    if document_ids is not None:
        starts, ends = _document_edges(document_ids, ends=two_way or not causal)
        lo = _later(lo, at_queries(starts))
        if ends is not None:
            hi = torch.minimum(hi, at_queries(ends))
    if attention_mask is not None:
        first, last = padding_edges(attention_mask)
        lo, hi = _later(lo, first), torch.minimum(hi, last)
    if cache_lengths is not None:
        hi = torch.minimum(hi, cache_lengths.to(torch.int32)[:, None])
    if lo is not None and document_ids is not None and attention_mask is None and last_keys:
        # Within its document a row sees itself and existing keys: nothing to clip. Every operation counts, as each
        # call with a packed batch makes its mask, and the GPU waits for the host.
        return _intervals(q_len, kv_len, *torch.broadcast_tensors(lo, hi))
    intervals = clipped(q_len, kv_len, torch.zeros_like(hi) if lo is None else lo, hi)
    return intervals if kept is None else with_kept(intervals, kept)


def with_kept(intervals: RowIntervals, kept: Tensor) -> RowIntervals:
    """The mask without the keys that ``kept`` ``[B or 1, kv_len]``, bool or numbers, hides (False or 0)."""
    shown = kept != 0 if intervals.kept is None else (kept != 0) & (intervals.kept != 0)
    lo, hi = edges(intervals, shown.device)
    keys = torch.arange(intervals.kv_len, dtype=torch.int32, device=shown.device)
    runs = keys - torch.where(shown, -1, keys).cummax(1).values
    if torch.compiler.is_compiling():
        # Zeros of each other are added, to give all as many rows: comparing counts would give one row its own graph.
        lo, hi, runs = lo + 0 * runs[:, :1], hi + 0 * runs[:, :1], runs + 0 * lo[:, :1]
    elif lo.shape[0] != runs.shape[0]:
        batch = max(lo.shape[0], runs.shape[0])
        lo, hi, runs = (x.expand(batch, -1).contiguous() for x in (lo, hi, runs))
    return RowIntervals(intervals.q_len, intervals.kv_len, None, None, lo, hi, runs)


def contiguous(intervals: RowIntervals) -> RowIntervals:
    """The same, each vector without gaps: kernels are told where one begins, not how it lies.

    Rows that a caller cuts out of another mask, or one row expanded for a batch, have gaps.
    """
    if all(x.is_contiguous() for x in intervals.vectors):
        return intervals
    lo, hi, kept = (None if x is None else x.contiguous() for x in (intervals.lo, intervals.hi, intervals.kept))
    return intervals._replace(lo=lo, hi=hi, kept=kept)


def edges(intervals: RowIntervals, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """``lo`` and ``hi`` of either form, regardless of ``kept``: int32 ``[B or 1, q_len]``."""
    q_len, kv_len, left, right, lo, hi, _ = intervals
    if lo is not None and hi is not None:
        return lo.to(device), hi.to(device)
    rows = torch.arange(q_len, dtype=torch.int32, device=device)[None]
    return _clipped(kv_len, rows + (left or 0), rows + (right or 0))


def dense(intervals: RowIntervals, device: torch.device | str) -> Tensor:
    """The mask element by element: bool ``[B or 1, q_len, kv_len]``, True where row i sees key j."""
    shown = visible(*edges(intervals, device), intervals.kv_len)
    return shown if intervals.kept is None else shown & (intervals.kept.to(device) != 0)[:, None]


def combined(a: RowIntervals, b: RowIntervals, device: torch.device, *, union: bool = False) -> RowIntervals:
    """The intersection of two masks; a band if both are bands.

    With ``union``, for masks that keep all keys: each row from the smaller ``lo`` to the larger ``hi``.
    """
    if a.left is not None and a.right is not None and b.left is not None and b.right is not None:
        # By name, here: torch.export has functions of its own in the place of min and max.
        first, last = (min, max) if union else (max, min)
        return a._replace(left=first(a.left, b.left), right=last(a.right, b.right))
    (a_lo, a_hi), (b_lo, b_hi) = edges(a, device), edges(b, device)
    lo, hi = (torch.minimum, torch.maximum) if union else (torch.maximum, torch.minimum)
    made = clipped(a.q_len, a.kv_len, lo(a_lo, b_lo), hi(a_hi, b_hi))
    for kept in (a.kept, b.kept):
        made = made if kept is None else with_kept(made, kept.to(device))
    return made


def clipped(q_len: int, kv_len: int, lo: Tensor, hi: Tensor) -> RowIntervals:
    """Row intervals of any edges ``[B or 1, q_len]``: clipped to the keys, and empty rows in their one form."""
    return _intervals(q_len, kv_len, *_clipped(kv_len, lo, hi))


def _intervals(q_len: int, kv_len: int, lo: Tensor, hi: Tensor) -> RowIntervals:
    return RowIntervals(q_len, kv_len, None, None, lo.contiguous(), hi.contiguous())


def _later(lo: Tensor | None, start: Tensor) -> Tensor:
    return start if lo is None else torch.maximum(lo, start)


def _clipped(kv_len: int, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    lo, hi = torch.broadcast_tensors(lo.clamp(min=0), hi.clamp(max=kv_len))
    empty = lo >= hi
    return lo.masked_fill(empty, kv_len), hi.masked_fill(empty, 0)


def _at_positions(values: Tensor, positions: Tensor, kv_len: int) -> Tensor:
    """``values`` ``[B, kv_len]`` at the query positions.

    0 at positions before the first key (with more queries than keys, or than the cache holds).
    """
    index = positions.clamp(0, kv_len - 1).to(torch.int64)
    batch = max(values.shape[0], index.shape[0])
    found = values.expand(batch, -1).gather(1, index.expand(batch, -1))
    return found.masked_fill(positions < 0, 0)


def _document_edges(document_ids: Tensor, *, ends: bool) -> tuple[Tensor, Tensor | None]:
    """Where each key's document starts and, with ``ends``, where it ends: int32 ``[B, kv_len]``."""
    if document_ids.device.type != "cpu" or _is_short(document_ids):
        # A search per key, all in parallel: torch's scan along a row is serial on a GPU (80 us for 32,768 keys, H100).
        starts = torch.searchsorted(document_ids, document_ids, out_int32=True)
        past = torch.searchsorted(document_ids, document_ids, out_int32=True, right=True) if ends else None
        return starts, past
    kv_len = document_ids.shape[1]
    keys = torch.arange(kv_len, dtype=torch.int32, device=document_ids.device)
    # Whole rows are compared, the first key with the last, where either answer is right: slicing would make two keys a
    # special case in a graph of any length.
    starts = keys.masked_fill(document_ids == document_ids.roll(1, 1), 0).cummax(1).values
    if not ends:
        return starts, None
    after = (keys + 1).masked_fill(document_ids == document_ids.roll(-1, 1), kv_len)
    return starts, after.flip(1).cummin(1).values.flip(1)


def _is_short(ids: Tensor) -> bool:
    """Whether searching on a CPU is faster than seven vector operations: 2 against 20 us for 8 ids, 9 against 22 for
    512, 32 against 27 for 2,048."""
    return not torch.compiler.is_compiling() and ids.is_contiguous() and ids.numel() <= 1024


def _span_ends(kv_len: int, prefix_lengths: Tensor | None, spans: Tensor | None) -> Tensor:
    """For each key the largest end of the spans that start at or before it: int32 ``[B, kv_len]``.

    Spans are disjoint, so a key lies inside one exactly if that end is past it.
    """
    ends = None
    if spans is not None:
        batch = spans.shape[0]
        start, end = spans.to(torch.int64).clamp(0, kv_len).unbind(-1)
        # Unused slots write to an extra column, which is cut off.
        start = torch.where(start < end, start, kv_len)
        ends = torch.zeros(batch, kv_len + 1, dtype=torch.int32, device=spans.device)
        ends = ends.scatter(1, start, end.to(torch.int32))[:, :kv_len].cummax(1).values
    if prefix_lengths is not None:
        prefix = prefix_lengths.to(torch.int32)[:, None].expand(-1, kv_len)
        ends = prefix if ends is None else torch.maximum(ends, prefix)
    assert ends is not None
    return ends
