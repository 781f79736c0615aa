"""The decoding kernels: few query rows against a long cache, so the keys are split among programs.

One program reads one share of the keys of one kv head once, for all query heads of its group and all query rows
(their product is the M of the matrix product), and leaves its share's normalised output and logsumexp; a second
kernel weighs the shares by their logsumexp (FlashDecoding, Dao et al. 2023). Bound by memory: k and v are
read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softcap_runtime.cuda.triton.common import INTS, LN2, kept_keys, kept_row, load_tile, row_intervals
from softcap_runtime.cuda.triton.forward import softmax_step


@triton.jit(do_not_specialize=INTS)
def decode_kernel(
    Q, K, V, Out, Lse, Lo, Hi, Kept,
    sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, slo_b,
    Hq, Hkv, G, Sq, Skv, splits, left, right, kept_len, inner, coef, bias, reference,
    BAND: tl.constexpr, ONLINE: tl.constexpr, TOTAL: tl.constexpr, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Out ``[splits, B, Hq, Sq, DPAD]`` and Lse ``[splits, B, Hq, Sq]`` float32, contiguous, of one share.

    Kept and ``kept_len``: as ``forward_kernel``'s.
    """
    # One dimension, as the others have no room for any batch; the shares of a head side by side.
    split = tl.program_id(0) % splits
    pair = tl.program_id(0) // splits
    b = pair // Hkv
    hk = pair % Hkv
    packed = tl.arange(0, BLOCK_M)
    inside = packed < G * Sq
    h = hk * G + packed // Sq
    row = packed % Sq
    lo, hi = row_intervals(row, Lo, Hi, slo_b, b, left, right, Sq, Skv, BAND)
    # Every program cuts the keys that its own rows see, so a short window or prompt has no idle share.
    first = tl.min(lo, 0) // BLOCK_N
    end = tl.cdiv(tl.max(hi, 0), BLOCK_N)
    share = tl.cdiv(tl.maximum(end - first, 0), splits)
    start = first + split * share
    stop = tl.minimum(start + share, end)

    kept_at = kept_row(b, slo_b, Skv)
    columns = tl.arange(0, DPAD)
    q_at = (b.to(tl.int64) * sq_b + h.to(tl.int64) * sq_h + row.to(tl.int64) * sq_s) * ALIGN
    q = tl.load(Q + q_at[:, None] + columns[None, :], mask=inside[:, None] & (columns[None, :] < D), other=0.0)
    acc = tl.zeros([BLOCK_M, DPAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for block in tl.range(start, stop, num_stages=STAGES):
        n = block * BLOCK_N
        k = load_tile(K, sk_b, sk_h, sk_s, b, hk, n, Skv, BLOCK_N, D, DPAD, False, ALIGN)
        x = tl.dot(q, k.T, input_precision=PRECISION)
        keys = n + tl.arange(0, BLOCK_N)
        keys = kept_keys(keys, Kept, kept_at, kept_len, BAND)
        visible = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        p, alpha, m, l, total = softmax_step(
            x, visible, m, l, total, inner, coef, bias, q.dtype, True, ONLINE, TOTAL, FORM, ASM
        )
        if ONLINE:
            acc = acc * alpha[:, None]
        v = load_tile(V, sv_b, sv_h, sv_s, b, hk, n, Skv, BLOCK_N, D, DPAD, False, ALIGN)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)

    seen = l != 0  # NaN is seen
    acc = acc * tl.where(seen, 1.0 / (total if TOTAL else l), 0.0)[:, None]
    top = m if ONLINE else reference
    lse = tl.where(seen, tl.log2(l) + top, float("-inf"))
    heads = tl.num_programs(0) // splits // Hkv * Hq
    at = ((split * heads + b * Hq + h) * Sq + row).to(tl.int64)
    tl.store(Out + at[:, None] * DPAD + columns[None, :], acc, mask=inside[:, None])
    tl.store(Lse + at, lse, mask=inside)


@triton.jit(do_not_specialize=INTS)
def combine_kernel(
    PartOut, PartLse, Out, Lse, so_b, so_h, so_s, Hq, Sq, splits,
    D: tl.constexpr, DPAD: tl.constexpr, SPLITS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Out ``[B, Hq, Sq, D]`` (any strides) and Lse ``[B, Hq, Sq]`` of one row from its shares (Lse in log2)."""
    at = tl.program_id(0)
    rows = tl.num_programs(0)
    row = at % Sq
    h = at // Sq % Hq
    b = at // Sq // Hq
    share = tl.arange(0, SPLITS)
    columns = tl.arange(0, DPAD)
    inside = share < splits
    lse = tl.load(PartLse + share * rows + at, mask=inside, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top > float("-inf"), top, 0.0))
    total = tl.sum(weight, 0)
    seen = total != 0  # NaN is seen
    parts = tl.load(
        PartOut + (share * rows + at).to(tl.int64)[:, None] * DPAD + columns[None, :],
        mask=inside[:, None], other=0.0,
    )  # fmt: skip
    out = tl.sum(parts * weight[:, None], 0) / tl.where(seen, total, 1.0)
    target = Out + (b.to(tl.int64) * so_b + h.to(tl.int64) * so_h + row.to(tl.int64) * so_s) * ALIGN
    tl.store(target + columns, out.to(Out.dtype.element_ty), mask=columns < D)
    tl.store(Lse + at, tl.where(seen, (tl.log2(total) + top) * LN2, float("-inf")))
