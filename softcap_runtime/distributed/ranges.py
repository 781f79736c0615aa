"""Arithmetic on ascending, disjoint, half-open ranges of rows and keys; and row intervals restricted to them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def length(ranges: Iterable[Range]) -> int:
    """The number of rows in all ranges."""
    return sum(end - start for start, end in ranges)


def merged(ranges: Iterable[Range]) -> Ranges:
    """The same rows as ascending ranges: adjacent and overlapping ones joined, empty ones dropped."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return tuple(joined)


def common(a: Ranges, b: Ranges) -> Ranges:
    """The intersection."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def placed(own: Ranges, ranges: Ranges) -> Ranges:
    """The intersection, as places among the rows of ``own``, counted from 0."""
    starts = [start for start, _ in own]
    before = list(itertools.accumulate((end - start for start, end in own), initial=0))
    found = []
    for start, end in common(own, ranges):
        at = bisect.bisect_right(starts, start) - 1
        shift = before[at] - starts[at]
        found.append((start + shift, end + shift))
    return tuple(found)


def pairs_of(mask: RowIntervals, ranges: Sequence[Range]) -> list[int]:
    """The number of visible pairs of a row and a key for each range of rows, over the batch rows of the mask."""
    if mask.left is not None and mask.right is not None:
        kv_len, left, right = mask.kv_len, mask.left, mask.right
        return [
            _sum_clipped(a + right, b + right, kv_len) - _sum_clipped(a + left, b + left, kv_len) for a, b in ranges
        ]
    lo, hi = mask.vectors
    seen = (hi.to(torch.int64) - lo).clamp_(min=0).sum(0)
    before = torch.nn.functional.pad(seen.cumsum(0), (1, 0))
    return [int(before[end] - before[start]) for start, end in ranges]


def _sum_clipped(start: int, end: int, top: int) -> int:
    """The sum of x from start to end - 1, each x kept within [0, top]."""

    def below(x: int) -> int:
        inside = min(max(x, 0), top + 1)
        return inside * (inside - 1) // 2 + max(x - top - 1, 0) * top

    return below(end) - below(start)


def keys_seen(mask: RowIntervals, rows: Ranges) -> Ranges:
    """The keys that any of these rows sees, in any batch row."""
    if mask.left is not None and mask.right is not None:
        # Rows side by side see their own keys at least, so no gap is between the first's and the last's.
        edges = [(max(0, a + mask.left), min(mask.kv_len, b - 1 + mask.right)) for a, b in rows]
        return merged(edges)
    lo, hi = (_rows(edge, rows).flatten().to(torch.int64) for edge in mask.vectors)
    # Only from the first to the last key seen, which for most masks is a part of all. An empty row has lo past the last
    # key, and hi before the first.
    first, last = int(lo.min()), int(hi.max())
    if first >= last:
        return ()
    weight = (lo < hi).to(torch.int32)
    marks = torch.zeros(last - first + 1, dtype=torch.int32)
    marks.scatter_add_(0, (lo - first).clamp_(max=last - first), weight)
    marks.scatter_add_(0, (hi - first).clamp_(min=0), -weight)
    seen = torch.nn.functional.pad((marks[:-1].cumsum(0) > 0).to(torch.int8), (1, 1))
    turns = ((seen[1:] != seen[:-1]).nonzero()[:, 0] + first).tolist()
    return tuple(zip(turns[::2], turns[1::2], strict=True))


def rows_within(mask: RowIntervals, own: Range) -> Range:
    """The longest range of rows within ``own`` that see no key outside ``own``; may be empty."""
    start, end = own
    if mask.left is not None and mask.right is not None:
        first = start if start == 0 else max(start, start - mask.left)
        last = end if end == mask.kv_len else min(end, end - mask.right + 1)
        return first, max(first, last)
    lo, hi = (edge[:, start:end] for edge in mask.vectors)
    inside = ((lo >= start) & (hi <= end)).all(0).to(torch.int8)
    padded = torch.nn.functional.pad(inside, (1, 1))
    turns = (padded[1:] != padded[:-1]).nonzero()[:, 0].view(-1, 2)
    if not len(turns):
        return start, start
    first, last = turns[int((turns[:, 1] - turns[:, 0]).argmax())].tolist()
    return start + first, start + last


def renumbered(mask: RowIntervals, rows: Ranges, keys: Ranges) -> RowIntervals:
    """The mask of some rows over some keys: row intervals again, as ``keys`` must include all that the rows see.

    Each edge becomes the number of chosen keys before it; a band over one range of rows and keys stays a band.
    """
    q_len, kv_len = length(rows), length(keys)
    if mask.left is not None and mask.right is not None:
        if len(rows) == len(keys) == 1:
            shift = rows[0][0] - keys[0][0]
            left = mask.left if mask.left <= -UNBOUNDED else mask.left + shift
            right = mask.right if mask.right >= UNBOUNDED else mask.right + shift
            return RowIntervals(q_len, kv_len, left, right, None, None)
        places = torch.cat([torch.arange(*own, dtype=torch.int32) for own in rows])[None]
        lo, hi = (places + edge for edge in (mask.left, mask.right))
    else:
        lo, hi = (_rows(edge, rows) for edge in mask.vectors)
    lo, hi = _counted(lo, keys), _counted(hi, keys)
    empty = lo >= hi
    return RowIntervals(
        q_len, kv_len, None, None, lo.masked_fill_(empty, kv_len).contiguous(), hi.masked_fill_(empty, 0).contiguous()
    )


def _rows(edge: Tensor, rows: Ranges) -> Tensor:
    return torch.cat([edge[:, start:end] for start, end in rows], 1)


def _counted(edges: Tensor, keys: Ranges) -> Tensor:
    """The number of chosen keys before each edge: int32, in the shape of ``edges``."""
    if len(keys) == 1:
        return (edges - keys[0][0]).clamp_(0, length(keys))
    starts, ends = torch.tensor(keys, dtype=torch.int32).unbind(1)
    sizes = ends - starts
    before = sizes.cumsum(0, dtype=torch.int32) - sizes
    at = torch.searchsorted(starts.contiguous(), edges.contiguous(), right=True).sub_(1).clamp_(min=0)
    return before[at] + (edges - starts[at]).clamp_(min=0).minimum(sizes[at])
