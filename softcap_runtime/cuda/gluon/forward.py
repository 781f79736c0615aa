"""The forward kernel for compute capability 9.0: one warp loads tiles, two or three warpgroups compute.

As ``triton.forward`` (the same softmax, the same order of a row's sums: blocks that need a mask, then the
others), with what Triton's own pipeline does not do: each warpgroup issues the product of the next keys and the
product of the last weights with their values together, and computes the next weights while the second runs; and the
warpgroups drift apart until the softmax of one runs beside the products of another (FlashAttention-3, Shah et al.
2024). The weights go from registers into the second product.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from softcap_runtime.cuda.gluon.common import (
    FIRST,
    LN2,
    PRODUCER_REGISTERS,
    SECOND,
    THIRD,
    advance,
    block_at,
    capped,
    exp2,
    fixed_weights,
    head_at,
    kept_bits,
    kept_columns,
    kept_numbers,
    kept_row,
    key_blocks,
    load_tile,
    no_bits,
    ring,
    row_intervals,
    start_ring,
    store_tile,
    tile_of,
    without_holes,
)

NUMBERS = [
    *("slo_b", "B", "Hq", "G", "Sq", "Skv", "left", "right", "kept_len"),
    *("inner", "coef", "bias", "reference"),
]


@gluon.jit
def _produce(
    Q, K, V, Lo, Hi, Kept, q_s, k_s, v_s, bars, sizes,
    BAND: gl.constexpr, M: gl.constexpr, N: gl.constexpr, DPAD: gl.constexpr, WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    slo_b, B, Hq, G, Sq, Skv, left, right, kept_len = sizes
    ROWS: gl.constexpr = M * WARPGROUPS
    blocks = gl.cdiv(Sq, ROWS)
    tiles = B * Hq * blocks
    slot, phase, turn_phase = 0, 1, 1
    for turn in range(0, gl.cdiv(tiles, gl.num_programs(0))):
        tile, place, among = tile_of(turn, B * Hq)
        if tile < tiles:
            head = head_at(among, B, Hq, BAND)
            b = head // Hq
            h = head % Hq
            hk = h // G
            start = (blocks - 1 - place) * ROWS
            kept_at = kept_row(b, slo_b, Skv)
            first, _, _, full_end, end = key_blocks(
                start, Lo, Hi, Kept, kept_at, kept_len, slo_b, b, left, right, Sq, Skv, BAND, ROWS, N, 1
            )
            for index in range(0, end - first):
                key = block_at(index, first, full_end, end) * N
                mbarrier.wait(k_empty.index(slot), phase)
                mbarrier.expect(k_full.index(slot), N * DPAD * 2)
                load_tile(K, [b, hk, key, 0], k_full.index(slot), k_s.index(slot))
                if index == 0:
                    for c in gl.static_range(WARPGROUPS):
                        mbarrier.wait(q_empty.index(c), turn_phase)
                        mbarrier.expect(q_full.index(c), M * DPAD * 2)
                        load_tile(Q, [b, h, start + c * M, 0], q_full.index(c), q_s.index(c))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_full.index(slot), N * DPAD * 2)
                load_tile(V, [b, hk, key, 0], v_full.index(slot), v_s.index(slot))
                slot, phase = advance(slot, phase, STAGES)
            turn_phase ^= 1


@gluon.jit
def _sums(p, M: gl.constexpr, N: gl.constexpr):
    """The sums of ``[M, N]`` within a thread: ``[M, 8]``."""
    return gl.sum(gl.reshape(p, [M, N // 8, 8]), axis=1)


@gluon.jit
def _softmax(
    s, key, lo, hi, Kept, kept_at, kept_len, bits, m, l, inner, coef, bias,
    EDGES: gl.constexpr, HOLES: gl.constexpr, BAND: gl.constexpr, ONLINE: gl.constexpr, FORM: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Weights of a block of raw products and the statistics after it: ``(p, alpha, m, l)``.

    ``l`` is the sums within a thread. ``EDGES``: rows see some of the keys; ``HOLES``: those of ``bits``.
    """
    if ONLINE:
        p, _ = capped(s, inner, coef, bias, FORM)
    else:
        p = fixed_weights(s, inner, coef, bias, FORM)
    if HOLES:
        p = gl.where(kept_columns(bits, S_L), p, float("-inf") if ONLINE else 0.0)
    if EDGES:
        keys = key + gl.arange(0, N, layout=gl.SliceLayout(0, S_L))
        at = gl.expand_dims(keys, 0)
        visible = (at >= gl.expand_dims(lo, 1)) & (at < gl.expand_dims(hi, 1))
        p = gl.where(visible, p, float("-inf") if ONLINE else 0.0)
        if not BAND:
            p = without_holes(p, float("-inf") if ONLINE else 0.0, key, Kept, kept_at, kept_len, S_L)
    if ONLINE:
        most = gl.maximum(m, gl.max(p, 1))
        # A row that has seen nothing yet has -inf; 0 in its place keeps -inf - most from being NaN.
        shift = gl.where(most == float("-inf"), 0.0, most)
        p = exp2(p - gl.expand_dims(shift, 1))
        alpha = exp2(m - shift)
        part = _sums(p, M, N)
        scale = gl.convert_layout(alpha, gl.SliceLayout(1, part.type.layout), assert_trivial=True)
        return p, alpha, most, l * gl.expand_dims(scale, 1) + part
    else:
        return p, m, m, l + _sums(p, M, N)


@gluon.jit
def _consume(
    C: gl.constexpr, Out, Lse, Lo, Hi, Kept, ones, q_s, k_s, v_s, bars, sizes, factors,
    BAND: gl.constexpr, ONLINE: gl.constexpr, TOTAL: gl.constexpr, FORM: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    DPAD: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    slo_b, B, Hq, G, Sq, Skv, left, right, kept_len = sizes
    inner, coef, bias, reference = factors
    ROWS: gl.constexpr = M * WARPGROUPS
    dtype: gl.constexpr = q_s.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DPAD, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    T_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    ROW_L: gl.constexpr = gl.SliceLayout(1, S_L)
    blocks = gl.cdiv(Sq, ROWS)
    tiles = B * Hq * blocks
    slot, phase, turn_phase = 0, 0, 0
    q_tile = q_s.index(C)
    q = q_tile.reshape([M, DPAD])
    none = gl.zeros([M, N], gl.float32, S_L)
    for turn in range(0, gl.cdiv(tiles, gl.num_programs(0))):
        tile, place, among = tile_of(turn, B * Hq)
        if tile < tiles:
            head = head_at(among, B, Hq, BAND)
            b = head // Hq
            h = head % Hq
            block = (blocks - 1 - place) * ROWS
            kept_at = kept_row(b, slo_b, Skv)
            first, full_first, clean, full_end, end = key_blocks(
                block, Lo, Hi, Kept, kept_at, kept_len, slo_b, b, left, right, Sq, Skv, BAND, ROWS, N, 4
            )
            start = block + C * M
            rows = start + gl.arange(0, M, layout=ROW_L)
            lo, hi = row_intervals(rows, Lo, Hi, slo_b, b, left, right, Sq, Skv, BAND)
            # Of the blocks past the full ones, those wholly past these rows.
            skip = gl.minimum(end - gl.cdiv(gl.max(hi, 0), N), gl.minimum(end - full_end, end - first - 1))
            for _ in range(0, skip):
                mbarrier.wait(k_full.index(slot), phase)
                mbarrier.arrive(k_empty.index(slot), count=1)
                mbarrier.wait(v_full.index(slot), phase)
                mbarrier.arrive(v_empty.index(slot), count=1)
                slot, phase = advance(slot, phase, STAGES)
            mbarrier.wait(q_full.index(C), turn_phase)
            m = gl.full([M], float("-inf"), gl.float32, ROW_L)
            l = _sums(none, M, N)
            p = gl.convert_layout(none.to(dtype), P_L, assert_trivial=True)
            total = 0.0
            if TOTAL:
                total = warpgroup_mma_init(gl.zeros([M, 8], gl.float32, T_L))
            acc = warpgroup_mma_init(gl.zeros([M, DPAD], gl.float32, O_L))
            partial = end - full_end + full_first - first
            # Of no step. (With ``slot, phase`` here, Triton 3.6 takes both for what the loop does not change, since the
            # first of its steps gives them what they are already.)
            last_slot, last_phase = 0, 0
            done = gl.maximum(skip + 1, partial)
            for index in range(skip, done):
                key = block_at(index, first, full_end, end) * N
                acc, p, m, l, total, unused = _step(
                    q, ones, k_s, v_s, k_full, k_empty, v_full, v_empty, slot, phase, last_slot, last_phase, acc, p, m,
                    l, total, none, index - skip, key, lo, hi, Kept, kept_at, kept_len, 0, inner, coef, bias,
                    True, False, BAND, ONLINE, TOTAL, FORM, M, N, DPAD, S_L, O_L, P_L, T_L,
                )  # fmt: skip
                last_slot, last_phase = slot, phase
                slot, phase = advance(slot, phase, STAGES)
            if not BAND:
                holes = partial + clean - full_first
                kept = Kept + kept_at + (full_first - partial) * N
                bits = no_bits(S_L)
                if done < holes:
                    bits = kept_bits(kept_numbers(kept + done * N, N, S_L), S_L)
                for index in range(done, holes):
                    more = kept + gl.minimum(index + 1, holes - 1) * N
                    acc, p, m, l, total, bits = _step(
                        q, ones, k_s, v_s, k_full, k_empty, v_full, v_empty, slot, phase, last_slot, last_phase, acc, p,
                        m, l, total, none, index - skip, 0, lo, hi, more, kept_at, kept_len, bits, inner, coef, bias,
                        False, True, BAND, ONLINE, TOTAL, FORM, M, N, DPAD, S_L, O_L, P_L, T_L,
                    )  # fmt: skip
                    last_slot, last_phase = slot, phase
                    slot, phase = advance(slot, phase, STAGES)
                done = gl.maximum(done, holes)
            for index in range(done, end - first):
                acc, p, m, l, total, unused = _step(
                    q, ones, k_s, v_s, k_full, k_empty, v_full, v_empty, slot, phase, last_slot, last_phase, acc, p, m,
                    l, total, none, index - skip, 0, lo, hi, Kept, kept_at, kept_len, 0, inner, coef, bias,
                    False, False, BAND, ONLINE, TOTAL, FORM, M, N, DPAD, S_L, O_L, P_L, T_L,
                )  # fmt: skip
                last_slot, last_phase = slot, phase
                slot, phase = advance(slot, phase, STAGES)
            mbarrier.wait(v_full.index(last_slot), last_phase)
            summed = end - first - skip > 1  # by the steps from the second on
            acc = warpgroup_mma(p, v_s.index(last_slot).reshape([N, DPAD]), acc, use_acc=summed, is_async=True)
            if TOTAL:
                total = _add_weights(total, p, ones, summed, T_L)
                acc, total, p = warpgroup_mma_wait(0, deps=(acc, total, p))
            else:
                acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(v_empty.index(last_slot), count=1)

            l = gl.convert_layout(gl.sum(l, axis=1), ROW_L)
            seen = l != 0.0  # NaN is seen
            if ONLINE:
                top = m
            else:
                top = gl.full([M], 0.0, gl.float32, ROW_L) + reference
            lse = gl.where(seen, (gl.log2(l) + top) * LN2, float("-inf"))
            gl.store(Lse + head.to(gl.int64) * Sq + rows, lse, mask=rows < Sq)
            if TOTAL:
                share = gl.where(seen, 1.0 / gl.convert_layout(gl.max(total, axis=1), ROW_L), 0.0)
            else:
                share = gl.where(seen, 1.0 / l, 0.0)
            share = gl.convert_layout(share, gl.SliceLayout(1, O_L), assert_trivial=True)
            q.store((acc * gl.expand_dims(share, 1)).to(dtype))
            fence_async_shared()
            store_tile(Out, [b, h, start, 0], q_tile)
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(C), count=1)
            turn_phase ^= 1


@gluon.jit
def _add_weights(total, p, ones, summed, T_L: gl.constexpr):
    """Each of the 8 columns of ``total``, or of 0 if not ``summed``, plus the sums of the rounded weights ``p``: by the
    matrix units, which have the time; the others have not."""
    p = gl.convert_layout(p, gl.DotOperandLayout(operand_index=0, parent=T_L, k_width=2), assert_trivial=True)
    return warpgroup_mma(p, ones.permute((1, 0)), total, use_acc=summed, is_async=True)


@gluon.jit
def _step(
    q, ones, k_s, v_s, k_full, k_empty, v_full, v_empty, slot, phase, last_slot, last_phase, acc, p, m, l, total,
    none, before, key, lo, hi, Kept, kept_at, kept_len, bits, inner, coef, bias,
    EDGES: gl.constexpr, HOLES: gl.constexpr, BAND: gl.constexpr, ONLINE: gl.constexpr, TOTAL: gl.constexpr,
    FORM: gl.constexpr, M: gl.constexpr, N: gl.constexpr, DPAD: gl.constexpr, S_L: gl.constexpr, O_L: gl.constexpr,
    P_L: gl.constexpr, T_L: gl.constexpr,
):  # fmt: skip
    """The product of the next keys, that of the last weights with their values, then the next weights.

    ``before``: how many steps came before. The first has no last weights: its second product is of whatever lies there,
    and the second step begins its sums anew. (A step of its own took as much room for instructions as a loop.)
    """
    mbarrier.wait(k_full.index(slot), phase)
    s = warpgroup_mma(q, k_s.index(slot).reshape([N, DPAD]).permute((1, 0)), none, use_acc=False, is_async=True)
    # The first step is of a block that may need a mask.
    begun = before > 0 if EDGES else True
    mbarrier.wait(v_full.index(last_slot), last_phase, pred=begun)
    acc = warpgroup_mma(p, v_s.index(last_slot).reshape([N, DPAD]), acc, use_acc=before > 1, is_async=True)
    if HOLES:  # of the next keys
        numbers = kept_numbers(Kept, N, S_L)
    if TOTAL:
        total = _add_weights(total, p, ones, before > 1, T_L)
        s = warpgroup_mma_wait(2, deps=(s,))
    else:
        s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    weights, alpha, m, l = _softmax(
        s, key, lo, hi, Kept, kept_at, kept_len, bits, m, l, inner, coef, bias,
        EDGES, HOLES, BAND, ONLINE, FORM, M, N, S_L,
    )  # fmt: skip
    weights = gl.convert_layout(weights.to(q.dtype), P_L, assert_trivial=True)
    # The last weights pass through the wait: their registers are read until then. With holes the next ones do too, or
    # ptxas would wait before it computes them.
    if TOTAL:
        if HOLES:
            acc, total, p, weights = warpgroup_mma_wait(0, deps=(acc, total, p, weights))
        else:
            acc, total, p = warpgroup_mma_wait(0, deps=(acc, total, p))
        total = warpgroup_mma_init(total)
    else:
        if HOLES:
            acc, p, weights = warpgroup_mma_wait(0, deps=(acc, p, weights))
        else:
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    if ONLINE:
        share = gl.convert_layout(alpha, gl.SliceLayout(1, O_L), assert_trivial=True)
        acc = acc * gl.expand_dims(share, 1)
    acc = warpgroup_mma_init(acc)
    mbarrier.arrive(v_empty.index(last_slot), count=1, pred=begun)
    if HOLES:  # here, where no product is under way, for ptxas would wait for it
        bits = kept_bits(numbers, S_L)
    return acc, weights, m, l, total, bits


@gluon.jit(do_not_specialize=NUMBERS)
def gluon_forward_kernel(
    Q, K, V, Out, Lse, Lo, Hi, Kept,
    slo_b, B, Hq, G, Sq, Skv, left, right, kept_len, inner, coef, bias, reference,
    BAND: gl.constexpr, ONLINE: gl.constexpr, TOTAL: gl.constexpr, FORM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, DPAD: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """Out ``[B, Hq, Sq, D]`` and Lse ``[B, Hq, Sq]`` float32; a program takes tiles until none is left.

    Q, K, V and Out are tensor maps of tiles ``[1, 1, rows, DPAD]``. Lo and Hi int32 ``[B or 1, Sq]``, none for a band.
    Kept, ``kept_len``, TOTAL: as ``triton.forward``'s.
    """
    M: gl.constexpr = 64
    gl.static_assert(BLOCK_M == M * WARPGROUPS)
    q_s = gl.allocate_shared_memory(Q.dtype, [WARPGROUPS, 1, 1, M, DPAD], Q.layout)
    k_s = gl.allocate_shared_memory(K.dtype, [STAGES, 1, 1, BLOCK_N, DPAD], K.layout)
    v_s = gl.allocate_shared_memory(V.dtype, [STAGES, 1, 1, BLOCK_N, DPAD], V.layout)
    ones = q_s
    if TOTAL:
        ones = gl.allocate_shared_memory(
            Q.dtype, [8, BLOCK_N], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        )
        ones.store(gl.full([8, BLOCK_N], 1.0, Q.dtype, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    q_full, q_empty = ring(WARPGROUPS), ring(WARPGROUPS)
    k_full, k_empty = ring(STAGES), ring(STAGES)
    v_full, v_empty = ring(STAGES), ring(STAGES)
    start_ring(q_full, q_empty, WARPGROUPS, 1)
    start_ring(k_full, k_empty, STAGES, WARPGROUPS)
    start_ring(v_full, v_empty, STAGES, WARPGROUPS)
    fence_async_shared()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (slo_b, B, Hq, G, Sq, Skv, left, right, kept_len)
    factors = (inner, coef, bias, reference)
    # Written out, as compile-time arguments in a tuple that has a name become run-time ones (Triton 3.6).
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (FIRST, Out, Lse, Lo, Hi, Kept, ones, q_s, k_s, v_s, bars, sizes, factors,
                            BAND, ONLINE, TOTAL, FORM, M, BLOCK_N, DPAD, WARPGROUPS, STAGES)),
                (_consume, (SECOND, Out, Lse, Lo, Hi, Kept, ones, q_s, k_s, v_s, bars, sizes, factors,
                            BAND, ONLINE, TOTAL, FORM, M, BLOCK_N, DPAD, WARPGROUPS, STAGES)),
                (_produce, (Q, K, V, Lo, Hi, Kept, q_s, k_s, v_s, bars, sizes,
                            BAND, M, BLOCK_N, DPAD, WARPGROUPS, STAGES)),
            ],
            [4, 1],
            [240, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (FIRST, Out, Lse, Lo, Hi, Kept, ones, q_s, k_s, v_s, bars, sizes, factors,
                            BAND, ONLINE, TOTAL, FORM, M, BLOCK_N, DPAD, WARPGROUPS, STAGES)),
                (_consume, (SECOND, Out, Lse, Lo, Hi, Kept, ones, q_s, k_s, v_s, bars, sizes, factors,
                            BAND, ONLINE, TOTAL, FORM, M, BLOCK_N, DPAD, WARPGROUPS, STAGES)),
                (_consume, (THIRD, Out, Lse, Lo, Hi, Kept, ones, q_s, k_s, v_s, bars, sizes, factors,
                            BAND, ONLINE, TOTAL, FORM, M, BLOCK_N, DPAD, WARPGROUPS, STAGES)),
                (_produce, (Q, K, V, Lo, Hi, Kept, q_s, k_s, v_s, bars, sizes,
                            BAND, M, BLOCK_N, DPAD, WARPGROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, PRODUCER_REGISTERS],
        )  # fmt: skip
