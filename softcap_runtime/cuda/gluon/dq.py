"""dq for compute capability 9.0, by query blocks.

As ``triton.backward``, from which the formulas are, with one warp that loads tiles and two warpgroups that
compute 64 rows each. A warpgroup's products wait for its pointwise work and the reverse; those of the other run
meanwhile. ``triton.backward.statistics_kernel`` leaves Shift and Delta.
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
    PRODUCER_REGISTERS,
    SECOND,
    THIRD,
    advance,
    anew,
    block_at,
    capped,
    exp2,
    hidden,
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

NUMBERS = ["slo_b", "B", "Hq", "G", "Sq", "SqPad", "Skv", "left", "right", "kept_len", "inner", "coef", "gain"]


@gluon.jit
def _produce_dq(
    Q, K, V, DO, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes,
    BAND: gl.constexpr, M: gl.constexpr, N: gl.constexpr, DPAD: gl.constexpr, WARPGROUPS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    own_full, own_empty, k_full, k_empty, v_full, v_empty = bars
    slo_b, B, Hq, G, Sq, SqPad, Skv, left, right, kept_len = sizes
    ROWS: gl.constexpr = M * WARPGROUPS
    blocks = gl.cdiv(Sq, ROWS)
    tiles = B * Hq * blocks
    k_slot, k_phase, v_slot, v_phase, turn_phase = 0, 1, 0, 1, 1
    for turn in range(0, gl.cdiv(tiles, gl.num_programs(0))):
        tile, place, head = tile_of(turn, B * Hq)
        if tile < tiles:
            b = head // Hq
            h = head % Hq
            hk = h // G
            start = (blocks - 1 - place) * ROWS
            kept_at = kept_row(b, slo_b, Skv)
            first, _, _, full_end, end = key_blocks(
                start, Lo, Hi, Kept, kept_at, kept_len, slo_b, b, left, right, Sq, Skv, BAND, ROWS, N, 1
            )
            for c in gl.static_range(WARPGROUPS):
                mbarrier.wait(own_empty.index(c), turn_phase)
                mbarrier.expect(own_full.index(c), 2 * M * DPAD * 2)
                load_tile(Q, [b, h, start + c * M, 0], own_full.index(c), q_s.index(c))
                load_tile(DO, [b, h, start + c * M, 0], own_full.index(c), do_s.index(c))
            for index in range(0, end - first):
                key = block_at(index, first, full_end, end) * N
                mbarrier.wait(k_empty.index(k_slot), k_phase)
                mbarrier.expect(k_full.index(k_slot), N * DPAD * 2)
                load_tile(K, [b, hk, key, 0], k_full.index(k_slot), k_s.index(k_slot))
                mbarrier.wait(v_empty.index(v_slot), v_phase)
                mbarrier.expect(v_full.index(v_slot), N * DPAD * 2)
                load_tile(V, [b, hk, key, 0], v_full.index(v_slot), v_s.index(v_slot))
                k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
                v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
            turn_phase ^= 1


@gluon.jit
def _step_dq(
    C: gl.constexpr, q_s, do_s, k_s, v_s, k_full, k_empty, v_full, v_empty, slots, s, acc, none, shift, delta,
    key, lo, hi, Kept, kept_at, kept_len, bits, more, inner, coef,
    EDGES: gl.constexpr, HOLES: gl.constexpr, BAND: gl.constexpr, FORM: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    DPAD: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, S_L: gl.constexpr, P_L: gl.constexpr,
):  # fmt: skip
    """Of one block of keys, whose product ``s`` is under way: what it adds to dq, and the product of the next.

    The last block of a tile (``more`` is 0) takes its own keys for the next: nobody reads that product.
    """
    k_slot, k_phase, v_slot, v_phase = slots
    mbarrier.wait(v_full.index(v_slot), v_phase)
    own = anew(C)
    do = do_s.index(own).reshape([M, DPAD])
    v = v_s.index(anew(v_slot)).reshape([N, DPAD])
    # ptxas serialises what is waited for by count across the steps of a loop.
    s = warpgroup_mma_wait(0, deps=(s,))
    dp = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
    if HOLES:  # of the next keys
        numbers = kept_numbers(Kept, N, S_L)
    z, slope = capped(s, inner, coef, gl.expand_dims(shift, 1), FORM)
    if EDGES:
        keys = key + gl.arange(0, N, layout=gl.SliceLayout(0, S_L))
        z = hidden(z, gl.expand_dims(keys, 0), gl.expand_dims(lo, 1), gl.expand_dims(hi, 1))
    steep = exp2(z) * slope
    # Here and not in the logits, for which registers would be spilled.
    if EDGES and not BAND:
        steep = without_holes(steep, 0.0, key, Kept, kept_at, kept_len, S_L)
    if HOLES:
        steep = gl.where(kept_columns(bits, S_L), steep, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(v_empty.index(v_slot), count=1)
    if HOLES:
        bits = kept_bits(numbers, S_L)
    ds = steep * (dp - gl.expand_dims(delta, 1))
    ds = gl.convert_layout(ds.to(do.dtype), P_L, assert_trivial=True)
    acc = warpgroup_mma(ds, k_s.index(k_slot).reshape([N, DPAD]), acc, is_async=True)
    last = k_slot
    next_slot, next_phase = advance(k_slot, k_phase, K_STAGES)
    k_slot = gl.where(more, next_slot, k_slot)
    mbarrier.wait(k_full.index(k_slot), gl.where(more, next_phase, k_phase))
    q = q_s.index(own).reshape([M, DPAD])
    k = k_s.index(k_slot).reshape([N, DPAD])
    s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    acc, ds = warpgroup_mma_wait(1, deps=(acc, ds))
    acc = warpgroup_mma_init(acc)
    mbarrier.arrive(k_empty.index(last), count=1)
    v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
    return s, acc, (next_slot, next_phase, v_slot, v_phase), bits


@gluon.jit
def _consume_dq(
    C: gl.constexpr, DQ, Shift, Delta, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes, factors,
    BAND: gl.constexpr, FORM: gl.constexpr, M: gl.constexpr, N: gl.constexpr, DPAD: gl.constexpr,
    WARPGROUPS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    own_full, own_empty, k_full, k_empty, v_full, v_empty = bars
    slo_b, B, Hq, G, Sq, SqPad, Skv, left, right, kept_len = sizes
    inner, coef, gain = factors
    ROWS: gl.constexpr = M * WARPGROUPS
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DPAD, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    ROW_L: gl.constexpr = gl.SliceLayout(1, S_L)
    blocks = gl.cdiv(Sq, ROWS)
    tiles = B * Hq * blocks
    slots = (0, 0, 0, 0)
    turn_phase = 0
    q_tile = q_s.index(C)
    q = q_tile.reshape([M, DPAD])
    none = gl.zeros([M, N], gl.float32, S_L)
    for turn in range(0, gl.cdiv(tiles, gl.num_programs(0))):
        tile, place, head = tile_of(turn, B * Hq)
        if tile < tiles:
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
            at = head.to(gl.int64) * SqPad + gl.minimum(rows, SqPad - 1)
            shift = gl.load(Shift + at)
            delta = gl.load(Delta + at)
            acc = warpgroup_mma_init(gl.zeros([M, DPAD], gl.float32, O_L))
            partial = end - full_end + full_first - first
            mbarrier.wait(own_full.index(C), turn_phase)
            mbarrier.wait(k_full.index(slots[0]), slots[1])
            k = k_s.index(slots[0]).reshape([N, DPAD])
            s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
            for index in range(0, partial):
                key = block_at(index, first, full_end, end) * N
                s, acc, slots, unused = _step_dq(
                    C, q_s, do_s, k_s, v_s, k_full, k_empty, v_full, v_empty, slots, s, acc, none, shift, delta,
                    key, lo, hi, Kept, kept_at, kept_len, 0, index + 1 < end - first, inner, coef,
                    True, False, BAND, FORM, M, N, DPAD, K_STAGES, V_STAGES, S_L, P_L,
                )  # fmt: skip
            done = partial
            if not BAND:
                done = partial + clean - full_first
                kept = Kept + kept_at + (full_first - partial) * N
                bits = no_bits(S_L)
                if partial < done:
                    bits = kept_bits(kept_numbers(kept + partial * N, N, S_L), S_L)
                for index in range(partial, done):
                    following = kept + gl.minimum(index + 1, done - 1) * N
                    s, acc, slots, bits = _step_dq(
                        C, q_s, do_s, k_s, v_s, k_full, k_empty, v_full, v_empty, slots, s, acc, none, shift, delta,
                        0, lo, hi, following, kept_at, kept_len, bits, index + 1 < end - first, inner, coef,
                        False, True, BAND, FORM, M, N, DPAD, K_STAGES, V_STAGES, S_L, P_L,
                    )  # fmt: skip
            for index in range(done, end - first):
                s, acc, slots, unused = _step_dq(
                    C, q_s, do_s, k_s, v_s, k_full, k_empty, v_full, v_empty, slots, s, acc, none, shift, delta,
                    0, lo, hi, Kept, kept_at, kept_len, 0, index + 1 < end - first, inner, coef,
                    False, False, BAND, FORM, M, N, DPAD, K_STAGES, V_STAGES, S_L, P_L,
                )  # fmt: skip
            acc, s = warpgroup_mma_wait(0, deps=(acc, s))
            q.store((acc * gain).to(q.dtype))
            fence_async_shared()
            store_tile(DQ, [b, h, start, 0], q_tile)
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(C), count=1)
            turn_phase ^= 1


@gluon.jit(do_not_specialize=NUMBERS)
def gluon_dq_kernel(
    Q, K, V, DO, Shift, Delta, DQ, Lo, Hi, Kept,
    slo_b, B, Hq, G, Sq, SqPad, Skv, left, right, kept_len, inner, coef, gain,
    BAND: gl.constexpr, FORM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, DPAD: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """DQ ``[B, Hq, Sq, D]``; Shift and Delta float32 ``[B, Hq, SqPad]``; a program takes tiles until none is left.

    Kept and ``kept_len``: as ``triton.forward``'s.
    """
    M: gl.constexpr = 64
    WARPGROUPS: gl.constexpr = BLOCK_M // M
    q_s = gl.allocate_shared_memory(Q.dtype, [WARPGROUPS, 1, 1, M, DPAD], Q.layout)
    do_s = gl.allocate_shared_memory(Q.dtype, [WARPGROUPS, 1, 1, M, DPAD], Q.layout)
    k_s = gl.allocate_shared_memory(Q.dtype, [K_STAGES, 1, 1, BLOCK_N, DPAD], K.layout)
    v_s = gl.allocate_shared_memory(Q.dtype, [V_STAGES, 1, 1, BLOCK_N, DPAD], V.layout)
    own_full, own_empty = ring(WARPGROUPS), ring(WARPGROUPS)
    k_full, k_empty = ring(K_STAGES), ring(K_STAGES)
    v_full, v_empty = ring(V_STAGES), ring(V_STAGES)
    start_ring(own_full, own_empty, WARPGROUPS, 1)
    start_ring(k_full, k_empty, K_STAGES, WARPGROUPS)
    start_ring(v_full, v_empty, V_STAGES, WARPGROUPS)
    fence_async_shared()
    bars = (own_full, own_empty, k_full, k_empty, v_full, v_empty)
    sizes = (slo_b, B, Hq, G, Sq, SqPad, Skv, left, right, kept_len)
    factors = (inner, coef, gain)
    # Written out, as compile-time arguments in a tuple that has a name become run-time ones (Triton 3.6).
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume_dq, (FIRST, DQ, Shift, Delta, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes, factors,
                               BAND, FORM, M, BLOCK_N, DPAD, WARPGROUPS, K_STAGES, V_STAGES)),
                (_consume_dq, (SECOND, DQ, Shift, Delta, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes, factors,
                               BAND, FORM, M, BLOCK_N, DPAD, WARPGROUPS, K_STAGES, V_STAGES)),
                (_produce_dq, (Q, K, V, DO, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes,
                               BAND, M, BLOCK_N, DPAD, WARPGROUPS, K_STAGES, V_STAGES)),
            ],
            [4, 1],
            [240, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_dq, (FIRST, DQ, Shift, Delta, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes, factors,
                               BAND, FORM, M, BLOCK_N, DPAD, WARPGROUPS, K_STAGES, V_STAGES)),
                (_consume_dq, (SECOND, DQ, Shift, Delta, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes, factors,
                               BAND, FORM, M, BLOCK_N, DPAD, WARPGROUPS, K_STAGES, V_STAGES)),
                (_consume_dq, (THIRD, DQ, Shift, Delta, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes, factors,
                               BAND, FORM, M, BLOCK_N, DPAD, WARPGROUPS, K_STAGES, V_STAGES)),
                (_produce_dq, (Q, K, V, DO, Lo, Hi, Kept, q_s, do_s, k_s, v_s, bars, sizes,
                               BAND, M, BLOCK_N, DPAD, WARPGROUPS, K_STAGES, V_STAGES)),
            ],
            [4, 4, 1],
            [160, 160, PRODUCER_REGISTERS],
        )  # fmt: skip
