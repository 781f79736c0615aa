"""``Runtime.context_attention``: rows of a sequence on each rank, keys or heads brought together for one kernel call.

Everything that travels goes by ``all_to_all_single`` of torch's functional collectives, whose gradients go back the
same way. An exchange is waited for where its result is first used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from softcap_runtime.checks import check_config
from softcap_runtime.config import AttentionConfig
from softcap_runtime.distributed.agree import agree, digest
from softcap_runtime.distributed.context import ContextMask
from softcap_runtime.distributed.ranges import picked
from softcap_runtime.engines.engine import Call
from softcap_runtime.ops import operator
from softcap_runtime.ops.sharding import check_placements, is_dtensor
from softcap_runtime.plans import Server

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
    ranks, mask = context.layout.ranks, context.local
    heads, kv_heads = q.shape[1], k.shape[1]
    if method == "heads":
        mask, heads, kv_heads = context.whole, heads // ranks, max(1, kv_heads // ranks)
    assert mask is not None

    # Shapes alone are looked at.
    def like(x: Tensor, heads: int, rows: int) -> Tensor:
        return x[:, :1, :1].expand(-1, heads // stages, rows, -1)

    call = Call(mask, config.scale, config.softcap, runtime.settings.engine, train)
    runtime.plan(like(q, heads, mask.q_len), like(k, kv_heads, mask.kv_len), call)


def _sent(x: Tensor, received: list[int], sent: list[int], context: ContextMask) -> Tensor:
    return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, context.mesh)


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
    mask, width = context.local, k.shape[1] // stages
    assert mask is not None
    groups = list(zip(k.split(width, 1), v.split(width, 1), strict=True))
    rows = q.split(q.shape[1] // stages, 1)
    coming = _send_keys(*groups[0], context)
    outs = []
    for at in range(stages):
        here = coming
        if at + 1 < stages:  # on its way while this group is computed
            coming = _send_keys(*groups[at + 1], context)
        keys, values = _placed(*here, context)
        outs.append(runtime.attend(rows[at], keys, values, config, mask))
    return _heads_together(outs)


def _send_keys(
    k: Tensor, v: Tensor, context: ContextMask
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Own pieces of k and of v, and what the others send: for each of them keys, then values."""
    plan = context.by_keys
    assert plan is not None
    k_pieces, v_pieces = (list(x.permute(2, 0, 1, 3).split(plan.own)) for x in (k, v))
    if plan.silent:
        return k_pieces, v_pieces, None
    buffer = [pieces[at] for to in plan.sent for pieces in (k_pieces, v_pieces) for at in to]
    packed = torch.cat(buffer) if buffer else k_pieces[0][:0]
    sent = [2 * sum(plan.own[at] for at in to) for to in plan.sent]
    received = [2 * sum(sizes) for sizes in plan.received]
    return k_pieces, v_pieces, _sent(packed, received, sent, context)


def _placed(
    k_pieces: list[Tensor], v_pieces: list[Tensor], arrived: Tensor | None, context: ContextMask
) -> tuple[Tensor, Tensor]:
    plan = context.by_keys
    assert plan is not None
    if arrived is not None:
        parts = list(arrived.split([size for sizes in plan.received for _ in "kv" for size in sizes] or [0]))
        if not any(plan.received):
            # Nothing comes, but gradients do: the exchange must be a part of what is differentiated on every rank.
            first = plan.order[0]
            k_pieces[first] = torch.cat([k_pieces[first], parts[0]])
        else:
            at = 0
            for sizes in plan.received:
                k_pieces += parts[at : at + len(sizes)]
                v_pieces += parts[at + len(sizes) : at + 2 * len(sizes)]
                at += 2 * len(sizes)
    return (
        picked(k_pieces, plan.order).permute(1, 2, 0, 3),
        picked(v_pieces, plan.order).permute(1, 2, 0, 3),
    )


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
    groups = _head_groups(q, k, v, context.layout.ranks, stages)
    coming = _send_rows(*groups[0], context)
    outs = []
    for at in range(stages):
        here = coming
        if at + 1 < stages:
            coming = _send_rows(*groups[at + 1], context)
        heads = [x.shape[1] for x in groups[at]]
        whole = _rows_together(here, sum(heads), q, context).split(heads, 1)
        out = runtime.attend(whole[0], whole[1], whole[2], config, context.whole)
        outs.append(_back_to_rows(out, context))
    # [rank, B, rows, heads, D] of each group: heads in the order of ranks, then of groups. A copy, so that what is
    # returned has been waited for.
    by_rank = zip(*(out.unbind(0) for out in outs), strict=True)
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


def _send_rows(q: Tensor, k: Tensor, v: Tensor, context: ContextMask) -> Tensor:
    plan = context.by_heads
    assert plan is not None
    packed = torch.cat((q, k, v), 1)
    row = packed[0, :, :, 0].numel()
    here = packed.shape[3]
    received = [rows * row for rows in plan.rows]
    return _sent(packed.flatten(), received, [here * row] * len(plan.rows), context)


def _rows_together(arrived: Tensor, heads: int, q: Tensor, context: ContextMask) -> Tensor:
    """``[B, heads, S, D]`` in the sequence's order, of what every rank sent: ``[heads, B, rows, D]`` each."""
    plan = context.by_heads
    assert plan is not None
    batch, head_dim = q.shape[0], q.shape[3]
    row = heads * batch * head_dim
    parts = arrived.split([rows * row for rows in plan.rows])
    shaped = [x.view(heads, batch, -1, head_dim).permute(2, 1, 0, 3) for x in parts]
    pieces, at = [], 0
    for own, ranges in zip(shaped, context.layout.ranges, strict=True):
        pieces += own.split(plan.pieces[at : at + len(ranges)])
        at += len(ranges)
    return picked(pieces, plan.order).permute(1, 2, 0, 3)


def _back_to_rows(out: Tensor, context: ContextMask) -> Tensor:
    """``[rank, B, rows, heads, D]``: this rank's rows of what every rank computed."""
    plan = context.by_heads
    assert plan is not None
    batch, heads, _, head_dim = out.shape
    pieces = out.permute(2, 0, 1, 3).split(plan.sorted_pieces)
    packed = picked(pieces, plan.back)
    here = plan.rows[context.rank]
    back = _sent(packed, [here] * len(plan.rows), plan.rows, context)
    return back.view(len(plan.rows), here, batch, heads, head_dim).transpose(1, 2)


def _heads_together(outs: list[Tensor]) -> Tensor:
    """Laid out ``[B, Sq, Hq, D]`` in memory, as one call's output is."""
    if len(outs) == 1:
        return outs[0]
    return torch.cat([out.transpose(1, 2) for out in outs], 2).transpose(1, 2)


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
