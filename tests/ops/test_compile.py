"""The operator inside compiled and exported programs."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, Backend, Sizes, expected, gradients, make_qkv, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softcap_runtime import (
    AttentionConfig,
    Runtime,
    create_flex_attention_causal_mask,
    create_flex_attention_sliding_window_mask,
    document_ids_from_cu_seqlens,
    slow_attention_softcapping,
)

CONFIG = AttentionConfig(softcap=50.0, scale=0.125, window=30)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def random_masks(batch: int, length: int) -> dict[str, Tensor]:
    padding = torch.ones(batch, length, dtype=torch.int64)
    padding[0, : random.randint(1, length - 1)] = 0
    ids = (torch.rand(batch, length) < 0.1).cumsum(1)
    return {"attention_mask": padding, "document_ids": ids}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_no_graph_break_and_no_recompile_per_length(runtime: Runtime, masked: bool, train: bool, seed: int) -> None:
    backend = Backend()

    def attend(q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Tensor]) -> Tensor:
        return runtime.attention(q * 1.0, k, v, CONFIG, **masks) * 2.0

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    # Not 64: torch gives sizes that are equal at first one symbol, and compiles anew where they part. Not a few
    # tokens: where no row sees two keys, the gradients of q and k are nothing but rounding.
    lengths = [length for length in range(16, 300) if length != HEAD_DIM]
    for length in random.sample(lengths, 8):
        inputs = make_qkv(Sizes(2, 4, 2, length, length))
        masks = random_masks(2, length) if masked else {}
        grad_out = torch.randn(inputs[0].shape)
        want_out, want = gradients(lambda *x, m=masks: 2.0 * expected(*x, CONFIG, **m), inputs, grad_out)
        if train:
            out, got = gradients(lambda *x, m=masks: compiled(*x, m), inputs, grad_out)
            for mine, exact in zip(got, want, strict=True):
                assert relative_error(mine, exact) <= 3e-6
        else:
            out = compiled(*inputs, masks)
        assert relative_error(out, want_out) <= 2e-6
    assert len(backend.graphs) == 1


def test_spans_inside_a_graph(runtime: Runtime, seed: int) -> None:
    """Where batch, slots and the two ends of a span are one number too."""
    for batch, slots in ((2, 1), (2, 2), (3, 2)):
        torch._dynamo.reset()
        inputs = make_qkv(Sizes(batch, 4, 2, 50, 50))
        spans = torch.zeros(batch, slots, 2, dtype=torch.int64)
        spans[:, 0, 1] = torch.randint(2, 50, (batch,))
        compiled = torch.compile(
            lambda q, k, v, s: runtime.attention(q, k, v, CONFIG, spans=s),
            fullgraph=True,
            dynamic=True,
            backend="eager",
        )
        assert relative_error(compiled(*inputs, spans), expected(*inputs, CONFIG, spans=spans)) <= 2e-6


# A mask's name, values that it can have, and some that it can't.
VALUES: list[tuple[str, list[Any], list[Any]]] = [
    ("attention_mask", [[0, 1, 1, 1], [1, 1, 0, 1]], [[0, 1, 1, 1], [1, 2, 1, 1]]),
    ("document_ids", [[0, 0, 4, 5], [0, 1, 1, 1]], [[0, 0, 4, 5], [0, 1, 0, 0]]),
    ("cache_lengths", [4, 4], [4, 5]),
    ("prefix_lengths", [0, 4], [-1, 4]),
    ("spans", [[[0, 2], [2, 4]], [[0, 0], [3, 4]]], [[[0, 2], [1, 4]], [[0, 0], [3, 4]]]),
    ("spans", [[[2, 4], [0, 1]]], [[[2, 5], [0, 1]]]),
    ("spans", [[[2, 4], [7, 7]]], [[[4, 2], [0, 0]]]),
    ("query_positions", [2, 0, 3, 1], [2, 0, 4, 1]),
    ("query_positions", [[2, 0, 3, 1], [0, 0, 1, 1]], [[2, 0, 3, 1], [0, 0, -1, 1]]),
]


@pytest.mark.parametrize(("name", "good", "bad"), VALUES)
def test_data_that_no_mask_can_have_raises_inside_a_graph(
    runtime: Runtime, name: str, good: list[Any], bad: list[Any], seed: int
) -> None:
    compiled = torch.compile(
        lambda q, k, v, m: runtime.attention(q, k, v, CONFIG, **{name: m}),
        fullgraph=True,
        dynamic=True,
        backend="eager",
    )
    inputs = make_qkv(Sizes(2, 4, 2, 4, 4))
    mask = torch.tensor(good)
    assert relative_error(compiled(*inputs, mask), expected(*inputs, CONFIG, **{name: mask})) <= 2e-6
    with pytest.raises(RuntimeError, match=f"{name}: .*, expected|attention_mask: other numbers"):
        compiled(*inputs, torch.tensor(bad))


def test_the_checks_of_data_outlive_inductor(runtime: Runtime, seed: int) -> None:
    """Those of all masks in one graph: each takes the compiler seconds."""
    compiled = torch.compile(
        lambda q, k, v, masks: runtime.attention(q, k, v, CONFIG, **masks), fullgraph=True, dynamic=True
    )
    values = {name: (torch.tensor(good), torch.tensor(bad)) for name, good, bad in reversed(VALUES)}
    inputs, masks = make_qkv(Sizes(2, 4, 2, 4, 4)), {name: good for name, (good, _) in values.items()}
    assert relative_error(compiled(*inputs, masks), expected(*inputs, CONFIG, **masks)) <= 2e-6
    for name, (_, bad) in values.items():
        with pytest.raises(RuntimeError, match=f"{name}: .*, expected|attention_mask: other numbers"):
            compiled(*inputs, {**masks, name: bad})


@pytest.mark.parametrize("bad", [[1, 20, 30], [0, 31, 30], [0, 20, 29]])
def test_offsets_that_no_row_can_have_raise_inside_a_graph(bad: list[int]) -> None:
    made = torch.compile(
        lambda offsets, x: document_ids_from_cu_seqlens(offsets, x.shape[0]), fullgraph=True, backend="aot_eager"
    )
    x = torch.empty(30)
    assert made(torch.tensor([0, 20, 30]), x).sum() == 10
    with pytest.raises(RuntimeError, match=r"cu_seqlens: expected offsets from"):
        made(torch.tensor(bad), x)


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("dynamic", [True, None])
def test_one_checkpoint_after_another(own_runtime: Runtime, documented: bool, dynamic: bool | None, seed: int) -> None:
    """Their bodies are graphs of their own, which share no symbol: a config's floats are none."""
    layer = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=50.0, query_pre_attn_scalar=64))
    config = AttentionConfig(softcap=50.0, scale=0.125)

    def attend(x: Tensor) -> Tensor:
        if not documented:
            return own_runtime.attention(x, x, x, config)
        out = slow_attention_softcapping(x, x, x, None, layer, x.shape[0], x.shape[2])
        return out.view(x.shape[0], x.shape[2], *x.shape[1::2]).transpose(1, 2)

    def twice(x: Tensor) -> Tensor:
        return checkpoint(attend, checkpoint(attend, x, use_reentrant=False), use_reentrant=False)

    backend = Backend()
    compiled = torch.compile(twice, fullgraph=True, dynamic=dynamic, backend=backend)
    for length, scale in ((30, 0.125), (41, 0.125), (41, 0.25)):
        config = AttentionConfig(softcap=50.0, scale=scale)
        layer.config.query_pre_attn_scalar = scale**-2
        x = make_qkv(Sizes(2, 4, 4, length, length))[0]
        grad_out = torch.randn(x.shape)
        out, got = gradients(compiled, (x,), grad_out)
        want_out, want = gradients(
            lambda x, c=config: expected(*[expected(x, x, x, c)] * 3, c), (x.double(),), grad_out
        )
        assert relative_error(out, want_out) <= 4e-6  # twice the one of a call
        assert relative_error(got[0], want[0]) <= 6e-6


def test_static_sizes_through_inductor(runtime: Runtime, seed: int) -> None:
    """Everything for real: AOTAutograd, the fake implementations, Inductor's wrapper."""
    masks = random_masks(2, 50)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return runtime.attention(q * 1.0, k, v, CONFIG, **masks).transpose(1, 2).reshape(2, 50, -1)

    inputs = make_qkv(Sizes(2, 4, 2, 50, 50), layout="fused")
    grad_out = torch.randn(2, 50, 256)
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    out, got = gradients(compiled, inputs, grad_out)
    want_out, want = gradients(
        lambda *x: expected(*x, CONFIG, **masks).transpose(1, 2).reshape(2, 50, -1), inputs, grad_out
    )
    assert relative_error(out, want_out) <= 2e-6
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) <= 3e-6


@pytest.mark.parametrize("engine", ["blocked", "eager"])
def test_other_engines(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    compiled = torch.compile(
        lambda *x: runtimes[engine].attention(*x, CONFIG), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    inputs = make_qkv(Sizes(1, 4, 2, 40, 60))
    grad_out = torch.randn(inputs[0].shape)
    out, got = gradients(compiled, inputs, grad_out)
    want_out, want = gradients(lambda *x: expected(*x, CONFIG), inputs, grad_out)
    assert relative_error(out, want_out) <= 2e-6
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) <= 3e-6


def test_autocast_compiled(runtime: Runtime, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 4, 2, 40, 40))
    compiled = torch.compile(
        lambda *x: runtime.attention(*x, CONFIG), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in ((q, k, v), (q, k.bfloat16(), v)):
            out = compiled(*inputs)
            assert out.dtype == torch.bfloat16
            want = expected(*(x.bfloat16() for x in inputs), CONFIG)
            assert relative_error(out, want) <= 4e-3  # bf16
    grad_out = torch.randn(q.shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, got = gradients(compiled, (q, k.bfloat16(), v), grad_out)
    _, exact = gradients(lambda *x: expected(*x, CONFIG), tuple(x.bfloat16() for x in (q, k, v)), grad_out)
    for mine, want, x in zip(got, exact, (q, k.bfloat16(), v), strict=True):
        assert mine.dtype == x.dtype
        assert relative_error(mine, want) <= 5e-3


@pytest.mark.parametrize("kind", ["none", "causal", "window", "bool", "additive"])
def test_the_documented_functions_inside_a_compiled_model(own_runtime: Runtime, kind: str, seed: int) -> None:
    """One graph for all lengths; with a tensor as mask too, whose elements nobody can look at there."""
    layer = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=50.0, query_pre_attn_scalar=64))
    backend = Backend()
    compiled = torch.compile(
        lambda q, k, v, mask: slow_attention_softcapping(q, k, v, mask, layer, q.shape[0], q.shape[2]),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    config = AttentionConfig(softcap=50.0, scale=0.125, window=9 if kind == "window" else None)
    warnings.filterwarnings("error", message=".*lru_cache")  # until the end of the test
    made = {"causal": create_flex_attention_causal_mask(64)}
    made["window"] = create_flex_attention_sliding_window_mask(64, 9)
    for length in (20, 33, 41):
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        tensors = {"bool": seen, "additive": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}
        inputs = make_qkv(Sizes(2, 4, 2, length, length))
        want = expected(*inputs, config).transpose(1, 2).reshape(2, length, -1)
        assert relative_error(compiled(*inputs, {**made, **tensors}.get(kind)), want) <= 2e-6
    assert len(backend.graphs) == 1


def test_the_process_own_runtime_is_made_while_dynamo_traces(
    warm_cache: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("SOFTCAP_CACHE_DIR", str(warm_cache))
    monkeypatch.setattr(Runtime, "_own", None)
    backend = Backend()
    compiled = torch.compile(
        lambda *x: Runtime.get().attention(*x, CONFIG), fullgraph=True, dynamic=True, backend=backend
    )
    for length in (20, 33):
        inputs = make_qkv(Sizes(2, 4, 2, length, length))
        assert relative_error(compiled(*inputs), expected(*inputs, CONFIG)) <= 2e-6
    assert len(backend.graphs) == 1


class Model(torch.nn.Module):
    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.runtime.attention(q, k, v, CONFIG, attention_mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_and_run_at_another_length(own_runtime: Runtime, masked: bool, strict: bool, seed: int) -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    by_length = {2: length}
    shapes: list[Any] = [by_length, by_length, by_length, {1: length} if masked else None]

    def inputs(length: int) -> tuple[Tensor | None, ...]:
        mask = random_masks(2, length)["attention_mask"] if masked else None
        return (*make_qkv(Sizes(2, 4, 2, length, length)), mask)

    with torch.no_grad():
        program = torch.export.export(Model(own_runtime), inputs(40), dynamic_shapes=tuple(shapes), strict=strict)
        for length_ in (40, 41, 300):
            given = inputs(length_)
            out = program.module()(*given)
            more = {"attention_mask": given[3]} if masked else {}
            assert relative_error(out, expected(*given[:3], CONFIG, **more)) <= 2e-6
    assert any("softcap_runtime.attention" in str(node.target) for node in program.graph.nodes)


MASKS: dict[str, Any] = {
    "attention_mask": lambda batch, length: (torch.arange(length) % 7 != 3).expand(batch, -1).contiguous(),
    "document_ids": lambda batch, length: (torch.arange(length) // 9).expand(batch, -1).contiguous(),
    "cache_lengths": lambda batch, length: torch.full((batch,), length),
    "prefix_lengths": lambda batch, length: torch.full((batch,), min(4, length)),
    "spans": lambda batch, length: torch.tensor([[[1, 2]]]).expand(batch, 1, 2).contiguous(),
    "query_positions": lambda batch, length: torch.arange(length).expand(batch, -1).contiguous(),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_export_of_any_batch_and_length(own_runtime: Runtime, name: str, seed: int) -> None:
    """Neither is a case of its own at 1 or 2: the checks of the values in a graph slice nothing."""

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return own_runtime.attention(q, k, v, CONFIG, **{name: mask})

    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    by_both = {0: batch, 2: length}
    of_mask = {0: batch} if "lengths" in name or name == "spans" else {0: batch, 1: length}
    shapes = (by_both, by_both, by_both, of_mask)
    with torch.no_grad():
        example = (*make_qkv(Sizes(2, 4, 2, 40, 40)), MASKS[name](2, 40))
        program = torch.export.export(Layer(), example, dynamic_shapes=shapes).module()
        for sizes in (Sizes(2, 4, 2, 40, 40), Sizes(3, 4, 2, 133, 133), Sizes(1, 4, 2, 2, 2)):
            inputs, mask = make_qkv(sizes), MASKS[name](sizes.batch, sizes.kv_len)
            assert relative_error(program(*inputs, mask), expected(*inputs, CONFIG, **{name: mask})) <= 2e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("engine", ["auto", "blocked", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_torchscript_trace(runtimes: dict[str, Runtime], engine: str, masked: bool, seed: int) -> None:
    """As of TensorBoard's ``add_graph``: the operator is in it, and no mask that the example happened to have."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        masks = {"attention_mask": attention_mask} if masked else {}
        return runtimes[engine].attention(q, k, v, CONFIG, **masks)

    example = make_qkv(Sizes(2, 4, 2, 20, 20))
    attend(*example, torch.ones(2, 20, dtype=torch.int64))
    for train in (False, True):
        leaves = [x.clone().requires_grad_(train) for x in example]
        traced = torch.jit.trace(attend, (*leaves, torch.ones(2, 20, dtype=torch.int64)), check_trace=False)
        for length in (20, 31):
            inputs, padding = (make_qkv(Sizes(2, 4, 2, length, length)), random_masks(2, length)["attention_mask"])
            want = expected(*inputs, CONFIG, attention_mask=padding if masked else None)
            assert relative_error(traced(*inputs, padding), want) <= 2e-6
