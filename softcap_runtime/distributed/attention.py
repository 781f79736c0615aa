"""``Runtime.context_attention``: rows of a sequence on each rank, keys or heads brought together for one kernel call.

Everything that travels goes by ``all_to_all_single`` of torch's functional collectives, whose gradients go back the
same way. An exchange is waited for where its result is first used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from softcap_runtime.checks import check_config
from softcap_runtime.config import AttentionConfig
from softcap_runtime.distributed.agree import agree, digest
from softcap_runtime.distributed.context import ContextMask, HeadPlan, KeyPlan
from softcap_runtime.distributed.ranges import picked
from softcap_runtime.engines.engine import Call
from softcap_runtime.ops import operator
from softcap_runtime.ops.sharding import check_placements, is_dtensor
from softcap_runtime.plans import Server

Pieces = tuple[Tensor, ...]
Arriving = TypeVar("Arriving")
# What ranks have agreed on, so that later calls of the kind gather nothing: a few numbers each.
_agreed: set[Any] = set()


def context_attention(
    runtime: Server,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AttentionConfig,
    context: ContextMask,
    stages: int = 1,
) -> Tensor:
    """See ``Runtime.context_attention``."""
    check_config(config)
    if not isinstance(context, ContextMask):
        raise TypeError(
            f"context: {type(context).__name__}, expected a ContextMask; make one with context_mask(...)"
        )
    for x in (q, k, v):
        if is_dtensor(x):
            return _of_dtensors(runtime, q, k, v, config, context, stages)
    if not torch.compiler.is_compiling():
        _agree_once(runtime, q, k, v, config, context, stages)
    q, k, v = operator.checked_inputs(q, k, v)
    method, groups = _check(q, k, config, context, stages)
    run = _by_keys if method == "keys" else _by_heads
    return run(runtime, q, k, v, config, context, groups)


def _check(
    q: Tensor, k: Tensor, config: AttentionConfig, context: ContextMask, stages: int
) -> tuple[str, int]:
    """The method, and how many groups of key heads travel one after the other."""
    if (config.window, config.causal) != (context.config.window, context.config.causal):
        raise ValueError(
            f"config: window={config.window}, causal={config.causal}, expected the context's window="
            f"{context.config.window}, causal={context.config.causal}; make a context_mask for each kind of layer"
        )
    rows = context.layout.count(context.rank)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != rows:
            raise ValueError(
                f"{name}: {x.shape[2]} rows, expected the {rows} that the layout gives rank {context.rank}; shard with "
                "layout.shard"
            )
    batch = context.whole.vectors[0].shape[0] if context.whole.vectors else 1
    if batch not in (1, q.shape[0]):
        raise ValueError(f"q: {q.shape[0]} batch rows, expected the {batch} of the context's masks")
    if q.device.type != context.mesh.device_type:
        raise ValueError(f"q: on {q.device}, expected the {context.mesh.device_type} of the context's mesh")
    method = context.resolved(q.shape[1], k.shape[1])
    ranks = context.layout.ranks
    groups = k.shape[1] if method == "keys" else max(1, k.shape[1] // ranks)
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1 or groups % stages:
        raise ValueError(
            f"stages: {stages!r}, expected a divisor of the {groups} key heads that a rank computes by {method}"
        )
    return method, stages


def _agree_once(
    runtime: Server,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AttentionConfig,
    context: ContextMask,
    stages: int,
) -> None:
    """At the first call of a kind, before anything is sent: all ranks are ready, and about to do the same."""
    train = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (q, k, v))
    shapes = tuple((x.shape[0], x.shape[1], x.shape[-1]) for x in (q, k) if getattr(x, "ndim", 0) == 4)
    dtypes = tuple(getattr(x, "dtype", None) for x in (q, k, v))
    mesh, settings, where = context.mesh, runtime.settings, context.mesh.device_type
    cast = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None
    kind = (config, context.config, context.method, context.layout.ranks, stages, train, cast, shapes)
    key = (runtime.number, mesh, q.device, dtypes, kind)
    if key in _agreed:
        return
    error = None
    try:
        operator.checked_inputs(q, k, v)
        method, groups = _check(q, k, config, context, stages)
        _load_kernels(runtime, *operator.autocast_inputs(q, k, v), config, context, method, groups, train)
    except Exception as raised:  # whatever it is, the others are told before it is raised again
        error = raised
    cpu = torch.backends.cpu.get_cpu_capability() if mesh.device_type == "cpu" else None
    facts = {
        "the call (config, method, stages, gradients, heads)": digest(kind),
        "dtype": digest(dtypes),
        "engine": digest((settings.engine, settings.softcap_approx)),
        "the kind of CPU": digest(cpu),
        "torch": digest(torch.__version__),
    }
    agree("context_attention", mesh, facts, error)
    _agreed.add(key)


def _load_kernels(
    runtime: Server,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AttentionConfig,
    context: ContextMask,
    method: str,
    stages: int,
    train: bool,
) -> None:
    """Have the kernels of a call here, or raise what says why not; nothing is computed."""
    ranks, masks = context.layout.ranks, () if context.by_keys is None else context.by_keys.masks
    heads, kv_heads = q.shape[1], k.shape[1]
    if method == "heads":
        masks, heads, kv_heads = (context.whole,), heads // ranks, max(1, kv_heads // ranks)

    # Shapes alone are looked at.
    def like(x: Tensor, heads: int, rows: int) -> Tensor:
        return x[:, :1, :1].expand(-1, heads // stages, rows, -1)

    for mask in masks:
        call = Call(mask, config.scale, config.softcap, runtime.settings.engine, train)
        runtime.plan(like(q, heads, mask.q_len), like(k, kv_heads, mask.kv_len), call)


def _sent(x: Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> Tensor:
    return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, mesh)


def _waited(x: Tensor) -> Tensor:
    """What was sent to this rank, as a plain tensor. torch has no public way to do that where gradients are wanted:
    there each use of it waits."""
    return x if x.requires_grad else collectives.wait_tensor(x)


def _in_stages(
    groups: Sequence[tuple[Tensor, Tensor, Tensor]],
    send: Callable[[Tensor, Tensor, Tensor], Arriving],
    compute: Callable[[Tensor, Tensor, Tensor, Arriving], Tensor],
) -> list[Tensor]:
    """What is computed of each group; the next one is on its way meanwhile."""
    outs, coming = [], send(*groups[0])
    for (q, k, v), after in itertools.zip_longest(groups, groups[1:]):
        here = coming
        if after is not None:
            coming = send(*after)
        outs.append(compute(q, k, v, here))
    return outs


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Put together along heads (1) or rows (2), laid out ``[B, S, H, D]`` in memory as one call's output is."""
    parts = [part for part in parts if part.shape[dim]]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], 3 - dim).transpose(1, 2)


# --- keys: each rank receives those that its rows see and it lacks. Rows stand first in what travels: [rows, B, H, D].


def _by_keys(
    runtime: Server,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AttentionConfig,
    context: ContextMask,
    stages: int,
) -> Tensor:
    plan = context.by_keys
    assert plan is not None
    mesh, (ahead, inner, behind) = context.mesh, plan.rows

    def compute(q: Tensor, k: Tensor, v: Tensor, coming: tuple[Pieces, Pieces, Tensor | None]) -> Tensor:
        if plan.outer is None:
            assert plan.inner is not None
            return runtime.attend(q, _tied(k, coming[2]), v, config, plan.inner)
        if plan.inner is None:
            keys, values = _outer_keys(*coming, plan)
            return runtime.attend(q, keys, values, config, plan.outer)
        first, middle, last = q.split([ahead, inner, behind], 2)
        out = runtime.attend(middle, k, v, config, plan.inner)  # while keys of others are on their way
        keys, values = _outer_keys(*coming, plan)
        outer = runtime.attend(_joined([first, last], 2), keys, values, config, plan.outer)
        first, last = outer.split([ahead, behind], 2)
        return _joined([first, out, last], 2)

    groups = list(zip(*(x.split(x.shape[1] // stages, 1) for x in (q, k, v)), strict=True))
    return _joined(_in_stages(groups, lambda _, k, v: _send_keys(k, v, plan, mesh), compute), 1)


def _send_keys(k: Tensor, v: Tensor, plan: KeyPlan, mesh: DeviceMesh) -> tuple[Pieces, Pieces, Tensor | None]:
    """Own pieces of k and of v, and what the others send: for each of them keys, then values."""
    k_pieces, v_pieces = (x.permute(2, 0, 1, 3).split(plan.own) for x in (k, v))
    if plan.silent:
        return k_pieces, v_pieces, None
    buffer = [pieces[at] for to in plan.sent for pieces in (k_pieces, v_pieces) for at in to]
    # Nothing of both where nothing is sent: k and v then have gradients, of zeros, as on every other rank.
    packed = torch.cat(buffer or [k_pieces[0][:0], v_pieces[0][:0]])
    sent = [2 * sum(plan.own[at] for at in to) for to in plan.sent]
    received = [2 * sum(sizes) for sizes in plan.received]
    return k_pieces, v_pieces, _sent(packed, received, sent, mesh)


def _outer_keys(k: Pieces, v: Pieces, arrived: Tensor | None, plan: KeyPlan) -> tuple[Tensor, Tensor]:
    """Keys and values that the outer rows see, of own pieces and what arrived."""
    if arrived is not None and any(plan.received):
        parts = _waited(arrived).split([size for sizes in plan.received for _ in "kv" for size in sizes])
        at = 0
        for sizes in plan.received:
            k += parts[at : at + len(sizes)]
            v += parts[at + len(sizes) : at + 2 * len(sizes)]
            at += 2 * len(sizes)
        arrived = None
    keys, values = (picked(x, plan.order).permute(1, 2, 0, 3) for x in (k, v))
    return _tied(keys, arrived), values


def _tied(k: Tensor, arrived: Tensor | None) -> Tensor:
    """Keys of a rank to which nothing comes: gradients do, of what it sent, so the exchange must be a part of what is
    differentiated on every rank."""
    if arrived is None:
        return k
    arrived = _waited(arrived)  # in any case, as what is sent is kept until then
    return torch.cat([k.permute(2, 0, 1, 3), arrived]).permute(1, 2, 0, 3) if arrived.requires_grad else k


# --- heads (Ulysses): each rank receives all rows of its heads, and sends its results back to the rows.


def _by_heads(
    runtime: Server,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AttentionConfig,
    context: ContextMask,
    stages: int,
) -> Tensor:
    plan, mesh, like = context.by_heads, context.mesh, q
    assert plan is not None

    def compute(q: Tensor, k: Tensor, v: Tensor, coming: Tensor) -> Tensor:
        heads = [x.shape[1] for x in (q, k, v)]
        whole = _rows_together(_waited(coming), sum(heads), like, plan).split(heads, 1)
        out = runtime.attend(whole[0], whole[1], whole[2], config, context.whole)
        return _back_to_rows(out, plan, context.rank, mesh)

    groups = _head_groups(q, k, v, context.layout.ranks, stages)
    outs = _in_stages(groups, lambda q, k, v: _send_rows(q, k, v, plan, mesh), compute)
    ranks, (batch, heads, here, head_dim) = context.layout.ranks, q.shape
    shape = (ranks, here, batch, heads // ranks // stages, head_dim)
    # [rank, B, rows, heads, D] of each group: heads in the order of ranks, then of groups. A copy, so that what is
    # returned has been waited for.
    by_rank = zip(*(_waited(out).view(shape).transpose(1, 2).unbind(0) for out in outs), strict=True)
    return torch.cat([heads for groups in by_rank for heads in groups], 2).transpose(1, 2)


def _head_groups(
    q: Tensor, k: Tensor, v: Tensor, ranks: int, stages: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of each group as ``[ranks, heads, B, rows, D]``: which heads go to which rank."""
    if k.shape[1] < ranks:  # each rank's query heads read one key head: it goes to several ranks
        k, v = (x.repeat_interleave(ranks // x.shape[1], 1) for x in (k, v))
    by_rank = [x.unflatten(1, (ranks, -1)).permute(1, 2, 0, 3, 4) for x in (q, k, v)]
    parts = [x.split(x.shape[1] // stages, 1) for x in by_rank]
    return list(zip(*parts, strict=True))


def _send_rows(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, mesh: DeviceMesh) -> Tensor:
    packed = torch.cat((q, k, v), 1)
    row = packed[0, :, :, 0].numel()
    here = packed.shape[3]
    received = [rows * row for rows in plan.rows]
    return _sent(packed.flatten(), received, [here * row] * len(plan.rows), mesh)


def _rows_together(arrived: Tensor, heads: int, q: Tensor, plan: HeadPlan) -> Tensor:
    """``[B, heads, S, D]`` in the sequence's order, of what every rank sent: ``[heads, B, rows, D]`` each."""
    batch, head_dim = q.shape[0], q.shape[3]
    row = heads * batch * head_dim
    parts = arrived.split([rows * row for rows in plan.rows])
    shaped = [x.view(heads, batch, -1, head_dim).permute(2, 1, 0, 3) for x in parts]
    pieces = [piece for own, sizes in zip(shaped, plan.pieces, strict=True) for piece in own.split(sizes)]
    return picked(pieces, plan.order).permute(1, 2, 0, 3)


def _back_to_rows(out: Tensor, plan: HeadPlan, rank: int, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of what every rank computed, ``[rank, rows, B, heads, D]`` flat along the first two: untouched,
    so that nothing waits for it yet."""
    pieces = out.permute(2, 0, 1, 3).split(plan.sorted_pieces)
    return _sent(picked(pieces, plan.back), [plan.rows[rank]] * len(plan.rows), plan.rows, mesh)


def _of_dtensors(
    runtime: Server, q: Any, k: Any, v: Any, config: AttentionConfig, context: ContextMask, stages: int
) -> Tensor:
    """Each rank's own batch rows and heads of DTensors, which another mesh dimension shards."""
    from torch.distributed.tensor import DTensor, Shard

    check_placements(q, k, v)
    if not q.placements == k.placements == v.placements or Shard(2) in q.placements:
        raise ValueError(
            f"q, k, v: placements {q.placements}, {k.placements}, {v.placements}, expected the same for all three, "
            "with the sequence unsharded: each rank's rows of it are the local tensor; make them from local tensors"
        )
    local = [x.to_local() for x in (q, k, v)]
    out = context_attention(runtime, local[0], local[1], local[2], config, context, stages)
    return DTensor.from_local(
        out, q.device_mesh, q.placements, run_check=False, shape=q.shape, stride=q.stride()
    )
