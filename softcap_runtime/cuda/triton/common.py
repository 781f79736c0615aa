"""What the Triton kernels share: loading a tile, the row intervals, and the capped logit in log2 units.

Only import this module where Triton is installed; importing the package does not.

With ``r = 1 / (1 + exp(2x / cap))``, ``cap * tanh(x / cap) = cap - 2 * cap * r`` and ``1 - tanh**2 = 4 * r * (1 - r)``:
one exponential and one reciprocal serve the logit and its derivative. ``asm`` says how they are computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softcap_runtime.cuda.triton import asm

# How a raw product <q, k> becomes a logit; the host picks one per call.
PLAIN = tl.constexpr(0)  # no softcap
LOGISTIC = tl.constexpr(1)  # the form above; the error of a logit is about cap * 3e-7: half precision, caps to 1,024
TANH_APPROX = tl.constexpr(2)  # the tanh.approx.f32 instruction, relative error 2**-11 (PTX ISA)
TANH_EXACT = tl.constexpr(3)  # the others: a polynomial near 0, where the logistic form would cancel

# Run-time numbers that no kernel is compiled for: a new length, window, cap or scale costs no compilation.
INTS = [
    *(f"s{tensor}_{dim}" for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv", "lo", "hull") for dim in "bhs"),
    *("Hq", "Hkv", "G", "Sq", "SqPad", "Skv", "left", "right", "splits", "blocks", "kept_len"),
    *("inner", "coef", "bias", "reference", "gain"),
]

# An interval that excludes every key: a row that sees nothing, and no sum of two such leaves int32.
FAR = tl.constexpr(1 << 29)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOGISTIC_ASM = tl.constexpr(asm.logistic())
WEIGHTS_ASM = tl.constexpr(asm.weights())


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """``2**x`` by one instruction, denormal results flushed to 0 (``ASM=False``: for Triton's interpreter)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def logistic(x, ASM: tl.constexpr):
    """``1 / (1 + 2**x)``, four elements with one reciprocal."""
    if ASM:
        return tl.inline_asm_elementwise(
            LOGISTIC_ASM, "=f,=f,=f,=f,f,f,f,f", [x], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        return 1.0 / (1.0 + tl.exp2(x))


@triton.jit
def fixed_weights(x, inner, coef, bias, FORM: tl.constexpr, ASM: tl.constexpr):
    """``2**z`` of ``capped``'s z, for a bias that holds a fixed reference."""
    if FORM == LOGISTIC and ASM:
        return tl.inline_asm_elementwise(
            WEIGHTS_ASM,
            "=f,=f,=f,=f,f,f,f,f,f,f,f,f,f,f,f,f",
            [x * inner, coef, bias],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        z, _ = capped(x, inner, coef, bias, FORM, ASM)
        return exp2(z, ASM)


@triton.jit
def tanh_exact(x):
    """``tanh(x)`` to a few units in the last place of float32.

    Below 0.6 an odd polynomial (least squares at Chebyshev points, largest relative error 8e-8), above it
    ``(1 - e) / (1 + e)`` with ``e = exp(-2|x|)``, which does not cancel there.
    """
    y = tl.abs(x)
    z = x * x
    near = -0.00591991050
    near = near * z + 0.0208182912
    near = near * z - 0.0537908338
    near = near * z + 0.133320123
    near = near * z - 0.333333015
    near = x + x * (z * near)
    e = tl.exp2(y * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(x, inner, coef, bias, FORM: tl.constexpr, ASM: tl.constexpr):
    """The logit of a raw product in log2 units, plus a shift; and the derivative of its tanh: ``(z, slope)``.

    ``inner``, ``coef`` and the bias of no shift are the host's ``Factors`` for FORM; a caller subtracts its shift
    from ``bias`` (per row or for all), so the whole is one multiply-add. LOGISTIC's slope is a quarter of the
    derivative; ``Factors.gain`` makes up for it once, at the end.
    """
    if FORM == PLAIN:
        return x * inner + bias, 1.0
    elif FORM == LOGISTIC:
        r = logistic(x * inner, ASM)
        return coef * r + bias, r - r * r
    else:
        if FORM == TANH_APPROX and ASM:
            t = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [x * inner], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            t = tanh_exact(x * inner)
        return coef * t + bias, 1.0 - t * t


@triton.jit
def load_tile(
    source, stride_b, stride_h, stride_s, b, h, row, rows,
    ROWS: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, TMA: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` to ``row + ROWS`` of one head as ``[ROWS, DPAD]``; what lies outside the tensor reads as 0.

    ``source`` is a tensor descriptor (TMA) or a pointer, with strides in units of ALIGN elements: the factor tells
    the compiler what the addresses are multiples of, for any strides, so one kernel serves them all.
    """
    if TMA:
        return source.load([b, h, row, 0]).reshape(ROWS, DPAD)
    else:
        at = row + tl.arange(0, ROWS)
        columns = tl.arange(0, DPAD)
        base = source + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * ALIGN
        pointers = base + (at.to(tl.int64) * stride_s * ALIGN)[:, None] + columns[None, :]
        inside = at[:, None] < rows
        if D != DPAD:
            inside &= columns[None, :] < D
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(
    target, stride_b, stride_h, stride_s, b, h, row, rows, value,
    ROWS: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write ``[ROWS, DPAD]`` to rows ``row...`` of one head, rows and columns outside the tensor left alone."""
    at = row + tl.arange(0, ROWS)
    columns = tl.arange(0, DPAD)
    base = target + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * ALIGN
    inside = at[:, None] < rows
    if D != DPAD:
        inside &= columns[None, :] < D
    tl.store(
        base + (at.to(tl.int64) * stride_s * ALIGN)[:, None] + columns[None, :],
        value.to(target.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def load_rows(source, at, ROWS: tl.constexpr, TMA: tl.constexpr):
    """``ROWS`` elements of a padded vector from ``at`` on; ``source`` as in ``load_tile``."""
    if TMA:
        return source.load([at])
    else:
        return tl.load(source + at.to(tl.int64) + tl.arange(0, ROWS))


@triton.jit
def row_intervals(rows, lo_ptr, hi_ptr, stride_b, b, left, right, Sq, Skv, BAND: tl.constexpr):
    """``lo, hi`` of some query rows, clipped to the keys; a row that sees nothing gives ``FAR, 0``.

    Rows past the end repeat the last one, so that a partial block still has unmasked keys.
    """
    rows = tl.minimum(rows, Sq - 1)
    if BAND:
        lo = rows + left
        hi = rows + right
    else:
        lo = tl.load(lo_ptr + b * stride_b + rows)
        hi = tl.load(hi_ptr + b * stride_b + rows)
    lo = tl.maximum(lo, 0)
    hi = tl.minimum(hi, Skv)
    empty = lo >= hi
    return tl.where(empty, FAR, lo), tl.where(empty, 0, hi)


@triton.jit
def kept_row(b, stride_b, Skv):
    """Where the numbers of batch entry b begin in Kept; as intervals do, entries have their own or share one."""
    return tl.where(stride_b != 0, b, 0).to(tl.int64) * Skv


@triton.jit
def kept_keys(keys, Kept, kept_at, kept_len, BAND: tl.constexpr):
    """``keys``, -1 in the place of those that no row sees; ``kept_len``: how many numbers of Kept are read."""
    if not BAND:  # noqa: SIM102
        # A branch: Triton would load ahead into shared memory, 56 bytes, and two programs of head_dim 128 with 115,712
        # bytes each are all that a multiprocessor of Hopper holds.
        if kept_len > 0:
            kept = tl.load(Kept + kept_at + keys, mask=keys < kept_len, other=1)
            keys = tl.where(kept != 0, keys, -1)
    return keys


@triton.jit
def after_holes(first, end, Kept, kept_at, kept_len):
    """The key from which on all up to end - 1 are kept, at least first; with ``kept_len`` 0 that is first."""
    run = tl.load(Kept + kept_at + (end - 1), mask=(first < end) & (end <= kept_len), other=FAR)
    return tl.maximum(end - run, first)


@triton.jit
def block_ranges(lo, hi, Kept, kept_at, kept_len, N: tl.constexpr, BAND: tl.constexpr):
    """What rows of intervals ``lo, hi`` need of the keys, in blocks of N: ``(first, full_first, full_end, end)``.

    Blocks first...end hold every visible key; full_first...full_end of them are visible to every row and need
    no mask.
    """
    first = tl.min(lo, 0) // N
    end = tl.cdiv(tl.max(hi, 0), N)
    full_first = tl.cdiv(tl.max(lo, 0), N)
    full_end = tl.min(hi, 0) // N
    first = tl.minimum(first, end)
    full_first = tl.minimum(full_first, end)
    full_end = tl.maximum(full_end, full_first)
    if not BAND:
        clean = after_holes(full_first * N, full_end * N, Kept, kept_at, kept_len)
        full_first = tl.minimum(tl.cdiv(clean, N), full_end)
    return first, full_first, full_end, end
