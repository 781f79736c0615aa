"""What the ranks of ``test_context.py`` and ``test_several_gpus.py`` run: every case in one launch, the same on all.

    torchrun ... ranks.py [CASE ...]

SOFTCAP_TEST_DEVICE=cuda takes a GPU for each rank, and NCCL. A failed case does not stop the others: its ranks
print it, and all ranks exit with 1 in the end.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from support.helpers import gradients, in_model_order
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh

from softcap_runtime import (
    AttentionConfig,
    KernelNotPrewarmed,
    PrewarmRequest,
    Runtime,
    RuntimeSettings,
    document_ids_from_position_ids,
)
from softcap_runtime.distributed import ContextMask, SequenceLayout, context_mask
from softcap_runtime.masks import row_intervals

DEVICE = torch.device(os.environ.get("SOFTCAP_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
# float32 against one process in float32 would be rounding alone; against float64 the figure of the engines themselves.
# On GPUs a product is three TF32 parts: up to 6e-6 of the exact gradient on either side.
TOLERANCE = 1.2e-5 if ON_GPU else 1e-6
# bf16: some roundings of 2**-9 of each other; on GPUs those of the weights too, twice in gradients.
HALF_TOLERANCE = 7e-3 if ON_GPU else 4e-3
HEAD_DIM = 64 if ON_GPU else 16
LAYOUTS = ("contiguous", "zigzag", "balanced")
CAUSAL = AttentionConfig(softcap=50.0, scale=0.25)
WINDOW = AttentionConfig(softcap=20.0, scale=0.25, window=13)
BOTH_WAYS = AttentionConfig(softcap=None, scale=0.25, window=9, causal=False)

Case = Callable[["Ranks"], None]
CASES: dict[str, Case] = {}
ASKED_FOR: set[str] = set()


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def case_if_named(function: Case) -> Case:
    """One that runs only when it is asked for by its name."""
    ASKED_FOR.add(function.__name__)
    return case(function)


class Ranks:
    """This process among the others."""

    def __init__(self) -> None:
        self.mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.runtime = Runtime(RuntimeSettings(engine="auto" if ON_GPU else "eager"))


def layout_of(name: str, config: AttentionConfig, seq_len: int, ranks: int, masks: dict[str, Any]) -> SequenceLayout:
    if name == "balanced":
        mask = row_intervals(seq_len, seq_len, causal=config.causal, window=config.window, **masks)
        return SequenceLayout.balanced(mask, ranks, block=5)
    made: SequenceLayout = getattr(SequenceLayout, name)(seq_len, ranks)
    return made


def whole_inputs(
    batch: int, heads: int, kv_heads: int, seq_len: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [torch.randn(batch, h, seq_len, HEAD_DIM).to(DEVICE, dtype) for h in (heads, kv_heads, kv_heads)]


def there(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks where q, k and v are."""
    return {name: mask.to(DEVICE) for name, mask in masks.items()}


Results = list[Tensor]  # the output and the gradients of q, k and v


def results(call: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor) -> Results:
    out, grads = gradients(call, tuple(inputs), grad_out)
    assert type(out) is Tensor
    assert in_model_order(out)
    return [out, *grads]


def check(errors: dict[str, Tensor], wanted: list[Results], tolerance: float = TOLERANCE) -> float:
    """The largest relative error. ``errors``: of each case, squares of this rank's. Over all ranks, as a rank of few
    rows may have gradients that are nothing but rounding."""
    squares = torch.stack([*errors.values()])
    dist.all_reduce(squares)
    norms = torch.stack([torch.stack([x.double().norm() for x in want]) for want in wanted])
    relative = squares.sqrt() / norms.clamp(min=1e-30)
    for case, found in zip(errors, relative.tolist(), strict=True):
        assert max(found) <= tolerance, f"{case}: of out, q, k, v " + ", ".join(f"{x:.2e}" for x in found)
    return float(relative.max())


def squared_errors(found: Results, want: Results, context: ContextMask) -> Tensor:
    mine = (context.layout.shard(x, 2, context.rank) for x in want)
    return torch.stack([(a.double() - b.double()).square().sum() for a, b in zip(found, mine, strict=True)])


def compare(
    ranks: Ranks,
    context: ContextMask,
    inputs: list[Tensor],
    masks: dict[str, Tensor],
    config: AttentionConfig,
    stages: int = 1,
    runtime: Runtime | None = None,
    call: Callable[..., Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Output and gradients of this rank's rows, against the whole sequence in this process by the same engine."""
    runtime = runtime or ranks.runtime
    grad_out = torch.randn_like(inputs[0])
    alone = lambda q, k, v: runtime.attention(q, k, v, config, **there(masks))  # noqa: E731
    want = results(alone, inputs, grad_out)
    mine = [context.layout.shard(x, 2, ranks.rank) for x in (*inputs, grad_out)]
    attend = call or (lambda q, k, v: runtime.context_attention(q, k, v, config, context, stages=stages))
    errors = squared_errors(results(attend, mine[:3], mine[3]), want, context)
    check({f"{config} {context.method}": errors}, [want], tolerance)


def masks_of(name: str, batch: int, seq_len: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(name) + seq_len)
    draw = lambda low, high, shape=(batch,): torch.randint(low, high, shape, generator=generator)  # noqa: E731
    padding = torch.arange(seq_len) >= draw(0, seq_len // 2)[:, None]
    spans = torch.stack([draw(3, seq_len // 2), draw(seq_len // 2, seq_len)], -1)[:, None]
    kinds = {
        "padding": {"attention_mask": padding},
        "right": {"attention_mask": padding.flip(1)},
        "documents": {"document_ids": (torch.rand(batch, seq_len, generator=generator) < 0.1).cumsum(1)},
        "shared documents": {"document_ids": (torch.rand(1, seq_len, generator=generator) < 0.1).cumsum(1)},
        "prefix": {"prefix_lengths": draw(1, seq_len)},
        "spans": {"spans": spans},
    }
    kinds["all"] = {
        **kinds["right"], **kinds["documents"], **kinds["prefix"], "spans": spans.clamp(min=seq_len // 2)
    }  # fmt: skip
    return kinds.get(name, {})


def combinations(ranks: Ranks, every: int) -> None:
    """Each ``every``-th of masks, layouts, methods, groups; one process computes once for all layouts and methods."""
    kinds = ("none", "padding", "right", "documents", "shared documents", "prefix", "spans", "all")
    ways = list(itertools.product(LAYOUTS, ("keys", "heads", "auto")))
    number, runtime = itertools.count(), ranks.runtime
    largest: list[float] = []
    for at, (config, kind) in enumerate(itertools.product((CAUSAL, WINDOW, BOTH_WAYS), kinds)):
        batch, seq_len = 1 if kind == "shared documents" else 2, 41 + at % 5  # most don't divide by the ranks
        masks = masks_of(kind, batch, seq_len)
        alone = functools.partial(runtime.attention, config=config, **there(masks))
        groups: dict[int, tuple[list[Tensor], Results]] = {}
        errors: dict[str, Tensor] = {}
        wanted: list[Results] = []
        for name, method in ways:
            chosen = [group for group in (1, 2, 8) if next(number) % every == 0]
            if not chosen:
                continue
            layout = layout_of(name, config, seq_len, ranks.count, masks)
            context = context_mask(config, layout, ranks.mesh, method=method, **masks)
            attend = functools.partial(runtime.context_attention, config=config, context=context)
            for group in chosen:
                if group not in groups:
                    inputs = whole_inputs(batch, 8, 8 // group, seq_len)
                    inputs.append(torch.randn_like(inputs[0]))
                    groups[group] = inputs, results(alone, inputs[:3], inputs[3])
                inputs, want = groups[group]
                mine = [layout.shard(x, 2, ranks.rank) for x in inputs]
                case = f"{config} {kind} {name} {method} {group}"
                errors[case] = squared_errors(results(attend, mine[:3], mine[3]), want, context)
                wanted.append(want)
        largest.append(check(errors, wanted))
    if ranks.rank == 0:
        print(f"largest relative error: {max(largest):.1e}")


@case
def masks_layouts_methods_and_groups(ranks: Ranks) -> None:
    """Every combination of two once at least."""
    combinations(ranks, every=7)


@case_if_named
def every_combination(ranks: Ranks) -> None:
    combinations(ranks, every=1)


@case
def a_default_device_that_is_not_the_cpu(ranks: Ranks) -> None:
    masks = masks_of("documents", 2, 41)
    layout = SequenceLayout.zigzag(41, ranks.count)
    with torch.device("meta"):
        context = context_mask(WINDOW, layout, ranks.mesh, **masks)
    compare(ranks, context, whole_inputs(2, 4, 4, 41), masks, WINDOW)


@case
def heads_without_repetition_are_bit_equal(ranks: Ranks) -> None:
    for stages, kv_heads in ((1, ranks.count), (2, 2 * ranks.count)):
        context = context_mask(CAUSAL, SequenceLayout.zigzag(50, ranks.count), ranks.mesh)
        inputs = whole_inputs(2, 2 * kv_heads, kv_heads, 50)
        compare(ranks, context, inputs, {}, CAUSAL, stages, tolerance=TOLERANCE if ON_GPU else 0.0)


@case
def stages_and_half_precision(ranks: Ranks) -> None:
    for method, kv_heads, stages in (("keys", 4, 2), ("keys", 4, 4), ("heads", 4, 4 // ranks.count)):
        for config, layout in itertools.product((CAUSAL, WINDOW), LAYOUTS):
            made = layout_of(layout, config, 70, ranks.count, {})
            context = context_mask(config, made, ranks.mesh, method=method)
            compare(ranks, context, whole_inputs(1, 8, kv_heads, 70), {}, config, stages)
    context = context_mask(WINDOW, SequenceLayout.zigzag(70, ranks.count), ranks.mesh)
    # The same rounded inputs, products of the same rows in another order.
    compare(
        ranks,
        context,
        whole_inputs(1, 8, 4, 70, torch.bfloat16),
        {},
        WINDOW,
        tolerance=HALF_TOLERANCE if ON_GPU else 4e-3,
    )


@case
def inner_rows_between_outer_ones(ranks: Ranks) -> None:
    """Keys come from both sides; also as parts of a graph, which a mode that looks on asks for."""
    from torch.utils.flop_counter import FlopCounterMode

    layout = SequenceLayout.contiguous(40 * ranks.count, ranks.count)
    for config, stages, kind in itertools.product((WINDOW, BOTH_WAYS), (1, 2), ("none", "documents")):
        masks = masks_of(kind, 2, layout.seq_len)
        context = context_mask(config, layout, ranks.mesh, **masks)
        plan = context.by_keys
        assert plan is not None
        if ranks.count > 2 and config is BOTH_WAYS and ranks.rank == 1 and not masks:
            assert all(plan.rows)
        inputs = whole_inputs(2, 4, 2, layout.seq_len)
        compare(ranks, context, inputs, masks, config, stages)
        grad_out = torch.randn_like(inputs[0])
        mine = [layout.shard(x, 2, ranks.rank) for x in (*inputs, grad_out)]
        call = functools.partial(ranks.runtime.context_attention, config=config, context=context, stages=stages)
        with FlopCounterMode(display=False) as seen:
            watched = results(call, mine[:3], mine[3])
        assert seen.get_total_flops() > 0
        for a, b in zip(watched, results(call, mine[:3], mine[3]), strict=True):
            assert float((a - b).norm()) <= TOLERANCE * float(b.norm())


@case
def compiled_kernels(ranks: Ranks) -> None:
    """The default choice of an engine, on rows enough for it to matter."""
    runtime, masks = Runtime.get(), masks_of("shared documents", 1, 700)
    for config, method in ((CAUSAL, "heads"), (CAUSAL, "keys"), (WINDOW, "keys")):
        context = context_mask(config, SequenceLayout.zigzag(700, ranks.count), ranks.mesh, method=method, **masks)
        compare(ranks, context, whole_inputs(1, 4, 4, 700), masks, config, runtime=runtime)


class Counted:
    """Counts the bytes that others send this rank."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.bytes = ranks, 0

    def __enter__(self) -> Counted:
        self.alone, self.in_graph = dist.all_to_all_single, collectives.all_to_all_single_autograd

        def alone(out: Tensor, x: Tensor, received: list[int], *rest: Any, **how: Any) -> Any:
            self.count(x, received)
            return self.alone(out, x, received, *rest, **how)

        def in_graph(x: Tensor, received: list[int], *rest: Any) -> Tensor:
            self.count(x, received)
            return self.in_graph(x, received, *rest)

        dist.all_to_all_single, collectives.all_to_all_single_autograd = alone, in_graph  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_to_all_single, collectives.all_to_all_single_autograd = self.alone, self.in_graph

    def count(self, x: Tensor, received: list[int]) -> None:
        rows = sum(received) - received[self.ranks.rank]
        self.bytes += rows * math.prod(x.shape[1:]) * x.element_size()


@case
def bytes_on_the_wire(ranks: Ranks) -> None:
    table = itertools.product((CAUSAL, WINDOW), LAYOUTS, ("keys", "heads"), (1, 4), ("none", "documents"))
    for config, name, method, kv_heads, kind in table:
        masks = masks_of(kind, 2, 61)
        layout = layout_of(name, config, 61, ranks.count, masks)
        context = context_mask(config, layout, ranks.mesh, method=method, **masks)
        q, k, v = (layout.shard(x, 2, ranks.rank) for x in whole_inputs(2, 4, kv_heads, 61))
        out = ranks.runtime.context_attention(q, k, v, config, context)  # what is agreed on at first is not counted
        assert type(out) is Tensor
        with Counted(ranks) as counted:
            ranks.runtime.context_attention(q, k, v, config, context)
        want = context.received_bytes(4, kv_heads, HEAD_DIM, torch.float32, batch=2)[ranks.rank]
        assert counted.bytes == want, (config, name, method, kv_heads, kind, counted.bytes, want)


@case
def whole_again(ranks: Ranks) -> None:
    for name, dim in itertools.product(LAYOUTS, (0, 1, -1)):
        layout = layout_of(name, CAUSAL, 37, ranks.count, {})
        x = torch.randn(37, 37, 37, device=DEVICE, requires_grad=True)
        weight = torch.randn(37, 37, 37, device=DEVICE)
        mine = layout.shard(x, dim, ranks.rank)
        whole = layout.unshard(mine, dim, ranks.mesh)
        assert torch.equal(whole, x)
        (whole * weight).sum().backward()
        want = torch.zeros_like(x)
        want.movedim(dim, 0)[layout.rows(ranks.rank)] = ranks.count * weight.movedim(dim, 0)[layout.rows(ranks.rank)]
        assert x.grad is not None
        assert torch.allclose(x.grad, want)
        assert torch.equal(layout.shard(torch.arange(37), 0, ranks.rank), layout.rows(ranks.rank))


@case
def under_compile_checkpoint_and_autocast(ranks: Ranks) -> None:
    masks = masks_of("documents", 2, 61)
    for config, method in ((CAUSAL, "heads"), (WINDOW, "keys")):
        context = context_mask(config, SequenceLayout.contiguous(61, ranks.count), ranks.mesh, method=method, **masks)
        inputs = whole_inputs(2, 4, 4, 61)

        def attend(q: Tensor, k: Tensor, v: Tensor, context: ContextMask = context, config: Any = config) -> Tensor:
            return ranks.runtime.context_attention(q, k, v, config, context, stages=2 if ranks.count == 2 else 1)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        compare(ranks, context, inputs, masks, config, call=compiled)
        again = lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)  # noqa: E731
        compare(ranks, context, inputs, masks, config, call=again)
        q, k, v = (context.layout.shard(x, 2, ranks.rank) for x in inputs)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            half = attend(q, k, v)
        assert torch.equal(half, attend(*(x.bfloat16() for x in (q, k, v))))


@case
def heads_as_dtensors_beside_the_context(ranks: Ranks) -> None:
    if ranks.count != 4:
        return
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("tp", "cp"))
    layout = SequenceLayout.zigzag(61, 2)
    context = context_mask(WINDOW, layout, mesh["cp"])
    rank = mesh["cp"].get_local_rank()
    inputs = whole_inputs(2, 8, 4, 61)
    want, grads = gradients(
        lambda q, k, v: ranks.runtime.attention(q, k, v, WINDOW), inputs, torch.ones_like(inputs[0])
    )
    mine = [
        distribute_tensor(layout.shard(x, 2, rank), mesh["tp"], [Shard(1)]).detach().requires_grad_() for x in inputs
    ]
    out = ranks.runtime.context_attention(*mine, WINDOW, context)
    out.sum().backward()
    for found, whole in zip((out, *(x.grad for x in mine)), (want, *grads), strict=True):
        assert tuple(found.placements) == (Shard(1),)
        assert torch.allclose(found.full_tensor(), layout.shard(whole, 2, rank), atol=TOLERANCE)


def expect(words: str, kind: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=words):
        call()


@case
def ranks_that_disagree_are_told(ranks: Ranks) -> None:
    last, count = ranks.rank == ranks.count - 1, ranks.count
    layout = SequenceLayout.contiguous(40, count)

    def made(*, config: Any = CAUSAL, layout: SequenceLayout = layout, **masks: Any) -> ContextMask:
        return context_mask(config, layout, ranks.mesh, **masks)

    other = f"of rank {count - 1} differs from that of rank 0"
    odd = SequenceLayout.zigzag(40, count) if last else layout
    expect(f"layout {other}", RuntimeError, lambda: made(layout=odd))
    ids = torch.zeros(1, 40, dtype=torch.int64)
    ids[0, 30 if last else 31 :] = 1
    expect(f"mask {other}", RuntimeError, lambda: made(document_ids=ids))
    expect(f"mask {other}", RuntimeError, lambda: made(config=WINDOW if last else CAUSAL))
    softer = CAUSAL.model_copy(update={"softcap": 30.0}) if last else CAUSAL
    expect(f"config {other}", RuntimeError, lambda: made(config=softer))
    expect(f"method {other}", RuntimeError, lambda: made(method="keys" if last else "auto"))
    with pytest.raises(ValueError, match="method: 'rings', expected one of auto, keys, heads"):
        made(method="rings")
    # One rank's own error, and what the others hear of it.
    ids = torch.zeros(1, 39 if last else 40, dtype=torch.int64)
    words = "document_ids: 39 tokens" if last else f"failed on rank {count - 1}"
    expect(words, ValueError if last else RuntimeError, lambda: made(document_ids=ids))
    context = made()
    engine = "blocked" if last else "eager"
    runtime = Runtime(RuntimeSettings(engine=engine))
    q, k, v = (layout.shard(x, 2, ranks.rank) for x in whole_inputs(1, 4, 4, 40))
    expect("engine", RuntimeError, lambda: runtime.context_attention(q, k, v, CAUSAL, context))
    more = k[:, :, :-1] if last else k
    words = "rows, expected the" if last else f"failed on rank {count - 1}"
    call = lambda: ranks.runtime.context_attention(q, more, v if not last else v[:, :, :-1], CAUSAL, context)  # noqa: E731
    expect(words, ValueError if last else RuntimeError, call)


@case
def a_missing_kernel_raises_before_anything_is_sent(ranks: Ranks) -> None:
    with tempfile.TemporaryDirectory() as empty:
        last = ranks.rank == ranks.count - 1
        there = RuntimeSettings(engine="blocked")
        runtime = Runtime(there.model_copy(update={"cache_dir": Path(empty), "jit": "forbid"}) if last else there)
        layout = SequenceLayout.contiguous(40, ranks.count)
        context = context_mask(CAUSAL, layout, ranks.mesh)
        q, k, v = (layout.shard(x, 2, ranks.rank) for x in whole_inputs(1, 4, 4, 40))
        words = "prewarm" if last else f"failed on rank {ranks.count - 1}"
        with Counted(ranks) as counted:
            kind = KernelNotPrewarmed if last else RuntimeError
            expect(words, kind, lambda: runtime.context_attention(q, k, v, CAUSAL, context))
        assert counted.bytes == 0


@case
def a_hugging_face_model(ranks: Ranks) -> None:
    """Packed documents, global and window layers on one layout: logits and the gradients of all weights."""
    transformers = pytest.importorskip("transformers")
    from softcap_runtime.integrations.transformers import register

    config = transformers.Gemma2Config(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=16, attn_logit_softcapping=5.0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).to(DEVICE)
    lengths = [19, 30, 8]
    seq_len = sum(lengths)
    tokens = torch.randint(3, 101, (1, seq_len)).to(DEVICE)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = document_ids_from_position_ids(positions)
    positions = positions.to(DEVICE)
    contexts: dict[str, ContextMask] = {}
    register(ranks.runtime, "softcap")
    register(ranks.runtime, "softcap_context", context=contexts)
    weight = torch.randn(1, seq_len, 101).to(DEVICE)
    for name in LAYOUTS:
        model.set_attn_implementation("softcap")
        model.zero_grad()
        want = model(tokens, position_ids=positions, use_cache=False).logits
        (want * weight).sum().backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        configs = [AttentionConfig.from_hf(config, layer_idx=at) for at in range(2)]
        layout = layout_of(name, configs[1], seq_len, ranks.count, {"document_ids": ids})
        for kind, made in zip(config.layer_types, configs, strict=True):
            contexts[kind] = context_mask(made, layout, ranks.mesh, document_ids=ids)
        model.set_attn_implementation("softcap_context")
        model.zero_grad()
        mine = [layout.shard(x, 1, ranks.rank) for x in (tokens, positions, weight)]
        logits = model(mine[0], position_ids=mine[1], use_cache=False).logits
        (logits * mine[2]).sum().backward()
        assert torch.allclose(logits, layout.shard(want, 1, ranks.rank), atol=1e-4)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            dist.all_reduce(parameter.grad)
            # Sums over rows, in float32 and another order, through two layers.
            assert float((parameter.grad - grad).norm()) <= 1e-4 * float(grad.norm())
        with pytest.raises(ValueError, match=r"attention_mask: .* give the whole sequence's to context_mask"):
            model(mine[0], attention_mask=torch.zeros_like(mine[0]), position_ids=mine[1], use_cache=False)
        del contexts["full_attention"]
        with pytest.raises(ValueError, match=r"context: .* expected a ContextMask for 'full_attention' layers too"):
            model(mine[0], position_ids=mine[1], use_cache=False)


@case
def fully_sharded_parameters_beside_the_context(ranks: Ranks) -> None:
    """FSDP2 over dp x cp: gradients are averaged over both, so a sum over ranks comes out ranks times less."""
    from support.helpers import Block
    from torch.distributed.fsdp import fully_shard

    for shape in {(1, ranks.count), (2, ranks.count // 2)}:
        mesh = init_device_mesh(DEVICE.type, shape, mesh_dim_names=("dp", "cp"))
        layout = SequenceLayout.zigzag(61, shape[1])
        context = context_mask(WINDOW, layout, mesh["cp"])
        ours = lambda q, k, v, context=context: ranks.runtime.context_attention(q, k, v, WINDOW, context)  # noqa: E731
        model = Block(ours).to(DEVICE)
        alone = Block(lambda q, k, v: ranks.runtime.attention(q, k, v, WINDOW)).to(DEVICE)
        alone.load_state_dict(model.state_dict())
        x = torch.randn(shape[0], 61, 128).to(DEVICE)
        alone(x).square().sum().backward()
        wrapped = fully_shard(model, mesh=mesh["dp", "cp"]._flatten("all"))
        row = mesh["dp"].get_local_rank()
        mine = layout.shard(x[row : row + 1], 1, mesh["cp"].get_local_rank())
        (wrapped(mine).square().sum() * ranks.count).backward()
        for parameter, want in zip(wrapped.parameters(), alone.parameters(), strict=True):
            whole = parameter.grad.full_tensor()
            assert float((whole - want.grad).norm()) <= 10 * TOLERANCE * float(want.grad.norm())


def of_dtensors(
    ranks: Ranks,
    mesh: Any,
    placements: list[Any],
    inputs: list[Tensor],
    run: Callable[..., Tensor] | None = None,
    **masks: Any,
) -> Any:
    """Output and gradients are those of the whole tensors, on CPUs to the bit; returns the output's placements."""
    from torch.distributed.tensor import distribute_tensor

    plain = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in masks.items()}
    grad_out = torch.randn_like(inputs[0])
    want, wanted = gradients(lambda q, k, v: ranks.runtime.attention(q, k, v, WINDOW, **plain), inputs, grad_out)
    mine = [distribute_tensor(x, mesh, placements).detach().requires_grad_() for x in inputs]
    run = run or (lambda q, k, v: ranks.runtime.attention(q, k, v, WINDOW, **masks))
    out: Any = run(*mine)
    out.backward(distribute_tensor(grad_out, mesh, placements))
    with torch.no_grad():
        again = ranks.runtime.attention(*mine, WINDOW, **masks)
    found = [x.detach().full_tensor() for x in (out, again, *(x.grad for x in mine))]
    for x, whole in zip(found, (want, want, *wanted), strict=True):
        error = float((x - whole).norm()) / float(whole.norm())
        assert error <= (TOLERANCE if ON_GPU else 0.0), error
    return out.placements


@case
def dtensors(ranks: Ranks) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    count, mesh = ranks.count, ranks.mesh
    inputs = whole_inputs(count, 2 * count, count, 41)
    whole: dict[str, Any] = there(masks_of("documents", count, 41))
    for masks in ({}, whole, {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in whole.items()}):
        for placement in (Shard(0), Shard(1), Replicate()):
            assert of_dtensors(ranks, mesh, [placement], inputs, **masks) == (placement,)
        assert of_dtensors(ranks, mesh, [Shard(2)], inputs, **masks) == (Shard(1),)
    for batch in (1, count + 1):  # some ranks may have no batch row
        of_dtensors(ranks, mesh, [Shard(0)], whole_inputs(batch, count, count, 41))
    positions = torch.randperm(41).to(DEVICE)
    assert of_dtensors(ranks, mesh, [Shard(1)], inputs, query_positions=positions) == (Shard(1),)
    if count == 2:  # it takes seconds on each rank
        attend = lambda q, k, v: ranks.runtime.attention(q, k, v, WINDOW, **whole)  # noqa: E731
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        for placement in (Shard(0), Shard(1)):
            of_dtensors(ranks, mesh, [placement], inputs, compiled, **whole)
    if count == 4:
        square = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("dp", "tp"))
        for pair in ([Shard(0), Shard(1)], [Shard(1), Shard(1)], [Replicate(), Shard(1)]):
            assert of_dtensors(ranks, square, pair, inputs, **whole) == tuple(pair)
        assert of_dtensors(ranks, square, [Shard(0), Shard(2)], inputs) == (Shard(0), Shard(1))
        odd = whole_inputs(2, 6, 6, 41)
        with pytest.raises(ValueError, match=r"q: Shard\(dim=1\) on mesh dimension 'dp' asks for heads over 4 ranks"):
            of_dtensors(ranks, square, [Shard(1), Shard(2)], odd)

    def refused(words: str, tensors: list[Tensor], placement: Any) -> None:
        with pytest.raises(ValueError, match=words):
            of_dtensors(ranks, mesh, [placement], tensors)

    refused(r"q: Shard\(dim=3\) on mesh dimension 'cp' splits head_dim", inputs, Shard(3))
    refused(r"q: Shard\(dim=1\) .* 1 key heads", whole_inputs(1, count, 1, 41), Shard(1))
    refused(r"q: Shard\(dim=2\) .* 1 key heads", whole_inputs(1, count, 1, 41), Shard(2))
    with pytest.raises(ValueError, match="k: a plain tensor beside DTensors"):
        ranks.runtime.attention(distribute_tensor(inputs[0], mesh, [Shard(1)]), inputs[1], inputs[2], WINDOW)


@case
def context_parallel_of_torch_is_refused(ranks: Ranks) -> None:
    from torch.distributed.tensor.experimental import context_parallel

    q, k, v = whole_inputs(1, 4, 4, 16 * ranks.count)
    ranks.runtime.attention(q, k, v, CAUSAL)
    with (
        context_parallel(ranks.mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]),
        pytest.raises(RuntimeError, match=r"context_parallel of torch: .* use .*context_attention"),
    ):
        ranks.runtime.attention(q, k, v, CAUSAL)
    ranks.runtime.attention(q, k, v, CAUSAL)


@case_if_named
def on_gpus_as_on_one(ranks: Ranks) -> None:
    """bf16 at lengths where windows, documents and stages matter, outputs and gradients."""
    config, length = AttentionConfig(softcap=50.0, scale=HEAD_DIM**-0.5, window=300), 2000 if ON_GPU else 600
    documents = {"document_ids": (torch.rand(1, length) < 1 / 150).cumsum(1)}
    table = itertools.product(
        (config, config.model_copy(update={"window": None})), ({}, documents), LAYOUTS, ("keys", "heads"), (1, 2)
    )
    for made, masks, name, method, stages in table:
        layout = layout_of(name, made, length, ranks.count, masks)
        context = context_mask(made, layout, ranks.mesh, method=method, **masks)
        inputs = whole_inputs(1, 8, 4, length, torch.bfloat16)
        compare(ranks, context, inputs, masks, made, stages, tolerance=HALF_TOLERANCE)
        mine = [layout.shard(x, 2, ranks.rank) for x in inputs]
        call = functools.partial(ranks.runtime.context_attention, config=made, context=context, stages=stages)
        runs = [results(call, mine, mine[0]) for _ in range(3)]
        assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))


@case_if_named
def the_host_never_waits_inside_a_layer(ranks: Ranks) -> None:
    from torch.profiler import ProfilerActivity, profile, record_function

    layout = SequenceLayout.contiguous(2000, ranks.count)
    for config, method in ((WINDOW, "keys"), (CAUSAL, "keys"), (CAUSAL, "heads")):
        context = context_mask(config, layout, ranks.mesh, method=method)
        mine = [layout.shard(x, 2, ranks.rank).requires_grad_() for x in whole_inputs(1, 8, 4, 2000)]
        for _ in range(3):
            ranks.runtime.context_attention(*mine, config, context).sum().backward()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            with record_function("layer"):
                out = ranks.runtime.context_attention(*mine, config, context)
                out.backward(out.detach())
            torch.cuda.synchronize()
        events = list(seen.events())
        layer = next(event.time_range for event in events if event.name == "layer")
        waits = [event for event in events if "Synchronize" in event.name]
        assert waits  # the one at the end: the profiler names them
        inside = [event.name for event in waits if layer.start <= event.time_range.start <= layer.end]
        assert not inside, (config, method, inside)


@case_if_named
def prewarming_builds_each_kernel_once(ranks: Ranks) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = [made]
        dist.broadcast_object_list(folder, 0)
        runtime = Runtime(RuntimeSettings(cache_dir=Path(folder[0])))
        request = PrewarmRequest(
            config=WINDOW, num_heads=4, num_kv_heads=2, head_dim=64, device=DEVICE.type, train=True
        )
        rows = runtime.prewarm([request], progress=False)
        outcomes: list[Any] = [None] * ranks.count
        dist.all_gather_object(outcomes, [row.outcome for row in rows])
        assert rows
        # Every rank needs the same kernels, in the same order.
        for found in zip(*outcomes, strict=True):
            assert sorted(found) == ["built"] + ["loaded"] * (ranks.count - 1), outcomes
        dist.barrier()  # the folder goes


@case_if_named
def a_rank_is_killed(ranks: Ranks) -> None:
    """The last one, in the middle; the others must not outlive the collectives' timeout."""
    layout = SequenceLayout.contiguous(400, ranks.count)
    context = context_mask(CAUSAL, layout, ranks.mesh, method="keys")
    mine = [layout.shard(x, 2, ranks.rank).requires_grad_() for x in whole_inputs(1, 4, 4, 400)]
    for at in itertools.count():
        out = ranks.runtime.context_attention(*mine, CAUSAL, context)
        if at == 3 and ranks.rank == ranks.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        out.sum().backward()
        assert mine[0].grad is not None
        mine[0].grad.sum().item()


def main() -> None:
    torch.set_num_threads(1)
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=float(os.environ.get("SOFTCAP_TEST_COLLECTIVE_SECONDS", "60")))
    dist.init_process_group("nccl" if ON_GPU else "gloo", timeout=timeout)
    ranks, failed = Ranks(), []
    named = sys.argv[1:]
    for name, run in CASES.items():
        if name not in (named or CASES.keys() - ASKED_FOR):
            continue
        torch.manual_seed(0)
        text, started = "", time.monotonic()
        try:
            run(ranks)
        except Exception:
            text = traceback.format_exc()
            print(f"rank {ranks.rank}, {name}: {text}", flush=True)
            if name == "a_rank_is_killed":
                raise
        bad = torch.tensor(bool(text), dtype=torch.int64, device=DEVICE)
        dist.all_reduce(bad)
        if bad:
            failed.append(name)
        elif ranks.rank == 0:
            print(f"{name}: passed in {time.monotonic() - started:.1f} s", flush=True)
    dist.destroy_process_group()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
