"""The forward kernel: one program a block of query rows of one head.

With a softcap up to 64 (``ONLINE=False``) the logits are bounded, so the weights are ``exp`` against a fixed
reference: no running maximum, no rescaling of the accumulator, and blocks may come in any order. Otherwise, and
for float16, whose weights would underflow against a fixed reference, the online softmax (Milakov and Gimelshein
2018; FlashAttention-2, Dao 2023, algorithm 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from softcap_runtime.cuda.triton.common import (
    INTS,
    LN2,
    block_ranges,
    capped,
    exp2,
    fixed_weights,
    kept_keys,
    kept_row,
    load_tile,
    row_intervals,
    store_tile,
)


@triton.jit
def softmax_step(
    x, visible, m, l, total, inner, coef, bias, dtype: tl.constexpr,
    MASKED: tl.constexpr, ONLINE: tl.constexpr, TOTAL: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Weights of a block of raw products ``x`` and the statistics after it: ``(p, alpha, m, l, total)``.

    ``alpha`` rescales what was accumulated before (1 without ONLINE). All in log2 units; without ONLINE ``bias`` holds
    the fixed reference. With TOTAL, for training, ``total`` is the sum of the weights as they are rounded to ``dtype``,
    by which output is divided: where one key has nearly all the weight, the error of that weight then cancels. The
    gradients there are differences that it would exceed (inputs x 30: 1.2e-2 in place of 2.6e-3). ONLINE needs none:
    its largest weight is 1, without error.
    """
    if ONLINE:
        z, _ = capped(x, inner, coef, bias, FORM, ASM)
        if MASKED:
            z = tl.where(visible, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        # A row that has seen nothing yet has m = -inf; 0 in its place keeps -inf - m from being NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = exp2(z - shift[:, None], ASM)
        alpha = exp2(m - shift, ASM)
        return p.to(dtype), alpha, m_new, l * alpha + tl.sum(p, 1), total
    else:
        p = fixed_weights(x, inner, coef, bias, FORM, ASM)
        if MASKED:
            p = tl.where(visible, p, 0.0)
        rounded = p.to(dtype)
        if TOTAL:
            total += tl.sum(rounded.to(tl.float32), 1)
        return rounded, 1.0, m, l + tl.sum(p, 1), total


@triton.jit
def _step(
    q, acc, m, l, total, lo, hi, K, V, Kept, kept_at, kept_len, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, b, hk, n, Skv,
    inner, coef, bias,
    MASKED: tl.constexpr, BAND: tl.constexpr, ONLINE: tl.constexpr, TOTAL: tl.constexpr, FORM: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    k = load_tile(K, sk_b, sk_h, sk_s, b, hk, n, Skv, BLOCK_N, D, DPAD, TMA, ALIGN)
    x = tl.dot(q, k.T, input_precision=PRECISION)
    keys = n + tl.arange(0, BLOCK_N)
    if MASKED:
        keys = kept_keys(keys, Kept, kept_at, kept_len, BAND)
    visible = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
    p, alpha, m, l, total = softmax_step(
        x, visible, m, l, total, inner, coef, bias, q.dtype, MASKED, ONLINE, TOTAL, FORM, ASM
    )
    if ONLINE:
        acc = acc * alpha[:, None]
    v = load_tile(V, sv_b, sv_h, sv_s, b, hk, n, Skv, BLOCK_N, D, DPAD, TMA, ALIGN)
    return tl.dot(p, v, acc, input_precision=PRECISION), m, l, total


@triton.jit(do_not_specialize=INTS)
def forward_kernel(
    Q, K, V, Out, Lse, Lo, Hi, Kept,
    sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, so_b, so_h, so_s, slo_b,
    Hq, G, Sq, Skv, left, right, kept_len, inner, coef, bias, reference,
    BAND: tl.constexpr, ONLINE: tl.constexpr, TOTAL: tl.constexpr, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Out ``[B, Hq, Sq, D]`` (any strides) and Lse ``[B, Hq, Sq]`` float32 for one block of query rows.

    No row sees a key that is 0 in Kept, int32 ``[B or 1, Skv]`` as ``masks.RowIntervals`` has it; ``kept_len`` is Skv,
    or 0 where Kept is not read.
    Programs of one head follow each other with the longest rows first: the head's keys stay in L2, and the
    short blocks fill the gaps at the end.
    """
    blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    start = (blocks - 1 - pid % blocks) * BLOCK_M
    head = pid // blocks
    b = head // Hq
    h = head % Hq
    hk = h // G
    rows = start + tl.arange(0, BLOCK_M)
    lo, hi = row_intervals(rows, Lo, Hi, slo_b, b, left, right, Sq, Skv, BAND)
    kept_at = kept_row(b, slo_b, Skv)
    first, full_first, full_end, end = block_ranges(lo, hi, Kept, kept_at, kept_len, BLOCK_N, BAND)

    q = load_tile(Q, sq_b, sq_h, sq_s, b, h, start, Sq, BLOCK_M, D, DPAD, TMA, ALIGN)
    acc = tl.zeros([BLOCK_M, DPAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for block in tl.range(full_first, full_end, num_stages=STAGES):
        acc, m, l, total = _step(
            q, acc, m, l, total, lo, hi, K, V, Kept, kept_at, kept_len, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, b, hk,
            block * BLOCK_N, Skv, inner, coef, bias, False, BAND, ONLINE, TOTAL, FORM, BLOCK_N, D, DPAD, PRECISION,
            TMA, ALIGN, ASM,
        )  # fmt: skip
    before = tl.minimum(full_first, end) - first
    for edge in tl.range(0, before + end - full_end, num_stages=STAGES):
        block = tl.where(edge < before, first + edge, full_end + edge - before)
        acc, m, l, total = _step(
            q, acc, m, l, total, lo, hi, K, V, Kept, kept_at, kept_len, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, b, hk,
            block * BLOCK_N, Skv, inner, coef, bias, True, BAND, ONLINE, TOTAL, FORM, BLOCK_N, D, DPAD, PRECISION,
            TMA, ALIGN, ASM,
        )  # fmt: skip

    seen = l != 0  # NaN is seen
    acc = acc * tl.where(seen, 1.0 / (total if TOTAL else l), 0.0)[:, None]
    store_tile(Out, so_b, so_h, so_s, b, h, start, Sq, acc, BLOCK_M, D, DPAD, ALIGN)
    top = m if ONLINE else reference
    lse = tl.where(seen, (tl.log2(l) + top) * LN2, float("-inf"))
    tl.store(Lse + head.to(tl.int64) * Sq + rows, lse, mask=rows < Sq)
