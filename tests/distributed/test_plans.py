"""Layouts and plans of every rank, in one process: no process group is needed to make them."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.oracle import MaskCase, mask_cases
from torch import Tensor

from softcap_runtime import AttentionConfig
from softcap_runtime.distributed import SequenceLayout, context_mask
from softcap_runtime.distributed import context as making
from softcap_runtime.distributed import keys as moving
from softcap_runtime.distributed.agree import digest_of
from softcap_runtime.distributed.ranges import keys_seen, length, renumbered
from softcap_runtime.masks import RowIntervals, band, dense, row_intervals

CPU_MESH: Any = SimpleNamespace(device_type="cpu")
NO_RUNTIME: Any = None
LONG, RANKS = 131_072, 8
CONFIG, HALVES = AttentionConfig(scale=1.0), SequenceLayout.contiguous(8, 2)


@st.composite
def layouts(draw: st.DrawFn, mask: RowIntervals) -> SequenceLayout:
    seq_len = mask.q_len
    kinds = ["contiguous", "balanced"] + (["zigzag"] if seq_len > 1 else [])
    kind = draw(st.sampled_from(kinds))
    ranks = draw(st.integers(1, seq_len // (2 if kind == "zigzag" else 1)))
    if kind == "balanced":
        return SequenceLayout.balanced(mask, ranks, block=draw(st.integers(1, 5)))
    made: SequenceLayout = getattr(SequenceLayout, kind)(seq_len, ranks)
    return made


def whole_mask(case: MaskCase) -> RowIntervals:
    """Of a case with as many rows as keys, and nothing that a context does not take."""
    case = {**case, "q_len": case["kv_len"], "cache_lengths": None, "query_positions": None}
    return row_intervals(**case)


@given(case=mask_cases(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_rows_over_the_keys_they_see_are_row_intervals(case: MaskCase, data: st.DataObject) -> None:
    mask = whole_mask(case)
    layout = data.draw(layouts(mask))
    seen = dense(mask, "cpu")
    counts = seen.sum((0, 2))
    assert sorted(torch.cat([layout.rows(rank) for rank in range(layout.ranks)]).tolist()) == list(range(mask.q_len))
    for rank, ranges in enumerate(layout.ranges):
        rows = layout.rows(rank)
        assert layout.count(rank) == len(rows) > 0
        keys = keys_seen(mask, ranges)
        wanted = seen[:, rows].any(1).any(0)
        chosen = torch.zeros(mask.kv_len, dtype=torch.bool)
        for start, end in keys:
            chosen[start:end] = True
        assert torch.equal(chosen, wanted)  # not one more than any row sees
        if not keys:
            continue
        local = renumbered(mask, ranges, keys)
        assert (local.q_len, local.kv_len) == (len(rows), length(keys))
        assert torch.equal(dense(local, "cpu"), seen[:, rows][:, :, chosen])
        assert sum(making.pairs_of(mask, ranges)) == int(counts[rows].sum())


def rows_of(plan: making.KeyPlan, rows: Tensor) -> Tensor:
    """Its outer rows."""
    ahead, inner, _ = plan.rows
    return torch.cat([rows[:ahead], rows[ahead + inner :]])


def keys_of_rows(seen: Tensor, rows: Tensor) -> Tensor:
    chosen = seen[:, rows].any(1).any(0)
    if not chosen.any():
        chosen[rows[0]] = True  # no kernel takes no keys
    return chosen


@given(case=mask_cases(), data=st.data(), heads=st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None)
def test_pieces_arrive_in_order(case: MaskCase, data: st.DataObject, heads: int) -> None:
    """The exchange of keys, all ranks in this process: each ends with the keys that it sees, in their order."""
    mask = whole_mask(case)
    seen = dense(mask, "cpu")
    layout = data.draw(layouts(mask))
    config = AttentionConfig(scale=1.0, causal=case["causal"], window=case["window"])
    contexts = [making._made(config, layout, CPU_MESH, rank, "keys", mask) for rank in range(layout.ranks)]
    k = torch.randn(2, heads, mask.q_len, 3)
    sent: dict[int, tuple[Tensor, list[int], list[int]]] = {}
    coming: dict[int, moving._Exchange] = {}
    for context in contexts:
        mine = layout.shard(k, 2, context.rank)

        def start(
            _: Tensor, x: Tensor, received: list[int], out: list[int], mesh: Any, rank: int = context.rank
        ) -> None:
            sent[rank] = (x, received, out)

        layer = making.Layer(NO_RUNTIME, config, context, 1)
        moving._start, real = start, moving._start  # type: ignore[assignment]
        try:
            coming[context.rank] = moving._send_keys(layer, mine, -mine)
        finally:
            moving._start = real
    for context in contexts:
        rank, mine = context.rank, layout.shard(k, 2, context.rank)
        arrived = coming[rank].arrived
        if sent:
            parts = [sent[source][0].split(sent[source][2])[rank] for source in range(layout.ranks)]
            assert [len(part) for part in parts] == sent[rank][1]
            torch.cat(parts, out=arrived)
        plan = context.by_keys
        assert plan is not None
        if plan.inner is not None:
            inner = layout.rows(rank)[plan.rows[0] : plan.rows[0] + plan.rows[1]]
            assert torch.equal(dense(plan.inner, "cpu"), seen[:, inner][:, :, layout.rows(rank)])
            others = torch.ones(mask.kv_len, dtype=torch.bool)
            others[layout.rows(rank)] = False
            assert not seen[:, inner][:, :, others].any()
        assert context.key_rows[rank] == len(arrived)
        everything = torch.zeros(mask.kv_len, dtype=torch.bool)
        everything[layout.rows(rank)] = plan.outer is None or plan.inner is not None
        if plan.outer is not None:
            everything |= keys_of_rows(seen, rows_of(plan, layout.rows(rank)))
        found = moving._together(mine, -mine, arrived, plan.keys)
        assert torch.equal(found[0], k[:, :, everything])
        assert torch.equal(found[1], -k[:, :, everything])
        assert torch.equal(dense(plan.every, "cpu"), seen[:, layout.rows(rank)][:, :, everything])
        # Gradients: of others' keys as these came, of own ones at their rows.
        places = moving._arrival(plan.keys)
        assert torch.equal(
            torch.cat([mine[:, :, :0], *(found[0][:, :, a:b] for a, b in places)], 2), arrived[:, 0].permute(1, 2, 0, 3)
        )
        kept = everything[layout.rows(rank)][:, None]
        assert torch.equal(moving._own_rows(found[0], plan.keys, mine.shape[2]), mine.where(kept, 0.0))
        if plan.outer is None:
            assert plan.inner is not None
            continue
        keys, values = moving._outer_keys(mine, -mine, coming[rank], plan)
        outer = rows_of(plan, layout.rows(rank))
        chosen = keys_of_rows(seen, outer)
        assert torch.equal(keys, k[:, :, chosen])
        assert torch.equal(values, -k[:, :, chosen])
        assert torch.equal(dense(plan.outer, "cpu"), seen[:, outer][:, :, chosen])


def computed(config: AttentionConfig, layout: SequenceLayout, method: Any, **masks: Tensor) -> making.ContextMask:
    whole = making._whole(config, layout.seq_len, masks)
    return making._made(config, layout, CPU_MESH, 0, method, whole)


@pytest.mark.parametrize(
    ("window", "kind", "method", "most"),
    [(None, "zigzag", "keys", 1.02), (4096, "contiguous", "keys", 1.07), (None, "contiguous", "heads", 1.0)],
)
def test_balance(window: int | None, kind: str, method: str, most: float) -> None:
    layout = getattr(SequenceLayout, kind)(LONG, RANKS)
    context = computed(AttentionConfig(scale=1.0, window=window), layout, method)
    exact = sum(making.pairs_of(context.whole, [(0, LONG)]))
    assert sum(context.pairs) == exact
    assert max(context.pairs) / (exact / RANKS) <= most


def test_balanced_documents(seed: int) -> None:
    ids = (torch.rand(1, LONG) < 1 / 2048).cumsum(1)
    mask = row_intervals(LONG, LONG, causal=True, window=None, document_ids=ids)
    layout = SequenceLayout.balanced(mask, RANKS)
    context = computed(AttentionConfig(scale=1.0), layout, "keys", document_ids=ids)
    plain = computed(AttentionConfig(scale=1.0), SequenceLayout.contiguous(LONG, RANKS), "keys", document_ids=ids)
    assert max(context.pairs) < max(plain.pairs)
    assert max(context.pairs) / (sum(context.pairs) / RANKS) <= 1.05
    assert {layout.count(rank) for rank in range(RANKS)} == {LONG // RANKS}


def test_a_window_moves_few_keys() -> None:
    config = AttentionConfig(scale=1.0, window=4096)
    context = computed(config, SequenceLayout.contiguous(LONG, RANKS), "auto")
    received = context.received_bytes(16, 8, 256, torch.bfloat16)
    gathered = (LONG - LONG // RANKS) * 2 * 8 * 256 * 2
    assert max(received) / gathered <= 0.05
    for rank in (0, 1, RANKS - 1):
        plan = making._made(config, context.layout, CPU_MESH, rank, "keys", context.whole).by_keys
        assert plan is not None
        assert plan.rows == ((4095 if rank else 0), LONG // RANKS - (4095 if rank else 0), 0)
        assert all(
            mask.lo is None for mask in plan.masks(train=True)
        )  # bands: no vector is made, and kernels of bands serve


def test_rows_computed_while_keys_travel() -> None:
    """As many as see keys of their rank alone; where those see too little, or a rank has two chunks, none."""

    def rows(rank: int, window: int, kind: str = "contiguous", causal: bool = False, **masks: Tensor) -> Any:
        config = AttentionConfig(scale=1.0, window=window, causal=causal)
        layout = getattr(SequenceLayout, kind)(90, 3)
        whole = making._whole(config, 90, masks)
        plan = making._made(config, layout, CPU_MESH, rank, "keys", whole).by_keys
        assert plan is not None
        return plan.rows

    assert [rows(rank, 9) for rank in range(3)] == [(0, 22, 8), (8, 14, 8), (8, 22, 0)]
    assert [rows(rank, 9, causal=True) for rank in range(3)] == [(0, 30, 0), (8, 22, 0), (8, 22, 0)]
    assert rows(1, 9, "zigzag", causal=True) == (0, 0, 30)
    assert rows(1, 29, causal=True) == (0, 0, 30)  # the last two rows: a fifteenth of the pairs
    ids = (torch.arange(90) >= 40).long()[None]
    assert rows(1, 90, causal=True, document_ids=ids) == (10, 20, 0)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_plan_is_made_in_time(kind: str, packed: bool, seed: int) -> None:
    masks = {"document_ids": (torch.rand(1, LONG) < 1 / 2048).cumsum(1)} if packed else {}
    layout = getattr(SequenceLayout, kind)(LONG, RANKS)
    took = []
    for _ in range(7):
        started = time.process_time()
        computed(AttentionConfig(scale=1.0, window=4096), layout, "keys", **masks)
        took.append(time.process_time() - started)
    assert statistics.median(took) <= 0.03


def test_digests_tell_masks_apart(seed: int) -> None:
    x = torch.randint(0, 1000, (1, 50), dtype=torch.int32)
    seen = {digest_of(x)}
    for at in range(49):
        other = x.clone()
        other[0, at] += 1
        seen.add(digest_of(other))
        other[0, at + 1] -= 1  # the same sum
        seen.add(digest_of(other))
    assert len(seen) == 99
    assert digest_of(x.clone()) in seen


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SequenceLayout.contiguous(3, 4), "ranks: 4 for 3 tokens, expected 1 to 3"),
        (lambda: SequenceLayout.zigzag(7, 4), "ranks: 4 for 7 tokens, expected 1 to 3"),
        (lambda: SequenceLayout.contiguous(3, 0), "ranks: 0"),
        (lambda: SequenceLayout.balanced(band(9, 9, causal=True, window=None), 2, block=0), "block: 0"),
        (lambda: SequenceLayout.contiguous(-3, 1), "seq_len: -3, expected an integer of at least 1"),
        (lambda: HALVES.shard(torch.ones(7), 0, 0), "x: 7 rows in dimension 0"),
        (lambda: HALVES.shard(torch.ones(8), 1, 0), "dim: 1, expected one of the 1 dimensions of x"),
        (lambda: HALVES.shard(torch.ones(8), 0, 2), r"rank: 2, expected 0 to 1; pass mesh.get_local_rank\(\)"),
        (lambda: HALVES.rows(-1), "rank: -1, expected 0 to 1"),
        (lambda: computed(CONFIG, HALVES, "auto").received_bytes(2, 0, 8, torch.float32), "kv_heads: 0, expected"),
    ],
)
def test_what_can_not_be_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SequenceLayout.balanced(30, 2), "mask: int, expected RowIntervals"),
        (lambda: SequenceLayout.contiguous("8", 2), "seq_len: '8', expected an integer"),
        (lambda: SequenceLayout.zigzag(8, 2.0), "ranks: 2.0, expected an integer"),
        (lambda: HALVES.shard([1], 0, 0), "x: list, expected a tensor"),
        (lambda: HALVES.unshard(torch.ones(4), 0, None), "mesh: NoneType, expected a DeviceMesh; make one with"),
        (lambda: context_mask(CONFIG, None, HALVES), "layout: NoneType, expected a SequenceLayout; make one with"),
        (lambda: context_mask(CONFIG, HALVES, 2), "mesh: int, expected a DeviceMesh; make one with"),
        (
            lambda: computed(CONFIG, HALVES, "auto").received_bytes(2, 2, 8, "bf16"),
            "dtype: str, expected a torch.dtype",
        ),
    ],
)
def test_arguments_of_other_kinds_are_refused(call: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"^{words}"):
        call()


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"document_ids": torch.zeros(1, 4, dtype=torch.int64)}, "document_ids: 4 tokens, expected the 8"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask: 4 tokens, expected the 8"),
        ({"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, "attention_mask: shape"),
        ({"document_ids": torch.zeros(1, 8, dtype=torch.int64, device="meta")}, "document_ids: on meta"),
        ({"document_ids": torch.tensor([[1, 0] * 4])}, "document_ids: 0 after 1"),
    ],
)
def test_masks_that_are_not_the_sequence_s_are_refused(masks: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        computed(AttentionConfig(scale=1.0), SequenceLayout.contiguous(8, 2), "auto", **masks)


def test_heads_that_do_not_divide() -> None:
    config = AttentionConfig(scale=1.0)
    layout = SequenceLayout.contiguous(8, 4)
    assert computed(config, layout, "auto").resolved(8, 2) == "heads"
    assert computed(config, layout, "auto").resolved(6, 2) == "keys"
    assert computed(config, layout, "auto").resolved(12, 3) == "keys"
    assert computed(config.model_copy(update={"window": 3}), layout, "auto").resolved(8, 2) == "keys"
    with pytest.raises(ValueError, match="method: 'heads' for 6 query and 2 key heads over 4 ranks"):
        computed(config, layout, "heads").resolved(6, 2)
