"""Decoding and prefill in chunks over a paged cache: the keys are read through each sequence's table of pages.

As ``decode``, with a block of query rows a program and pages in place of one stretch of keys; its
``combine_kernel`` joins the shares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softcap_runtime.cuda.triton.common import FAR, INTS
from softcap_runtime.cuda.triton.forward import softmax_step

# Keys that a page holds at the least; blocks of keys are multiples of it.
FEWEST = tl.constexpr(16)


@triton.jit
def _pages_of(table, first, end, num_pages, page_bits, BLOCK_N: tl.constexpr):
    """The page of each of the keys from ``first`` on: a load for each 16, as no page holds fewer."""
    places = tl.arange(0, BLOCK_N)
    found = tl.zeros([BLOCK_N], tl.int32)
    for part in tl.static_range(BLOCK_N // FEWEST):
        key = first + part * FEWEST
        page = tl.load(table + (key >> page_bits), mask=key < end, other=0)
        # A table that names no page reads another: memory outside of the cache is never touched.
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
        found = tl.where(places >= part * FEWEST, page, found)
    return found


@triton.jit
def _load_keys(source, page, stride_page, stride_s, keys, end, page_bits, D: tl.constexpr, DPAD: tl.constexpr,
               ALIGN: tl.constexpr):  # fmt: skip
    """Rows ``keys`` of one head of a sequence, each in its ``page``, as ``[keys, DPAD]``; 0 from ``end`` on."""
    columns = tl.arange(0, DPAD)
    at = page.to(tl.int64) * stride_page + (keys & ((1 << page_bits) - 1)).to(tl.int64) * stride_s
    mask = (keys < end)[:, None]
    if D != DPAD:
        mask &= columns[None, :] < D
    return tl.load(source + (at * ALIGN)[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=[*INTS, "pages", "num_pages", "page_bits"])
def paged_kernel(
    Q, K, V, Out, Lse, Table, Lengths, Offsets,
    sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s,
    Hq, Hkv, G, Sq, blocks, pages, num_pages, page_bits, splits, left, right, inner, coef, bias, reference,
    RAGGED: tl.constexpr, ONLINE: tl.constexpr, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Out ``[splits, B, Hq, Sq, DPAD]`` and Lse ``[splits, B, Hq, Sq]`` float32, contiguous, of one share.

    ``Table`` int32 ``[sequences, pages]``, ``Lengths`` int32 ``[sequences]``; ``sk_b`` and ``sv_b`` lead from page to
    page, which holds ``1 << page_bits`` keys. RAGGED: the rows of all sequences lie in one batch row, where int32
    ``Offsets`` ``[sequences + 1]`` say; else a batch row is a sequence.

    NaN are the rows of a block that sees a page that isn't there, and those of a sequence with more keys than its table
    holds or fewer than it has rows.
    """
    # The heads of the same keys run together: they lie side by side in a page.
    hk = tl.program_id(0) % Hkv
    rest = tl.program_id(0) // Hkv
    split = rest % splits
    block = rest // splits % blocks
    b = rest // splits // blocks
    if RAGGED:
        first_row = tl.minimum(tl.maximum(tl.load(Offsets + b), 0), Sq)
        count = tl.minimum(tl.load(Offsets + b + 1), Sq) - first_row
        batch = 0
    else:
        first_row = 0
        count = Sq
        batch = b
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = packed < G * count
    # Row by row, the heads of a group side by side: a block of rows sees few keys more than one row.
    h = hk * G + packed % G
    row = packed // G
    said = tl.load(Lengths + b)
    length = tl.minimum(said, pages << page_bits)
    place = length - count + row
    lo = tl.maximum(place + left, 0)
    hi = tl.minimum(place + right, length)
    empty = (lo >= hi) | (packed >= G * count)
    lo = tl.where(empty, FAR, lo)
    hi = tl.where(empty, 0, hi)
    first = tl.min(lo, 0) // BLOCK_N
    end = tl.cdiv(tl.max(hi, 0), BLOCK_N)
    share = tl.cdiv(tl.maximum(end - first, 0), splits)
    start = first + split * share
    stop = tl.minimum(start + share, end)

    columns = tl.arange(0, DPAD)
    at_row = (first_row + row).to(tl.int64)
    q_at = (batch * sq_b + h.to(tl.int64) * sq_h + at_row * sq_s) * ALIGN
    q = tl.load(Q + q_at[:, None] + columns[None, :], mask=inside[:, None] & (columns[None, :] < D), other=0.0)
    table = Table + b.to(tl.int64) * pages
    key_head = K + hk.to(tl.int64) * sk_h * ALIGN
    value_head = V + hk.to(tl.int64) * sv_h * ALIGN
    # All pages of this share are looked at here, so that the loop below, which is bound by memory, does nothing more.
    wrong = (said > length) | (said < count)
    past_page = tl.cdiv(tl.minimum(stop * BLOCK_N, length), 1 << page_bits)
    for first_page in tl.range((start * BLOCK_N) >> page_bits, past_page, 256):
        places = first_page + tl.arange(0, 256)
        named = tl.load(table + places, mask=places < past_page, other=0)
        wrong |= tl.max(((named < 0) | (named >= num_pages)).to(tl.int32), 0) != 0
    acc = tl.zeros([BLOCK_M, DPAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for step in tl.range(start, stop, num_stages=STAGES):
        keys = step * BLOCK_N + tl.arange(0, BLOCK_N)
        page = _pages_of(table, step * BLOCK_N, length, num_pages, page_bits, BLOCK_N)
        k = _load_keys(key_head, page, sk_b, sk_s, keys, length, page_bits, D, DPAD, ALIGN)
        x = tl.dot(q, k.T, input_precision=PRECISION)
        visible = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        p, alpha, m, l, _ = softmax_step(
            x, visible, m, l, 0.0, inner, coef, bias, q.dtype, True, ONLINE, False, FORM, ASM
        )
        if ONLINE:
            acc = acc * alpha[:, None]
        v = _load_keys(value_head, page, sv_b, sv_s, keys, length, page_bits, D, DPAD, ALIGN)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)

    l = tl.where(wrong, float("nan"), l)
    seen = l != 0  # NaN is seen
    acc = acc * tl.where(seen, 1.0 / l, 0.0)[:, None]
    top = m if ONLINE else reference
    lse = tl.where(seen, tl.log2(l) + top, float("-inf"))
    sequences = tl.num_programs(0) // splits // blocks // Hkv
    heads = (1 if RAGGED else sequences) * Hq
    at = ((split * heads + batch * Hq + h).to(tl.int64)) * Sq + at_row
    tl.store(Out + at[:, None] * DPAD + columns[None, :], acc, mask=inside[:, None])
    tl.store(Lse + at, lse, mask=inside)
