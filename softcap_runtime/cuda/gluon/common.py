"""What the Gluon kernels share: rings of tiles, the row intervals, the weights of raw products.

Only import this module where Triton is installed; importing the package does not.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from softcap_runtime.cuda.gluon import series
from softcap_runtime.cuda.triton import asm

# How a raw product <q, k> becomes a logit, as ``triton.common`` numbers them; its fourth form is not served here.
PLAIN = gl.constexpr(0)
LOGISTIC = gl.constexpr(1)
TANH_APPROX = gl.constexpr(2)

# An interval that excludes every key: a row that sees nothing, and no sum of two such leaves int32.
FAR = gl.constexpr(1 << 29)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOGISTIC_ASM, LOGISTIC_OPERANDS = map(gl.constexpr, series.logistic())
WEIGHTS_ASM, WEIGHTS_OPERANDS = map(gl.constexpr, series.weights())
SERIES_LIMIT = gl.constexpr(series.LIMIT)
SERIES_0, SERIES_1, SERIES_2, SERIES_3 = map(gl.constexpr, series.FACTORS)
SERIES_ELEMENTS = gl.constexpr(series.ELEMENTS)
TANH_WEIGHTS_ASM = gl.constexpr(asm.tanh_weights())
NUMBERS_ASM = gl.constexpr(asm.kept_numbers())
BITS_ASM = gl.constexpr(asm.kept_bits())
FOUR_OF_THREE = gl.constexpr("=f,=f,=f,=f,f,f,f,f,f,f,f,f,f,f,f,f")

# A tile from global to shared memory and back, by tensor maps; the names of Triton 3.9, and those before.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# Warpgroups that compute, as compile-time arguments.
FIRST = gl.constexpr(0)
SECOND = gl.constexpr(1)
THIRD = gl.constexpr(2)
# Registers of a thread that loads tiles; the consumers get what is left.
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def ring(STAGES: gl.constexpr):
    """Barriers of a ring of STAGES tiles, one element each."""
    return gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())


@gluon.jit
def start_ring(full, empty, STAGES: gl.constexpr, READERS: gl.constexpr):
    """One producer fills each tile, READERS warpgroups release it."""
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next tile of a ring, and the phase of its barriers."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def anew(slot):
    """``slot``, in a way that the addresses which follow from it are computed anew in each step of a loop.

    Those of tiles that stay where they are would otherwise be kept in registers from before the loop, in so many that
    others are spilled.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [slot], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tile_of(turn, heads):
    """The work of a turn, the first blocks of all heads before the second: ``(tile, place of the block, head)``.

    Odd turns run backwards, so that no program gets the longer tile of every turn.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    tile = turn * programs + gl.where(turn % 2 == 1, programs - 1 - place, place)
    return tile, tile // heads, tile % heads


@gluon.jit
def head_at(place, B, H, BAND: gl.constexpr):
    """The head, of all batch rows' H, at a place. With intervals the batch rows take turns, so that no program has all
    its tiles of one with much padding."""
    if BAND:
        return place
    else:
        return place % B * H + place // B


@gluon.jit
def block_at(index, first, full_end, end):
    """The block of keys at a place of the order that all warps keep: from the end those past the full ones, then the
    others from the first on."""
    after = end - full_end
    return gl.where(index < after, end - 1 - index, first + index - after)


@gluon.jit
def exp2(x):
    """``2**x`` by one instruction, denormal results flushed to 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def series_of(inner, outer):
    """Operands of the PTX of ``series``, for ``outer * tanh(x * inner * ln(2) / 2)``: minus the limit of ``x**2``,
    and the factors.

    Where float32 cannot hold the factors, the limit sends every x to the full formula.
    """
    step = inner * (0.5 * LN2)
    square = step * step
    limit = gl.where((square > 1e-10) & (square < 1e10), -SERIES_LIMIT / square, 1.0)
    f0 = outer * step
    f1 = f0 * square
    f2 = f1 * square
    return limit, f0 * SERIES_0, f1 * SERIES_1, f2 * SERIES_2, f2 * square * SERIES_3


@gluon.jit
def fixed_weights(x, inner, coef, bias, FORM: gl.constexpr):
    """``2**z`` of ``capped``'s z, for a bias that holds a fixed reference."""
    if FORM == LOGISTIC:
        limit, f0, f1, f2, f3 = series_of(inner, -0.5 * coef)
        return gl.inline_asm_elementwise(
            WEIGHTS_ASM, WEIGHTS_OPERANDS, [x, limit, f0, f1, f2, f3, bias + 0.5 * coef, inner, coef, bias],
            dtype=gl.float32, is_pure=True, pack=SERIES_ELEMENTS,
        )  # fmt: skip
    elif FORM == TANH_APPROX:
        return gl.inline_asm_elementwise(
            TANH_WEIGHTS_ASM, FOUR_OF_THREE, [x * inner, coef, bias], dtype=gl.float32, is_pure=True, pack=4
        )
    else:
        return exp2(x * inner + bias)


@gluon.jit
def capped(x, inner, coef, bias, FORM: gl.constexpr):
    """The logit of a raw product in log2 units plus a shift, and the slope of its tanh, as ``triton.common.capped``."""
    if FORM == PLAIN:
        return x * inner + bias, 1.0
    elif FORM == LOGISTIC:
        limit, f0, f1, f2, f3 = series_of(inner, -0.5)
        r = gl.inline_asm_elementwise(
            LOGISTIC_ASM, LOGISTIC_OPERANDS, [x, limit, f0, f1, f2, f3, inner],
            dtype=gl.float32, is_pure=True, pack=SERIES_ELEMENTS,
        )  # fmt: skip
        return coef * r + bias, r - r * r
    else:
        t = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * inner], dtype=gl.float32, is_pure=True, pack=1
        )
        return coef * t + bias, 1.0 - t * t


@gluon.jit
def row_intervals(rows, Lo, Hi, stride_b, b, left, right, Sq, Skv, BAND: gl.constexpr):
    """``lo, hi`` of some query rows, clipped to the keys; a row that sees nothing gives ``FAR, 0``.

    Rows past the end repeat the last one.
    """
    rows = gl.minimum(rows, Sq - 1)
    if BAND:
        lo = rows + left
        hi = rows + right
    else:
        lo = gl.load(Lo + b * stride_b + rows)
        hi = gl.load(Hi + b * stride_b + rows)
    lo = gl.maximum(lo, 0)
    hi = gl.minimum(hi, Skv)
    empty = lo >= hi
    return gl.where(empty, FAR, lo), gl.where(empty, 0, hi)


@gluon.jit
def kept_row(b, stride_b, Skv):
    """Where the numbers of batch entry b begin in Kept; as intervals do, entries have their own or share one."""
    return gl.where(stride_b != 0, b, 0).to(gl.int64) * Skv


@gluon.jit
def kept_keys(keys, Kept, kept_at, kept_len, BAND: gl.constexpr):
    """``keys``, -1 in the place of those that no row sees; ``kept_len``: how many numbers of Kept are read."""
    if not BAND:
        kept = gl.load(Kept + kept_at + keys, mask=keys < kept_len, other=1)
        keys = gl.where(kept != 0, keys, -1)
    return keys


@gluon.jit
def after_holes(first, end, Kept, kept_at, kept_len):
    """The key from which on all up to end - 1 are kept, at least first; with ``kept_len`` 0 that is first."""
    run = gl.load(Kept + kept_at + (end - 1), mask=(first < end) & (end <= kept_len), other=FAR)
    return gl.maximum(end - run, first)


@gluon.jit
def some_hidden(first, Kept, kept_at, kept_len, N: gl.constexpr):
    """Whether some of N keys from first on are not kept; those past the last don't count."""
    return after_holes(first, gl.minimum(first + N, kept_len), Kept, kept_at, kept_len) > first


@gluon.jit
def _places(S_L: gl.constexpr):
    """Of the columns ``[8, 8]`` of a product of 64 keys: which eight it is ``[8]``, the place in it ``[8]``."""
    columns = gl.reshape(gl.arange(0, 64, layout=gl.SliceLayout(0, S_L)), [8, 8])
    L: gl.constexpr = columns.type.layout
    return gl.arange(0, 8, layout=gl.SliceLayout(1, L)), gl.arange(0, 8, layout=gl.SliceLayout(0, L))


@gluon.jit
def kept_numbers(first, count, S_L: gl.constexpr):
    """Those of 64 keys, for ``kept_bits``: ``first`` is where they begin, ``count`` how many there are."""
    _, place = _places(S_L)
    first = first.to(gl.uint64, bitcast=True)
    return gl.inline_asm_elementwise(
        NUMBERS_ASM, "=&r,=&r,r,r,l,l,r,r", [place, first, count], dtype=gl.int32, is_pure=False, pack=2
    )


@gluon.jit
def kept_bits(numbers, S_L: gl.constexpr):
    """Which of 64 keys are kept, in two registers of a thread: for ``kept_columns``."""
    _, place = _places(S_L)
    return gl.inline_asm_elementwise(
        BITS_ASM, "=&r,=&r,r,r,r,r", [numbers, place], dtype=gl.int32, is_pure=False, pack=2
    )


@gluon.jit
def no_bits(S_L: gl.constexpr):
    """As ``kept_bits``, of no key."""
    _, place = _places(S_L)
    return place * 0


@gluon.jit
def kept_columns(bits, S_L: gl.constexpr):
    """Whether each of 64 keys is kept: ``[1, 64]``."""
    eight, _ = _places(S_L)
    kept = (gl.expand_dims(bits, 0) >> gl.expand_dims(eight % 4 * 8 + eight // 4, 1)) & 1
    columns = gl.convert_layout(gl.reshape(kept != 0, [64]), gl.SliceLayout(0, S_L), assert_trivial=True)
    return gl.expand_dims(columns, 0)


@gluon.jit
def without_holes(x, instead, key, Kept, kept_at, kept_len, S_L: gl.constexpr):
    """``x`` ``[M, 64]``, and ``instead`` for keys from ``key`` on that are not kept."""
    # A branch: calls that keep all keys don't pay.
    if some_hidden(key, Kept, kept_at, kept_len, 64):
        bits = kept_bits(kept_numbers(Kept + kept_at + key, kept_len - key, S_L), S_L)
        x = gl.where(kept_columns(bits, S_L), x, instead)
    return x


@gluon.jit
def key_blocks(
    start, Lo, Hi, Kept, kept_at, kept_len, stride_b, b, left, right, Sq, Skv,
    BAND: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What query rows ``start`` to ``start + ROWS`` need of the keys, in blocks of N.

    ``(first, full_first, clean, full_end, end)``: blocks first...end hold every visible key, at least one;
    full_first...full_end of them every row sees but for keys that are not kept, clean...full_end as a whole.
    """
    last = gl.minimum(start + ROWS, Sq) - 1
    if BAND:
        lo_least, lo_most = gl.maximum(start + left, 0), gl.maximum(last + left, 0)
        hi_least, hi_most = gl.minimum(start + right, Skv), gl.minimum(last + right, Skv)
    else:
        # A power of two from ROWS on; those past it repeat its last.
        many: gl.constexpr = 64 if ROWS <= 64 else 128 if ROWS <= 128 else 256
        rows = start + gl.arange(0, many, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        lo, hi = row_intervals(gl.minimum(rows, last), Lo, Hi, stride_b, b, left, right, Sq, Skv, BAND)
        lo_least, lo_most = gl.min(lo, 0), gl.max(lo, 0)
        hi_least, hi_most = gl.min(hi, 0), gl.max(hi, 0)
    first = lo_least // N
    end = gl.cdiv(gl.maximum(hi_most, 0), N)
    first = gl.minimum(first, end)
    full_first = gl.minimum(gl.cdiv(lo_most, N), end)
    full_end = gl.maximum(gl.maximum(hi_least, 0) // N, full_first)
    clean = full_first
    if not BAND:
        kept_from = after_holes(full_first * N, full_end * N, Kept, kept_at, kept_len)
        clean = gl.minimum(gl.cdiv(kept_from, N), full_end)
    return first, full_first, clean, full_end, gl.maximum(end, first + 1)


@gluon.jit
def hidden(z, keys, lo, hi):
    """``z`` with -inf where a row does not see a key; all operands are shaped to broadcast."""
    return gl.where((keys >= lo) & (keys < hi), z, float("-inf"))
