"""The row intervals of a call with padding or packed documents: made, and their values checked, by one kernel.

``masks.row_intervals`` takes some twenty operations for it, each of which costs the host more than the GPU. Nothing is
remembered from call to call: kernels, CUDA graphs and collectives write to a mask without its version telling of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUMBERS = [
    "blocks",
    "Sq",
    "Skv",
    "shift",
    "left",
    "right",
    "shown_b",
    "shown_kind",
    "ids_b",
    "ids_kind",
    "steps",
    "both",
]


@triton.jit
def _numbers(start, at, inside, kind):
    """int64 elements of a vector; kind: bytes an element, negative if those have no sign."""
    if kind == 8:
        x = tl.load(start.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0)
    elif kind == 4:
        x = tl.load(start.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0).to(tl.int64)
    elif kind == 2:
        x = tl.load(start.to(tl.pointer_type(tl.int16)) + at, mask=inside, other=0).to(tl.int64)
    else:
        x = tl.load(start.to(tl.pointer_type(tl.int8)) + at, mask=inside, other=0).to(tl.int64)
        x = tl.where(kind < 0, x & 255, x)
    return x


@triton.jit
def _row(start, step, kind, b):
    """Batch row b of a matrix whose rows are ``step`` elements apart."""
    return start.to(tl.pointer_type(tl.int8)) + b.to(tl.int64) * step * tl.where(kind < 0, -kind, kind)


@triton.jit
def _first(row, kind, low, high, least, steps, LARGER: tl.constexpr):
    """The first place in [low, high) of a vector that never decreases whose number is ``least`` or more, or LARGER, or
    high."""
    for _ in range(0, steps):
        middle = (low + high) // 2
        number = _numbers(row, middle, low < high, kind)
        below = number <= least if LARGER else number < least
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=NUMBERS)
def row_intervals_kernel(
    Shown, Ids, Lo, Hi, Kept,
    blocks, Sq, Skv, shift, left, right, shown_kind, shown_b, ids_kind, ids_b, steps, both,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lo, Hi int32 ``[B, Sq]`` and, of an attention mask, Kept int32 ``[B, Skv]``, as those of ``masks.RowIntervals``.

    Row i stands at key ``i + shift`` and sees at most the keys ``i + left <= j < i + right``. Shown: an attention mask
    ``[B or 1, Skv]``; Ids: document ids; each with the kind of its numbers as ``_numbers`` has it, 0 for none, and the
    step from one batch row to the next, 0 where they share one. ``both``: rows see the later keys of their document
    too. ``steps``: bits of Skv. A program makes BLOCK rows, and the numbers of as many keys; ``blocks`` of them a batch
    row. Other values than a mask can have fail an assertion.
    """
    b = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    lanes = tl.arange(0, BLOCK)
    at = start + lanes
    lo = tl.maximum(at + left, 0)
    hi = tl.minimum(at + right, Skv)
    if ids_kind != 0:
        ids = _row(Ids, ids_b, ids_kind, b)
        before = _numbers(ids, at - 1, (at > 0) & (at < Skv), ids_kind)
        rises = _numbers(ids, at, at < Skv, ids_kind) >= before
        tl.device_assert(
            rises | (at == 0) | (at >= Skv),
            "document_ids: decreasing, expected ids that never decrease; number them in the row's order",
        )
        place = tl.minimum(at + shift, Skv - 1)
        own = _numbers(ids, place, at < Sq, ids_kind)
        lo = tl.maximum(lo, _first(ids, ids_kind, tl.zeros_like(place), place, own, steps, False))
        if both != 0:
            past = _first(ids, ids_kind, place + 1, tl.full([BLOCK], Skv, tl.int32), own, steps, True)
            hi = tl.minimum(hi, past)
    if shown_kind != 0:
        shown = _row(Shown, shown_b, shown_kind, b)
        least = tl.full([BLOCK], Skv, tl.int32)
        most = tl.full([BLOCK], -1, tl.int32)
        hole = tl.full([BLOCK], -1, tl.int32)
        for block in range(0, tl.cdiv(Skv, BLOCK)):
            keys = block * BLOCK + lanes
            seen = _numbers(shown, keys, keys < Skv, shown_kind) != 0
            least = tl.minimum(least, tl.where(seen, keys, Skv))
            most = tl.maximum(most, tl.where(seen, keys, -1))
            hole = tl.maximum(hole, tl.where((keys < start) & (seen == 0), keys, -1))
        lo = tl.maximum(lo, tl.min(least, 0))
        hi = tl.minimum(hi, tl.max(most, 0) + 1)
        number = _numbers(shown, at, at < Skv, shown_kind)
        tl.device_assert(
            (number == 0) | (number == 1),
            "attention_mask: other numbers than 0 (padding) and 1; pass mask != 0 if that is meant",
        )
        last = tl.associative_scan(tl.where(number != 0, -1, at), 0, _larger)
        last = tl.maximum(last, tl.max(hole, 0))
        tl.store(Kept + b.to(tl.int64) * Skv + at, at - last, mask=at < Skv)
    empty = lo >= hi
    rows = b.to(tl.int64) * Sq + at
    tl.store(Lo + rows, tl.where(empty, Skv, lo), mask=at < Sq)
    tl.store(Hi + rows, tl.where(empty, 0, hi), mask=at < Sq)
