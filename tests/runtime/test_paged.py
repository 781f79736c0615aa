"""Paged caches against the reference, sequence by sequence over contiguous keys."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, Backend, Wrapped, expected, relative_error
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, paged

HEADS, KV_HEADS = 4, 2


class Cache:
    """Sequences of these lengths in pages that lie in any order; what no sequence holds is NaN ."""

    def __init__(self, lengths: list[int], page_size: int, dtype: torch.dtype = torch.float32) -> None:
        counts = [-(-length // page_size) for length in lengths]
        pages = torch.randperm(sum(counts) + 3).tolist()
        self.k, self.v = (torch.randn(len(pages), page_size, KV_HEADS, HEAD_DIM).to(dtype) for _ in "kv")
        self.table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            self.table[row, :count] = torch.tensor([pages.pop() for _ in range(count)])
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        held = torch.zeros(self.k.shape[:2], dtype=torch.bool)
        for row, length in enumerate(lengths):
            for place in range(length):
                held[self.table[row, place // page_size], place % page_size] = True
        for x in (self.k, self.v):
            x[~held] = torch.nan

    def keys(self, row: int) -> tuple[Tensor, Tensor]:
        """Of one sequence, contiguous: ``[1, Hkv, length, D]``."""
        length, size = int(self.lengths[row]), self.k.shape[1]
        own = self.table[row, : -(-length // size)].long()
        return tuple(x[own].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (self.k, self.v))

    def want(self, q: Tensor, row: int, config: AttentionConfig) -> Tensor:
        return expected(q, *self.keys(row), config)


@pytest.fixture(params=["auto", "eager"])
def served(runtimes: dict[str, Runtime], request: pytest.FixtureRequest) -> Runtime:
    return runtimes[request.param]


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_as_many_rows_in_each(
    served: Runtime, page_size: int, window: int | None, causal: bool, rows: int, seed: int
) -> None:
    config = AttentionConfig(softcap=30.0, scale=0.1, window=window, causal=causal)
    cache = Cache([rows, 33, 300, 64], page_size)
    q = torch.randn(4, HEADS, rows, HEAD_DIM)
    out = served.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths)
    want = torch.cat([cache.want(q[row : row + 1], row, config) for row in range(4)])
    assert relative_error(out, want) <= 2e-6


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_any_number_of_rows_in_each(served: Runtime, window: int | None, causal: bool, seed: int) -> None:
    config = AttentionConfig(softcap=30.0, scale=0.1, window=window, causal=causal)
    counts, padding = [1, 33, 0, 7, 1], 3
    cache = Cache([100, 33, 5, 64, 17], 16)
    offsets = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
    q = torch.randn(1, HEADS, sum(counts) + padding, HEAD_DIM)
    out = served.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths, cu_seqlens_q=offsets)
    parts = [
        cache.want(q[:, :, first:past], row, config)
        for row, (first, past) in enumerate(pairwise(offsets))
        if first < past
    ]
    assert relative_error(out[:, :, :-padding], torch.cat(parts, 2)) <= 2e-6
    assert not out[:, :, -padding:].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_row_of_each_side_by_side(served: Runtime, dtype: torch.dtype, seed: int) -> None:
    config = AttentionConfig(softcap=30.0, scale=0.1, window=20)
    cache = Cache([100, 33, 1], 16)
    q = torch.randn(1, HEADS, 3, HEAD_DIM)
    out = served.paged_attention(
        q, cache.k, cache.v, config, cache.table, cache.lengths, cu_seqlens_q=torch.arange(4, dtype=dtype)
    )
    want = torch.cat([cache.want(q[:, :, row : row + 1], row, config) for row in range(3)], 2)
    assert relative_error(out, want) <= 2e-6


@pytest.mark.parametrize("heads", [2, 16, 32])
def test_groups_of_any_size(served: Runtime, heads: int, seed: int) -> None:
    config = AttentionConfig(softcap=None, scale=0.1)
    cache = Cache([100, 33], 64)
    q = torch.randn(2, heads, 5, HEAD_DIM)
    out = served.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths)
    want = torch.cat([cache.want(q[row : row + 1], row, config) for row in range(2)])
    assert relative_error(out, want) <= 2e-6


def test_the_library_reads_through_the_table(runtimes: dict[str, Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding on the CPU copies no page."""
    monkeypatch.setattr(paged, "gathered", lambda *_: pytest.fail("the pages were copied"))
    cache = Cache([100, 33], 16)
    q = torch.randn(2, HEADS, 1, HEAD_DIM)
    config = AttentionConfig(scale=0.1)
    runtimes["auto"].paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths)


def test_changes_in_place_are_seen(runtime: Runtime, seed: int) -> None:
    """Between two calls with the same tensors, as layers make them: by torch, and by numpy, which leaves no trace."""
    config = AttentionConfig(softcap=30.0, scale=0.1, window=40)
    cache = Cache([100, 33, 64], 16)
    q, offsets = torch.randn(1, HEADS, 3, HEAD_DIM), torch.arange(4)
    rows = q.transpose(0, 2)

    def attend() -> tuple[Tensor, Tensor]:
        given = cache.k, cache.v, config, cache.table, cache.lengths
        packed = runtime.paged_attention(q, *given, cu_seqlens_q=offsets)
        return runtime.paged_attention(rows, *given), packed.transpose(0, 2)

    attend()
    cache.lengths[0] = 90
    cache.lengths.numpy()[1] = 20
    cache.table[2, :2] = cache.table[2, :2].flip(0)
    want = torch.cat([cache.want(rows[row : row + 1], row, config) for row in range(3)])
    for out in attend():
        assert relative_error(out, want) <= 2e-6
    for x, at, bad, words in (
        (cache.lengths, 1, 0, "cache_lengths: 0 of sequence 1, expected 1"),
        (cache.lengths, 2, 10**6, "cache_lengths: 1000000 of sequence 2"),
        (cache.table, (0, 1), 10**6, "page_table: 1000000 at place 1 of sequence 0"),
        (cache.table, (2, 3), -1, "page_table: -1 at place 3 of sequence 2"),
        (offsets, 0, 1, r"cu_seqlens_q: \[1, 1, 2, 3\], expected 0"),
    ):
        good = x[at].item()
        x.numpy()[at] = bad
        with pytest.raises(ValueError, match=words):
            attend()
        x.numpy()[at] = good
        for out in attend():
            assert relative_error(out, want) <= 2e-6
    offsets[1], offsets[2] = 0, 2  # other rows of the same sequences
    assert not torch.equal(*attend())


def test_calls_of_one_kind_are_checked_by_kind(runtime: Runtime) -> None:
    """What differs from a call before it in anything but contents is checked anew."""
    cache, config = Cache([100, 33], 16), AttentionConfig(scale=0.1)
    q = torch.randn(2, HEADS, 1, HEAD_DIM)
    given = cache.k, cache.v, config, cache.table, cache.lengths
    runtime.paged_attention(q, *given)
    with pytest.raises(ValueError, match="q: requires a gradient"):
        runtime.paged_attention(q.clone().requires_grad_(), *given)
    with pytest.raises(ValueError, match=r"k: torch\.float32 on cpu"):
        runtime.paged_attention(q.bfloat16(), *given)
    with pytest.raises(TypeError, match=r"cache_lengths: torch\.float32"):
        runtime.paged_attention(q, *given[:4], cache.lengths.float())
    with pytest.raises(ValueError, match="page_table: 1 sequences, expected 2"):
        runtime.paged_attention(q, *given[:3], cache.table[:1], cache.lengths)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_dtype_and_layout(served: Runtime, dtype: torch.dtype, seed: int) -> None:
    config, cache = AttentionConfig(softcap=30.0, scale=0.1), Cache([100, 33, 17], 16)
    q = torch.randn(3, HEADS, 2, HEAD_DIM)
    table = cache.table.clamp(min=0).to(dtype)
    apart = torch.zeros(3, table.shape[1] * 2, dtype=dtype)[:, ::2].copy_(table)
    lengths = torch.zeros(6, dtype=dtype)[::2].copy_(cache.lengths)
    want = torch.cat([cache.want(q[row : row + 1], row, config) for row in range(3)])
    for pages in (table, apart, table.t().contiguous().t()):
        out = served.paged_attention(q, cache.k, cache.v, config, pages, lengths)
        assert relative_error(out, want) <= 2e-6


def test_tensors_that_lie_otherwise(served: Runtime, seed: int) -> None:
    """Negated views, rows apart, pages of a larger tensor, heads before pages."""
    config, cache = AttentionConfig(softcap=30.0, scale=0.1), Cache([100, 33], 16)
    cache.k, cache.v = cache.k.nan_to_num(), cache.v.nan_to_num()
    q = torch.randn(2, HEADS, 2, HEAD_DIM)
    want = torch.cat([cache.want(q[row : row + 1], row, config) for row in range(2)])

    def negated(x: Tensor) -> Tensor:
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    for make in (
        negated,
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x * 0], 1)[:, 0],
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    ):
        given = [make(x) for x in (q, cache.k, cache.v)]
        assert given[0].is_neg() == (make is negated)
        out = served.paged_attention(*given, config, cache.table, cache.lengths)
        assert relative_error(out, want) <= 2e-6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_under_vmap(served: Runtime, device: str, seed: int) -> None:
    """A batch of calls at once, whose tensors have no memory that a kernel could read; meta stands in for a GPU."""
    config, cache = AttentionConfig(softcap=30.0, scale=0.1), Cache([100, 33], 16)
    given = [x.to(device) for x in (cache.k, cache.v, cache.table, cache.lengths)]

    def attend(q: Tensor) -> Tensor:
        return served.paged_attention(q, *given[:2], config, *given[2:])

    q = torch.randn(3, 2, HEADS, 1, HEAD_DIM, device=device)
    out = torch.vmap(attend)(q)
    assert out.shape == q.shape
    if device == "cpu":
        assert relative_error(out, torch.stack([attend(x) for x in q])) <= 2e-6


def in_a_graph(runtime: Runtime, q: Tensor, cache: Cache, config: AttentionConfig, offsets: Tensor | None) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, offsets: Tensor | None) -> Tensor:
        return runtime.paged_attention(q, k, v, config, table, lengths, cu_seqlens_q=offsets)

    graph = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    return graph(q, cache.k, cache.v, cache.table, cache.lengths, offsets)


def under_vmap(runtime: Runtime, q: Tensor, cache: Cache, config: AttentionConfig, offsets: Tensor | None) -> Tensor:
    """Over two calls with the same table, lengths and offsets, all of them mapped."""

    def attend(table: Tensor, lengths: Tensor, *offsets: Tensor) -> Tensor:
        more = {"cu_seqlens_q": offsets[0]} if offsets else {}
        return runtime.paged_attention(q, cache.k, cache.v, config, table, lengths, **more)

    contents = [x for x in (cache.table, cache.lengths, offsets) if x is not None]
    return torch.vmap(attend)(*[torch.stack([x, x]) for x in contents])[1]


@pytest.mark.parametrize("run", [in_a_graph, under_vmap])
@pytest.mark.parametrize("offsets", [None, [0, 2, 3]])
def test_contents_that_nobody_can_look_at_yet(served: Runtime, run: Any, offsets: list[int] | None, seed: int) -> None:
    """They give what they give outside, and are checked when the program runs."""
    config, cache = AttentionConfig(softcap=30.0, scale=0.1, window=20), Cache([100, 33], 16)
    q = torch.randn(2 if offsets is None else 1, HEADS, 3, HEAD_DIM)
    packed = None if offsets is None else torch.tensor(offsets)
    want = served.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths, cu_seqlens_q=packed)
    assert relative_error(run(served, q, cache, config, packed), want) <= 2e-6

    table, lengths = cache.table, cache.lengths
    cache.table = changed(table, (1, 2), 10**6)
    with pytest.raises(RuntimeError, match="page_table: no page of k"):
        run(served, q, cache, config, packed)
    cache.table = table
    for wrong in (0, 129):
        cache.lengths = changed(lengths, 1, wrong)
        with pytest.raises(RuntimeError, match="cache_lengths: out of range"):
            run(served, q, cache, config, packed)
    cache.lengths = lengths
    if packed is not None:
        with pytest.raises(RuntimeError, match="cu_seqlens_q: expected 0 and then offsets"):
            run(served, q, cache, config, packed + 1)


def test_a_graph_outlives_new_plans(served: Runtime, seed: int) -> None:
    """Calls outside of graphs that leave a plan each are nothing to it."""
    config, cache, backend = AttentionConfig(softcap=30.0, scale=0.1), Cache([100, 33], 16), Backend()
    arguments = cache.k, cache.v, config, cache.table, cache.lengths
    compiled = torch.compile(lambda q: served.paged_attention(q, *arguments), fullgraph=True, backend=backend)
    q = torch.randn(2, HEADS, 3, HEAD_DIM)
    for rows in (3, 2, 1):
        served.paged_attention(q[:, :, :rows], *arguments)
        compiled(q)
    assert len(backend.graphs) == 1


def test_tensors_that_wrap_others(served: Runtime, seed: int) -> None:
    """They have no memory of their own that a kernel could read."""
    config, cache = AttentionConfig(softcap=30.0, scale=0.1), Cache([100, 33], 16)
    cache.k, cache.v = cache.k.nan_to_num(), cache.v.nan_to_num()
    q = torch.randn(2, HEADS, 1, HEAD_DIM)
    want = served.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths)
    for place in range(3):
        given = [q, cache.k, cache.v]
        given[place] = Wrapped(given[place])
        out = served.paged_attention(*given, config, cache.table, cache.lengths)
        assert relative_error(out.inner, want) <= 2e-6


def test_tangents_are_refused_not_dropped(runtime: Runtime) -> None:
    from torch.autograd import forward_ad

    cache, config, q = Cache([100, 33], 16), AttentionConfig(scale=0.1), torch.randn(2, HEADS, 1, HEAD_DIM)
    runtime.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            runtime.paged_attention(dual, cache.k, cache.v, config, cache.table, cache.lengths)


def test_calls_are_counted(runtime: Runtime) -> None:
    def counted() -> int:
        return sum(row.calls for row in runtime.stats().engines if row.reason.startswith("a paged cache"))

    cache, config, before = Cache([100, 33], 16), AttentionConfig(scale=0.1), counted()
    q = torch.randn(2, HEADS, 1, HEAD_DIM)
    for _ in range(3):
        runtime.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths)
    assert counted() - before == 3


def test_half_precision(served: Runtime, seed: int) -> None:
    config = AttentionConfig(softcap=30.0, scale=0.1)
    cache = Cache([100, 33], 16, torch.bfloat16)
    q = torch.randn(2, HEADS, 2, HEAD_DIM).bfloat16()
    out = served.paged_attention(q, cache.k, cache.v, config, cache.table, cache.lengths)
    want = torch.cat([cache.want(q[row : row + 1], row, config) for row in range(2)])
    assert out.dtype == torch.bfloat16
    assert relative_error(out, want) <= 4e-3


def changed(x: Tensor, at: Any, value: int) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda c: {"page_table": changed(c.table, (1, 2), 10**6)},
            ValueError,
            "page_table: 1000000 at place 2 of seq",
        ),
        (lambda c: {"page_table": changed(c.table, (0, 0), -1)}, ValueError, "page_table: -1 at place 0 of sequence 0"),
        (lambda c: {"page_table": c.table[:1]}, ValueError, "page_table: 1 sequences, expected 2"),
        (lambda c: {"page_table": c.table.float()}, TypeError, "page_table: torch.float32"),
        (lambda c: {"page_table": c.table[0]}, ValueError, r"page_table: shape \(5,\), expected \[B, pages\]"),
        (lambda c: {"cache_lengths": changed(c.lengths, 1, 81)}, ValueError, "cache_lengths: 81 of sequence 1, .* 80"),
        (
            lambda c: {"cache_lengths": changed(c.lengths, 1, 2)},
            ValueError,
            "cache_lengths: 2 of sequence 1, expected 3",
        ),
        (lambda c: {"cache_lengths": c.lengths[:1]}, ValueError, "cache_lengths: 1 sequences, expected 2"),
        (lambda c: {"cache_lengths": [3, 50]}, TypeError, "cache_lengths: list"),
        (lambda c: {"k": c.k[:, :10], "v": c.v[:, :10]}, ValueError, "k: pages of 10 keys, expected one of 16, 32"),
        (lambda c: {"v": c.v[:2]}, ValueError, "v: shape"),
        (lambda c: {"k": c.k.double()}, ValueError, "k: torch.float64 on cpu"),
        (lambda c: {"k": c.k[0]}, ValueError, "k: shape .*num_pages, page_size"),
        (lambda c: {"q": torch.zeros(2, 3, 3, HEAD_DIM)}, ValueError, "q: 3 heads, expected a multiple of the 2"),
        (lambda c: {"q": torch.zeros(2, 4, 3, HEAD_DIM, requires_grad=True)}, ValueError, "q: requires a gradient"),
        (lambda c: {"config": None}, TypeError, "config: NoneType"),
        (lambda c: {"cu_seqlens_q": torch.tensor([0, 3, 6])}, ValueError, "q: batch 2, expected 1 with cu_seqlens_q"),
        (lambda c: {"cu_seqlens_q": torch.tensor([0, 3])}, ValueError, r"cu_seqlens_q: shape \(2,\), expected \(3,\)"),
    ],
)
def test_bad_input(runtime: Runtime, change: Any, error: type[Exception], words: str) -> None:
    cache = Cache([3, 50], 16)
    arguments = {
        "q": torch.zeros(2, HEADS, 3, HEAD_DIM),
        "k": cache.k,
        "v": cache.v,
        "config": AttentionConfig(scale=0.1),
        "page_table": cache.table,
        "cache_lengths": cache.lengths,
        **change(cache),
    }
    with pytest.raises(error, match=words) as raised:
        runtime.paged_attention(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("offsets", [[0, 2, 5], [1, 2, 3], [0, 3, 2]])
def test_bad_offsets(runtime: Runtime, offsets: list[int]) -> None:
    cache = Cache([3, 50], 16)
    q, config = torch.zeros(1, HEADS, 4, HEAD_DIM), AttentionConfig(scale=0.1)
    with pytest.raises(ValueError, match=r"cu_seqlens_q: .* never decrease"):
        runtime.paged_attention(
            q, cache.k, cache.v, config, cache.table, cache.lengths, cu_seqlens_q=torch.tensor(offsets)
        )


@pytest.mark.parametrize(("batch", "rows"), [(0, 1), (2, 0)])
def test_no_sequence_or_no_new_row(served: Runtime, batch: int, rows: int) -> None:
    config, cache = AttentionConfig(softcap=30.0, scale=0.1), Cache([5, 40], 16)
    q = torch.randn(batch, HEADS, rows, HEAD_DIM)
    out = served.paged_attention(q, cache.k, cache.v, config, cache.table[:batch], cache.lengths[:batch])
    assert out.shape == q.shape
    if batch:  # side by side
        offsets = torch.zeros(3, dtype=torch.int32)
        given = (cache.k, cache.v, config, cache.table, cache.lengths)
        assert served.paged_attention(q[:1], *given, cu_seqlens_q=offsets).shape == q[:1].shape
