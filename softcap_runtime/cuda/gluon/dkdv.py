"""dk and dv for compute capability 9.0, by key blocks: as ``dq``, no atomics.

At head_dim 256 they take a kernel each: two accumulators of 64 keys are all registers of a warpgroup.
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
    FAR,
    FIRST,
    PRODUCER_REGISTERS,
    SECOND,
    advance,
    anew,
    capped,
    exp2,
    hidden,
    kept_keys,
    kept_row,
    load_tile,
    ring,
    some_hidden,
    start_ring,
    store_tile,
    tile_of,
)

NUMBERS = [
    *("slo_b", "shull_b", "B", "Hq", "Hkv", "G", "Sq", "SqPad", "Skv", "left", "right", "kept_len"),
    *("inner", "coef", "gain"),
]


@gluon.jit
def _query_blocks(
    n, First, Last, at, left, right, Sq, BAND: gl.constexpr, M: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """Blocks of M query rows that see keys n...n+N, as ``key_blocks``, at least one; with intervals none is full."""
    if BAND:
        # Row i sees some of the keys when i + left < n + N and i + right > n, all of them when
        # i + left <= n and i + right >= n + N.
        first_row = gl.maximum(n - right + 1, 0)
        end_row = gl.minimum(n + N - left, Sq)
        full_first_row = gl.maximum(n + N - right, 0)
        full_end_row = gl.minimum(n - left + 1, Sq)
        full_first = gl.cdiv(full_first_row, M)
        # The last, partial block of rows is full too when its rows inside the tensor are.
        full_end = gl.where(full_end_row == Sq, gl.cdiv(Sq, M), gl.maximum(full_end_row, 0) // M)
    else:
        first_row = gl.load(First + at)
        end_row = gl.load(Last + at)
        full_first = FAR
        full_end = 0
    first = first_row // M
    end = gl.cdiv(gl.maximum(end_row, 0), M)
    first = gl.minimum(first, end)
    full_first = gl.maximum(gl.minimum(full_first, end), first)
    full_end = gl.maximum(gl.minimum(full_end, end), full_first)
    return first, full_first, full_end, gl.maximum(end, first + 1)


@gluon.jit
def _query_block_at(index, hk, G, first, full_first, full_end, end):
    """The query head and block at a place of the order: of all heads of a group those seen in part, then the others."""
    partial = end - full_end + full_first - first
    full = full_end - full_first
    masked = index < G * partial
    place = gl.where(masked, index, index - G * partial)
    count = gl.maximum(gl.where(masked, partial, full), 1)
    edge = place % count
    before = full_first - first
    block = gl.where(masked, gl.where(edge < before, first + edge, full_end + edge - before), full_first + edge)
    return hk * G + place // count, block


@gluon.jit
def _produce_dkdv(
    Q, K, V, DO, Shift, Delta, Lo, Hi, First, Last, k_s, v_s, q_s, do_s, rows_s, bars, sizes,
    BAND: gl.constexpr, WANT_DK: gl.constexpr, M: gl.constexpr, N: gl.constexpr, DPAD: gl.constexpr,
    WARPGROUPS: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
):  # fmt: skip
    own_full, own_empty, q_full, q_empty, do_full, do_empty = bars
    shift_s, delta_s, lo_s, hi_s = rows_s
    slo_b, shull_b, B, Hq, Hkv, G, Sq, SqPad, Skv, left, right, kept_len = sizes
    KEYS: gl.constexpr = N * WARPGROUPS
    blocks = gl.cdiv(Skv, KEYS)
    tiles = B * Hkv * blocks
    q_slot, q_phase, do_slot, do_phase, turn_phase = 0, 1, 0, 1, 1
    for turn in range(0, gl.cdiv(tiles, gl.num_programs(0))):
        tile, place, head = tile_of(turn, B * Hkv)
        if tile < tiles:
            b = head // Hkv
            hk = head % Hkv
            start = place * KEYS
            first, full_first, full_end, end = _query_blocks(
                start, First, Last, b * shull_b + place, left, right, Sq, BAND, M, KEYS
            )
            for c in gl.static_range(WARPGROUPS):
                mbarrier.wait(own_empty.index(c), turn_phase)
                mbarrier.expect(own_full.index(c), (2 if WANT_DK else 1) * N * DPAD * 2)
                load_tile(K, [b, hk, start + c * N, 0], own_full.index(c), k_s.index(c))
                if WANT_DK:
                    load_tile(V, [b, hk, start + c * N, 0], own_full.index(c), v_s.index(c))
            for index in range(0, G * (end - first)):
                h, block = _query_block_at(index, hk, G, first, full_first, full_end, end)
                row = block * M
                at = (b * Hq + h) * SqPad + row
                mbarrier.wait(q_empty.index(q_slot), q_phase)
                mbarrier.expect(q_full.index(q_slot), M * DPAD * 2 + 4 * M * (2 if BAND else 4))
                load_tile(Shift, [at], q_full.index(q_slot), shift_s.index(q_slot))
                load_tile(Delta, [at], q_full.index(q_slot), delta_s.index(q_slot))
                if not BAND:
                    load_tile(Lo, [b * slo_b + row], q_full.index(q_slot), lo_s.index(q_slot))
                    load_tile(Hi, [b * slo_b + row], q_full.index(q_slot), hi_s.index(q_slot))
                load_tile(Q, [b, h, row, 0], q_full.index(q_slot), q_s.index(q_slot))
                mbarrier.wait(do_empty.index(do_slot), do_phase)
                mbarrier.expect(do_full.index(do_slot), M * DPAD * 2)
                load_tile(DO, [b, h, row, 0], do_full.index(do_slot), do_s.index(do_slot))
                q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
                do_slot, do_phase = advance(do_slot, do_phase, DO_STAGES)
            turn_phase ^= 1


@gluon.jit
def _step_dkdv(
    C: gl.constexpr, k_s, v_s, q_s, do_s, rows_s, q_full, q_empty, do_full, do_empty, slots, s, dk, dv, none,
    keys, row, masked, more, left, right, inner, coef,
    MASKED: gl.constexpr, BAND: gl.constexpr, FORM: gl.constexpr, WANT_DK: gl.constexpr, WANT_DV: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, DPAD: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    S_L: gl.constexpr, P_L: gl.constexpr,
):  # fmt: skip
    """As ``_step_dq``, of one block of query rows."""
    COLUMN_L: gl.constexpr = gl.SliceLayout(0, S_L)
    shift_s, delta_s, lo_s, hi_s = rows_s
    q_slot, q_phase, do_slot, do_phase = slots
    mbarrier.wait(do_full.index(do_slot), do_phase)
    own = anew(C)
    do = do_s.index(anew(do_slot)).reshape([M, DPAD])
    s = warpgroup_mma_wait(0, deps=(s,))
    if WANT_DK:
        v = v_s.index(own).reshape([N, DPAD])
        dp = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
    z, slope = capped(s, inner, coef, gl.expand_dims(shift_s.index(q_slot).load(COLUMN_L), 0), FORM)
    if BAND:
        if MASKED:
            rows = row + gl.arange(0, M, layout=COLUMN_L)
            z = hidden(z, gl.expand_dims(keys, 1), gl.expand_dims(rows + left, 0), gl.expand_dims(rows + right, 0))
    else:
        if masked:
            lo, hi = lo_s.index(q_slot).load(COLUMN_L), hi_s.index(q_slot).load(COLUMN_L)
            z = hidden(z, gl.expand_dims(keys, 1), gl.expand_dims(lo, 0), gl.expand_dims(hi, 0))
    p = exp2(z)
    steep = p * slope
    if WANT_DV:
        weights = gl.convert_layout(p.to(do.dtype), P_L, assert_trivial=True)
        dv = warpgroup_mma(weights, do, dv, is_async=True)
    if WANT_DK:
        dp = warpgroup_mma_wait(1 if WANT_DV else 0, deps=(dp,))
        if not WANT_DV:
            mbarrier.arrive(do_empty.index(do_slot), count=1)
        delta = gl.expand_dims(delta_s.index(q_slot).load(COLUMN_L), 0)
        ds = steep * (dp - delta)
        ds = gl.convert_layout(ds.to(do.dtype), P_L, assert_trivial=True)
        dk = warpgroup_mma(ds, q_s.index(q_slot).reshape([M, DPAD]), dk, is_async=True)
    last = q_slot
    next_slot, next_phase = advance(q_slot, q_phase, Q_STAGES)
    q_slot = gl.where(more, next_slot, q_slot)
    mbarrier.wait(q_full.index(q_slot), gl.where(more, next_phase, q_phase))
    k = k_s.index(own).reshape([N, DPAD])
    q = q_s.index(q_slot).reshape([M, DPAD])
    s = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
    if WANT_DV and WANT_DK:
        dv, dk, weights, ds = warpgroup_mma_wait(1, deps=(dv, dk, weights, ds))
        dv, dk = warpgroup_mma_init(dv), warpgroup_mma_init(dk)
    elif WANT_DV:
        dv, weights = warpgroup_mma_wait(1, deps=(dv, weights))
        dv = warpgroup_mma_init(dv)
    else:
        dk, ds = warpgroup_mma_wait(1, deps=(dk, ds))
        dk = warpgroup_mma_init(dk)
    if WANT_DV:
        mbarrier.arrive(do_empty.index(do_slot), count=1)
    mbarrier.arrive(q_empty.index(last), count=1)
    do_slot, do_phase = advance(do_slot, do_phase, DO_STAGES)
    return s, dk, dv, (next_slot, next_phase, do_slot, do_phase)


@gluon.jit
def _consume_dkdv(
    C: gl.constexpr, DK, DV, First, Last, LoMost, HiLeast, Kept, k_s, v_s, q_s, do_s, rows_s, bars, sizes, factors,
    BAND: gl.constexpr, FORM: gl.constexpr, WANT_DK: gl.constexpr, WANT_DV: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, DPAD: gl.constexpr, WARPGROUPS: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
):  # fmt: skip
    own_full, own_empty, q_full, q_empty, do_full, do_empty = bars
    slo_b, shull_b, B, Hq, Hkv, G, Sq, SqPad, Skv, left, right, kept_len = sizes
    inner, coef, gain = factors
    KEYS: gl.constexpr = N * WARPGROUPS
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DPAD, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_L, k_width=2)
    blocks = gl.cdiv(Skv, KEYS)
    tiles = B * Hkv * blocks
    slots = (0, 0, 0, 0)
    turn_phase = 0
    k_tile = k_s.index(C)
    k = k_tile.reshape([N, DPAD])
    # Without dk nothing reads the values: dv leaves through the keys' tile.
    v_tile = v_s.index(C) if WANT_DK else k_tile
    v = v_tile.reshape([N, DPAD])
    none = gl.zeros([N, M], gl.float32, S_L)
    for turn in range(0, gl.cdiv(tiles, gl.num_programs(0))):
        tile, place, head = tile_of(turn, B * Hkv)
        if tile < tiles:
            b = head // Hkv
            hk = head % Hkv
            start = place * KEYS + C * N
            first, full_first, full_end, end = _query_blocks(
                place * KEYS, First, Last, b * shull_b + place, left, right, Sq, BAND, M, KEYS
            )
            keys = start + gl.arange(0, N, layout=gl.SliceLayout(1, S_L))
            kept_at = kept_row(b, slo_b, Skv)
            keys = kept_keys(keys, Kept, kept_at, kept_len, BAND)
            holes = False
            if not BAND:
                holes = some_hidden(start, Kept, kept_at, kept_len, N)
            dk = none
            dv = none
            if WANT_DK:
                dk = warpgroup_mma_init(gl.zeros([N, DPAD], gl.float32, O_L))
            if WANT_DV:
                dv = warpgroup_mma_init(gl.zeros([N, DPAD], gl.float32, O_L))
            masked = G * (end - full_end + full_first - first)
            many = G * (end - first)
            mbarrier.wait(own_full.index(C), turn_phase)
            mbarrier.wait(q_full.index(slots[0]), slots[1])
            q = q_s.index(slots[0]).reshape([M, DPAD])
            s = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
            for index in range(0, masked):
                _, block = _query_block_at(index, hk, G, first, full_first, full_end, end)
                some_masked = True
                if not BAND:
                    # Whether some of the rows do not see some of this warpgroup's keys.
                    group = b * (slo_b // M) + block
                    all_seen = (gl.load(LoMost + group) <= start) & (gl.load(HiLeast + group) >= start + N)
                    some_masked = (not all_seen) | holes
                s, dk, dv, slots = _step_dkdv(
                    C, k_s, v_s, q_s, do_s, rows_s, q_full, q_empty, do_full, do_empty, slots, s, dk, dv, none,
                    keys, block * M, some_masked, index + 1 < many, left, right, inner, coef,
                    True, BAND, FORM, WANT_DK, WANT_DV, M, N, DPAD, Q_STAGES, DO_STAGES, S_L, P_L,
                )  # fmt: skip
            if BAND:
                for index in range(masked, many):
                    s, dk, dv, slots = _step_dkdv(
                        C, k_s, v_s, q_s, do_s, rows_s, q_full, q_empty, do_full, do_empty, slots, s, dk, dv, none,
                        keys, 0, False, index + 1 < many, left, right, inner, coef,
                        False, BAND, FORM, WANT_DK, WANT_DV, M, N, DPAD, Q_STAGES, DO_STAGES, S_L, P_L,
                    )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=(s,))
            if WANT_DK:
                dk = warpgroup_mma_wait(0, deps=(dk,))
                k.store((dk * gain).to(k.dtype))
            if WANT_DV:
                dv = warpgroup_mma_wait(0, deps=(dv,))
                v.store(dv.to(k.dtype))
            fence_async_shared()
            if WANT_DK:
                store_tile(DK, [b, hk, start, 0], k_tile)
            if WANT_DV:
                store_tile(DV, [b, hk, start, 0], v_tile)
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(C), count=1)
            turn_phase ^= 1


@gluon.jit(do_not_specialize=NUMBERS)
def gluon_dkdv_kernel(
    Q, K, V, DO, Shift, Delta, DK, DV, Lo, Hi, First, Last, LoMost, HiLeast, Kept,
    slo_b, shull_b, B, Hq, Hkv, G, Sq, SqPad, Skv, left, right, kept_len, inner, coef, gain,
    BAND: gl.constexpr, FORM: gl.constexpr, WANT_DK: gl.constexpr, WANT_DV: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, DPAD: gl.constexpr,
    Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
):  # fmt: skip
    """DK and DV (or one of them) of BLOCK_N keys, summed over the query heads of their group.

    Shift, Delta, Lo and Hi are tensor maps of BLOCK_M elements; Lo to HiLeast are ``query_hull_kernel``'s. Kept and
    ``kept_len``: as ``triton.forward``'s.
    """
    WARPGROUPS: gl.constexpr = 2
    N: gl.constexpr = 64
    gl.static_assert(BLOCK_N == N * WARPGROUPS)
    k_s = gl.allocate_shared_memory(K.dtype, [WARPGROUPS, 1, 1, N, DPAD], K.layout)
    v_s = k_s
    if WANT_DK:
        v_s = gl.allocate_shared_memory(K.dtype, [WARPGROUPS, 1, 1, N, DPAD], V.layout)
    q_s = gl.allocate_shared_memory(K.dtype, [Q_STAGES, 1, 1, BLOCK_M, DPAD], Q.layout)
    do_s = gl.allocate_shared_memory(K.dtype, [DO_STAGES, 1, 1, BLOCK_M, DPAD], DO.layout)
    shift_s = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], Shift.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], Shift.layout)
    lo_s, hi_s = shift_s, delta_s
    if not BAND:
        lo_s = gl.allocate_shared_memory(gl.int32, [Q_STAGES, BLOCK_M], Lo.layout)
        hi_s = gl.allocate_shared_memory(gl.int32, [Q_STAGES, BLOCK_M], Lo.layout)
    own_full, own_empty = ring(WARPGROUPS), ring(WARPGROUPS)
    q_full, q_empty = ring(Q_STAGES), ring(Q_STAGES)
    do_full, do_empty = ring(DO_STAGES), ring(DO_STAGES)
    start_ring(own_full, own_empty, WARPGROUPS, 1)
    start_ring(q_full, q_empty, Q_STAGES, WARPGROUPS)
    start_ring(do_full, do_empty, DO_STAGES, WARPGROUPS)
    fence_async_shared()
    bars = (own_full, own_empty, q_full, q_empty, do_full, do_empty)
    rows_s = (shift_s, delta_s, lo_s, hi_s)
    sizes = (slo_b, shull_b, B, Hq, Hkv, G, Sq, SqPad, Skv, left, right, kept_len)
    factors = (inner, coef, gain)
    gl.warp_specialize(
        [
            (_consume_dkdv, (FIRST, DK, DV, First, Last, LoMost, HiLeast, Kept, k_s, v_s, q_s, do_s, rows_s, bars,
                             sizes, factors, BAND, FORM, WANT_DK, WANT_DV, BLOCK_M, N, DPAD, WARPGROUPS,
                             Q_STAGES, DO_STAGES)),
            (_consume_dkdv, (SECOND, DK, DV, First, Last, LoMost, HiLeast, Kept, k_s, v_s, q_s, do_s, rows_s, bars,
                             sizes, factors, BAND, FORM, WANT_DK, WANT_DV, BLOCK_M, N, DPAD, WARPGROUPS,
                             Q_STAGES, DO_STAGES)),
            (_produce_dkdv, (Q, K, V, DO, Shift, Delta, Lo, Hi, First, Last, k_s, v_s, q_s, do_s, rows_s, bars, sizes,
                             BAND, WANT_DK, BLOCK_M, N, DPAD, WARPGROUPS, Q_STAGES, DO_STAGES)),
        ],
        [4, 1],
        [240, PRODUCER_REGISTERS],
    )  # fmt: skip
