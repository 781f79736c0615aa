"""``Runtime.context_attention``: the checks, and the agreement of all ranks, before anything is sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcap_runtime.checks import check_config, check_type
from softcap_runtime.distributed.agree import agree, digest
from softcap_runtime.distributed.context import ContextMask, Layer
from softcap_runtime.distributed.heads import attend_by_heads
from softcap_runtime.distributed.keys import attend_by_keys
from softcap_runtime.ops import operator
from softcap_runtime.ops.sharding import check_placements, is_dtensor

# The kinds of call on which the ranks have agreed, so that later calls gather nothing; each is a few numbers.
_agreed: set[Any] = set()


def context_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See ``Runtime.context_attention``."""
    check_config(layer.config)
    check_type("context", layer.context, ContextMask, "a ContextMask; make one with context_mask(...)")
    if is_dtensor(q) or is_dtensor(k) or is_dtensor(v):
        return _of_dtensors(layer, q, k, v)
    if not torch.compiler.is_compiling():
        _agree_once(layer, q, k, v)
    q, k, v = operator.checked_inputs(q, k, v)
    attend = attend_by_keys if _checked_method(layer, q, k) == "keys" else attend_by_heads
    return attend(layer, q, k, v)


def _checked_method(layer: Layer, q: Tensor, k: Tensor) -> str:
    """The method that serves a call. Raises ValueError for what does not fit."""
    _, config, context, stages = layer
    if (config.window, config.causal) != (context.config.window, context.config.causal):
        raise ValueError(
            f"config: window={config.window}, causal={config.causal}, expected the context's window="
            f"{context.config.window}, causal={context.config.causal}; make a context_mask for each kind of layer"
        )
    if q.shape[0] == 0:
        raise ValueError("q: batch 0, expected at least 1; skip the call on every rank")
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
    return method


def _agree_once(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> None:
    """At the first call of a kind: make sure that all ranks are ready and about to do the same."""
    runtime, config, context, stages = layer
    train = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (q, k, v))
    shapes = tuple((x.shape[0], x.shape[1], x.shape[-1]) for x in (q, k) if getattr(x, "ndim", 0) == 4)
    dtypes = tuple(getattr(x, "dtype", None) for x in (q, k, v))
    mesh, settings, where = context.mesh, runtime.settings, context.mesh.device_type
    cast = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None
    kind = (config, context.config, context.method, context.layout.ranks, stages, train, cast, shapes)
    key = (runtime.number, mesh, getattr(q, "device", None), dtypes, kind)
    if key in _agreed:
        return
    error = None
    try:
        operator.checked_inputs(q, k, v)
        method = _checked_method(layer, q, k)
        _load_kernels(layer, *operator.autocast_inputs(q, k, v)[:2], method, train)
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


def _load_kernels(layer: Layer, q: Tensor, k: Tensor, method: str, train: bool) -> None:
    """Load the kernels of a call, or raise what says why not; computes nothing."""
    context, stages = layer.context, layer.stages
    ranks, masks = context.layout.ranks, () if context.by_keys is None else context.by_keys.masks(train)
    heads, kv_heads = q.shape[1], k.shape[1]
    if method == "heads":
        masks, heads, kv_heads = (context.whole,), heads // ranks, max(1, kv_heads // ranks)

    # Only shapes are read.
    def like(x: Tensor, heads: int, rows: int) -> Tensor:
        return x[:, :1, :1].expand(-1, heads // stages, rows, -1)

    for mask in masks:
        rows, keys = like(q, heads, mask.q_len), like(k, kv_heads, mask.kv_len)
        layer.runtime.plan(rows, keys, layer.call(mask, train))


def _of_dtensors(layer: Layer, q: Any, k: Any, v: Any) -> Tensor:
    """Attention of DTensors whose batch or heads another mesh dimension shards: each rank computes its own."""
    from torch.distributed.tensor import DTensor, Shard

    check_placements(q, k, v)
    if not q.placements == k.placements == v.placements or Shard(2) in q.placements:
        raise ValueError(
            f"q, k, v: placements {q.placements}, {k.placements}, {v.placements}, expected the same for all three, "
            "with the sequence unsharded: each rank's rows of it are the local tensor; make them from local tensors"
        )
    out = context_attention(layer, q.to_local(), k.to_local(), v.to_local())
    return DTensor.from_local(out, q.device_mesh, q.placements, run_check=False, shape=q.shape, stride=q.stride())
