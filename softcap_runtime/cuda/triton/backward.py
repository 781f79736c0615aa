"""The backward kernels: dq by query blocks, then dk and dv by key blocks; no atomics, so bit-equal every run.

Both recompute the logits from q, k and the logsumexp (FlashAttention-2, Dao 2023, algorithm 2), with the
derivative of the softcap beside them:

    p = exp(s - lse),  dv = p^T dO,  dp = dO v^T,  ds = p * (dp - delta) * (1 - tanh^2),  delta = rowsum(dO * O)
    dq = scale * ds k,  dk = scale * ds^T q
"""

from __future__ import annotations

import triton
import triton.language as tl

from softcap_runtime.cuda.triton.common import (
    FAR,
    INTS,
    LOG2E,
    block_ranges,
    capped,
    exp2,
    kept_keys,
    kept_row,
    load_rows,
    load_tile,
    row_intervals,
    store_tile,
)


@triton.jit
def _dq_step(
    q, do, dq, shift, delta, lo, hi, K, V, Kept, kept_at, kept_len, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, b, hk, n, Skv,
    inner, coef,
    MASKED: tl.constexpr, BAND: tl.constexpr, FORM: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    DPAD: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    k = load_tile(K, sk_b, sk_h, sk_s, b, hk, n, Skv, BLOCK_N, D, DPAD, TMA, ALIGN)
    x = tl.dot(q, k.T, input_precision=PRECISION)
    v = load_tile(V, sv_b, sv_h, sv_s, b, hk, n, Skv, BLOCK_N, D, DPAD, TMA, ALIGN)
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    z, slope = capped(x, inner, coef, shift[:, None], FORM, ASM)
    if MASKED:
        keys = kept_keys(n + tl.arange(0, BLOCK_N), Kept, kept_at, kept_len, BAND)
        z = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), z, float("-inf"))
        p = exp2(z, ASM)
    else:
        p = exp2(z, ASM)
    ds = p * (dp - delta[:, None]) * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=INTS)
def dq_kernel(
    Q, K, V, DO, Out, Lse, Shift, Delta, DQ, Lo, Hi, Kept,
    sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, sdo_b, sdo_h, sdo_s, so_b, so_h, so_s,
    sdq_b, sdq_h, sdq_s, slo_b,
    Hq, G, Sq, SqPad, Skv, left, right, kept_len, inner, coef, bias, gain,
    BAND: tl.constexpr, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """DQ of one block of query rows; and for the kernel that comes after, Shift and Delta.

    Both float32 ``[B, Hq, SqPad]``: what brings a logit to the log2 of its weight, and rowsum(dO * O). Rows past
    the end and rows that see nothing get -inf and 0, so that their weights are 0 there without a mask. Kept and
    ``kept_len``: as ``forward_kernel``'s.
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

    do = load_tile(DO, sdo_b, sdo_h, sdo_s, b, h, start, Sq, BLOCK_M, D, DPAD, TMA, ALIGN)
    out = load_tile(Out, so_b, so_h, so_s, b, h, start, Sq, BLOCK_M, D, DPAD, False, ALIGN)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(Lse + head.to(tl.int64) * Sq + rows, mask=rows < Sq, other=float("-inf"))
    shift = tl.where(lse == float("-inf"), float("-inf"), bias - lse * LOG2E)
    at = head.to(tl.int64) * SqPad + rows
    tl.store(Delta + at, delta, mask=rows < SqPad)
    tl.store(Shift + at, shift, mask=rows < SqPad)

    q = load_tile(Q, sq_b, sq_h, sq_s, b, h, start, Sq, BLOCK_M, D, DPAD, TMA, ALIGN)
    dq = tl.zeros([BLOCK_M, DPAD], tl.float32)
    for block in tl.range(full_first, full_end, num_stages=STAGES):
        dq = _dq_step(
            q, do, dq, shift, delta, lo, hi, K, V, Kept, kept_at, kept_len, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, b, hk,
            block * BLOCK_N, Skv, inner, coef, False, BAND, FORM, BLOCK_N, D, DPAD, PRECISION, TMA, ALIGN, ASM,
        )  # fmt: skip
    before = full_first - first
    for edge in tl.range(0, before + end - full_end, num_stages=STAGES):
        block = tl.where(edge < before, first + edge, full_end + edge - before)
        dq = _dq_step(
            q, do, dq, shift, delta, lo, hi, K, V, Kept, kept_at, kept_len, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, b, hk,
            block * BLOCK_N, Skv, inner, coef, True, BAND, FORM, BLOCK_N, D, DPAD, PRECISION, TMA, ALIGN, ASM,
        )  # fmt: skip
    store_tile(DQ, sdq_b, sdq_h, sdq_s, b, h, start, Sq, dq * gain, BLOCK_M, D, DPAD, ALIGN)


@triton.jit(do_not_specialize=INTS)
def statistics_kernel(
    DO, Out, Lse, Shift, Delta,
    sdo_b, sdo_h, sdo_s, so_b, so_h, so_s, Hq, Sq, SqPad, bias,
    BLOCK_M: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Shift and Delta of BLOCK_M rows, as ``dq_kernel`` leaves them."""
    blocks = SqPad // BLOCK_M
    start = (tl.program_id(0) % blocks) * BLOCK_M
    head = tl.program_id(0) // blocks
    b = head // Hq
    h = head % Hq
    rows = start + tl.arange(0, BLOCK_M)
    do = load_tile(DO, sdo_b, sdo_h, sdo_s, b, h, start, Sq, BLOCK_M, D, DPAD, False, ALIGN)
    out = load_tile(Out, so_b, so_h, so_s, b, h, start, Sq, BLOCK_M, D, DPAD, False, ALIGN)
    lse = tl.load(Lse + head.to(tl.int64) * Sq + rows, mask=rows < Sq, other=float("-inf"))
    at = head.to(tl.int64) * SqPad + rows
    tl.store(Delta + at, tl.sum(do.to(tl.float32) * out.to(tl.float32), 1))
    tl.store(Shift + at, tl.where(lse == float("-inf"), float("-inf"), bias - lse * LOG2E))


@triton.jit
def _query_ranges(n, First, Last, b, shull_b, left, right, Sq, BAND: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Blocks of M query rows that see keys n...n+N, as ``block_ranges``; with intervals none counts as full."""
    if BAND:
        # Row i sees some of the keys when i + left < n + N and i + right > n, all of them when
        # i + left <= n and i + right >= n + N.
        first_row = tl.maximum(n - right + 1, 0)
        end_row = tl.minimum(n + N - left, Sq)
        full_first_row = tl.maximum(n + N - right, 0)
        full_end_row = tl.minimum(n - left + 1, Sq)
        full_first = tl.cdiv(full_first_row, M)
        # The last, partial block of rows is full too when its rows inside the tensor are.
        full_end = tl.where(full_end_row == Sq, tl.cdiv(Sq, M), tl.maximum(full_end_row, 0) // M)
    else:
        first_row = tl.load(First + b * shull_b + n // N)
        end_row = tl.load(Last + b * shull_b + n // N)
        full_first = FAR
        full_end = 0
    first = first_row // M
    end = tl.cdiv(tl.maximum(end_row, 0), M)
    first = tl.minimum(first, end)
    full_first = tl.maximum(tl.minimum(full_first, end), first)
    full_end = tl.maximum(tl.minimum(full_end, end), full_first)
    return first, full_first, full_end, end


@triton.jit
def _dkdv_step(
    k, v, dk, dv, Q, DO, Shift, Delta, Lo, Hi, sq_b, sq_h, sq_s, sdo_b, sdo_h, sdo_s, slo_b, b, h, Hq, keys, m,
    Sq, SqPad, Skv, left, right, inner, coef,
    MASKED: tl.constexpr, BAND: tl.constexpr, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, DPAD: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr,
    ASM: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
):  # fmt: skip
    at = (b * Hq + h) * SqPad + m
    q = load_tile(Q, sq_b, sq_h, sq_s, b, h, m, Sq, BLOCK_M, D, DPAD, TMA, ALIGN)
    shift = load_rows(Shift, at, BLOCK_M, TMA)
    if MASKED:
        if BAND:
            rows = m + tl.arange(0, BLOCK_M)
            lo, hi = rows + left, rows + right
        else:
            lo = load_rows(Lo, b * slo_b + m, BLOCK_M, TMA)
            hi = load_rows(Hi, b * slo_b + m, BLOCK_M, TMA)
    x = tl.dot(k, q.T, input_precision=PRECISION)
    do = load_tile(DO, sdo_b, sdo_h, sdo_s, b, h, m, Sq, BLOCK_M, D, DPAD, TMA, ALIGN)
    if WANT_DK:
        delta = load_rows(Delta, at, BLOCK_M, TMA)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
    z, slope = capped(x, inner, coef, shift[None, :], FORM, ASM)
    if MASKED:
        # Masking z, not p: a select on p is moved behind its rounding, where ptxas serialises the product after it.
        z = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), z, float("-inf"))
        p = exp2(z, ASM)
    else:
        p = exp2(z, ASM)
    # Both operands before both products: registers written while a product is in flight make ptxas serialise it.
    if WANT_DK:
        ds = (p * (dp - delta[None, :]) * slope).to(q.dtype)
    if WANT_DV:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    if WANT_DK:
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=INTS)
def dkdv_kernel(
    Q, K, V, DO, Shift, Delta, DK, DV, Lo, Hi, First, Last, Kept,
    sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, sdo_b, sdo_h, sdo_s,
    sdk_b, sdk_h, sdk_s, sdv_b, sdv_h, sdv_s, slo_b, shull_b,
    Hq, Hkv, G, Sq, SqPad, Skv, left, right, kept_len, inner, coef, gain,
    BAND: tl.constexpr, FORM: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """DK and DV (or one of them) of one block of keys, summed over the query heads of its group.

    Shift and Delta are ``dq_kernel``'s; Lo, Hi, First, Last those of ``query_hull_kernel`` (not read for a band).
    Kept and ``kept_len``: as ``forward_kernel``'s.
    """
    blocks = tl.cdiv(Skv, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % blocks) * BLOCK_N
    head = pid // blocks
    b = head // Hkv
    hk = head % Hkv
    first, full_first, full_end, end = _query_ranges(
        n, First, Last, b, shull_b, left, right, Sq, BAND, BLOCK_M, BLOCK_N
    )
    k = load_tile(K, sk_b, sk_h, sk_s, b, hk, n, Skv, BLOCK_N, D, DPAD, TMA, ALIGN)
    v = load_tile(V, sv_b, sv_h, sv_s, b, hk, n, Skv, BLOCK_N, D, DPAD, TMA, ALIGN)
    dk = tl.zeros([BLOCK_N, DPAD], tl.float32)
    dv = tl.zeros([BLOCK_N, DPAD], tl.float32)
    keys = n + tl.arange(0, BLOCK_N)
    keys = kept_keys(keys, Kept, kept_row(b, slo_b, Skv), kept_len, BAND)
    # One loop over (query head, block) keeps the pipeline full across the heads of a group.
    # With intervals no block is known to be full and this loop is empty. It stays all the same: without it ptxas
    # serialises the products of the other. Its divisor is kept off 0, from which the compiler would conclude that
    # the loop runs.
    full = full_end - full_first
    for index in tl.range(0, G * full, num_stages=STAGES):
        h = hk * G + index // tl.maximum(full, 1)
        m = (full_first + index % tl.maximum(full, 1)) * BLOCK_M
        dk, dv = _dkdv_step(
            k, v, dk, dv, Q, DO, Shift, Delta, Lo, Hi, sq_b, sq_h, sq_s, sdo_b, sdo_h, sdo_s, slo_b, b, h, Hq,
            keys, m, Sq, SqPad, Skv, left, right, inner, coef, False, BAND, FORM, BLOCK_M, BLOCK_N, D, DPAD, PRECISION,
            TMA, ALIGN, ASM, WANT_DK, WANT_DV,
        )  # fmt: skip
    before = full_first - first
    edges = before + end - full_end
    for index in tl.range(0, G * edges, num_stages=STAGES):
        h = hk * G + index // tl.maximum(edges, 1)
        edge = index % tl.maximum(edges, 1)
        m = tl.where(edge < before, first + edge, full_end + edge - before) * BLOCK_M
        dk, dv = _dkdv_step(
            k, v, dk, dv, Q, DO, Shift, Delta, Lo, Hi, sq_b, sq_h, sq_s, sdo_b, sdo_h, sdo_s, slo_b, b, h, Hq,
            keys, m, Sq, SqPad, Skv, left, right, inner, coef, True, BAND, FORM, BLOCK_M, BLOCK_N, D, DPAD, PRECISION,
            TMA, ALIGN, ASM, WANT_DK, WANT_DV,
        )  # fmt: skip
    if WANT_DK:
        store_tile(DK, sdk_b, sdk_h, sdk_s, b, hk, n, Skv, dk * gain, BLOCK_N, D, DPAD, ALIGN)
    if WANT_DV:
        store_tile(DV, sdv_b, sdv_h, sdv_s, b, hk, n, Skv, dv, BLOCK_N, D, DPAD, ALIGN)


@triton.jit(do_not_specialize=INTS)
def query_hull_kernel(
    Lo, Hi, LoPad, HiPad, First, Last, LoMost, HiLeast, slo_b, Sq, SqPad, Skv, blocks,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """For KEYS key blocks of one batch entry the query rows first...last (exclusive) that see any of their keys.

    One pass over the intervals, exact for any order of rows; a block nobody sees gives ``FAR, 0``. The first
    program of a batch entry also leaves the intervals clipped and padded to SqPad with ``FAR, 0``, and of every EACH
    rows the largest lo and the smallest hi, rows past the end left out.
    """
    b = tl.program_id(0)
    block = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    first = tl.full([KEYS], FAR, tl.int32)
    last = tl.zeros([KEYS], tl.int32)
    for start in tl.range(0, SqPad, ROWS):
        rows = start + tl.arange(0, ROWS)
        lo, hi = row_intervals(rows, Lo, Hi, slo_b, b, 0, 0, Sq, Skv, False)
        lo = tl.where(rows < Sq, lo, FAR)
        hi = tl.where(rows < Sq, hi, 0)
        if tl.program_id(1) == 0:
            tl.store(LoPad + b * SqPad + rows, lo, mask=rows < SqPad)
            tl.store(HiPad + b * SqPad + rows, hi, mask=rows < SqPad)
            most = tl.max(tl.reshape(tl.where(rows < Sq, lo, 0), (ROWS // EACH, EACH)), 1)
            least = tl.min(tl.reshape(tl.where(rows < Sq, hi, FAR), (ROWS // EACH, EACH)), 1)
            group = start // EACH + tl.arange(0, ROWS // EACH)
            tl.store(LoMost + b * (SqPad // EACH) + group, most, mask=group < SqPad // EACH)
            tl.store(HiLeast + b * (SqPad // EACH) + group, least, mask=group < SqPad // EACH)
        meets = (lo[:, None] < (block * BLOCK_N + BLOCK_N)[None, :]) & (hi[:, None] > (block * BLOCK_N)[None, :])
        first = tl.minimum(first, tl.min(tl.where(meets, rows[:, None], FAR), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, rows[:, None] + 1, 0), 0))
    tl.store(First + b * blocks + block, first, mask=block < blocks)
    tl.store(Last + b * blocks + block, last, mask=block < blocks)
