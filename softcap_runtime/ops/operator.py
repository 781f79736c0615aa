"""``torch.ops.softcap_runtime.attention``: the operator between torch and the engines.

It is what autograd, ``torch.compile``, ``torch.export``, checkpointing and ``torch.func`` see. It is defined through
``torch.library.Library``, as a ``custom_op`` imports the compiler at its first call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.checks import check_qkv, constant_in_graph
from softcap_runtime.compat.torch_transforms import (
    apply_function,
    below_autograd,
    interpreters_active,
    is_batch_of_gradients,
)
from softcap_runtime.engines.engine import Call, empty_output
from softcap_runtime.masks.intervals import RowIntervals
from softcap_runtime.ops.batching import register_rules
from softcap_runtime.ops.flops import register_formulas
from softcap_runtime.ops.sharding import sharded_inputs

LIBRARY = torch.library.Library("softcap_runtime", "DEF")

_MASK = "Tensor? lo, Tensor? hi, SymInt left, SymInt right"
_HOW = "float scale, float? softcap, str engine"
# ``kept`` is last and optional, so that programs exported before it existed still run.
_LAST = "int runtime, Tensor? kept=None"
LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_MASK}, {_HOW}, bool train, {_LAST}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}, {_HOW},"
    f" {_LAST}) -> (Tensor, Tensor, Tensor)"
)


# Runtimes by number, since an operator takes numbers. 0 is the process's own, made when first needed.
_servers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_default: Callable[[], Any] | None = None


def register(server: Any, number: int) -> None:
    """Let the operator find ``server`` by ``number`` while it lives.

    It calls ``server.forward(q, k, v, call)`` for (out, lse or None), and ``server.backward(grad_out, q, k, v, out,
    lse, call)`` for the three gradients.
    """
    _servers[number] = server


def register_default(make: Callable[[], Any]) -> None:
    """``make()`` returns the server of number 0, and of programs exported in another process."""
    global _default
    _default = make


def _server(number: int) -> Any:
    server = _servers.get(number)
    if server is None:
        assert _default is not None
        server = _default()
    return server


def _call(q: Tensor, k: Tensor, lo: Any, hi: Any, kept: Any, left: int, right: int, *how: Any) -> Call:
    mask = RowIntervals(q.shape[2], k.shape[2], left, right, None, None)
    if lo is not None and hi is not None:
        mask = mask._replace(left=None, right=None, lo=lo, hi=hi, kept=kept)
    return Call(mask, *how)


# ``how`` below is left, right, scale, softcap, engine and, in the forward only, train: this many values.
_FORWARD, _BACKWARD = 6, 5


def _parts(rest: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], int, Tensor | None]:
    """``how``, of ``count`` values, runtime and kept, from an operator's arguments after the edges: torch omits a
    ``kept`` that is None."""
    return rest[:count], rest[count], rest[count + 1] if len(rest) > count + 1 else None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Any, hi: Any, how: tuple[Any, ...], runtime: int, kept: Any
) -> tuple[Tensor, Tensor]:
    if q.is_meta:
        return _fake_forward(q, k, v, lo, hi, *how, runtime, kept)
    out, lse = _server(runtime).forward(q, k, v, _call(q, k, lo, hi, kept, *how))
    train = how[-1]
    return out, q.new_empty(0, dtype=torch.float32) if lse is None or not train else lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Any,
    hi: Any,
    how: tuple[Any, ...],
    runtime: int,
    kept: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_meta:
        return _fake_backward(grad_out, q, k, v, out, lse, lo, hi, *how, runtime, kept)
    call = _call(q, k, lo, hi, kept, *(*how, True))
    grads: tuple[Tensor, Tensor, Tensor] = _server(runtime).backward(grad_out, q, k, v, out, lse, call)
    return grads


# Without gradients, torch passes a call with any tensor on the meta device to the two below, which compute nothing.


def _check_no_other_is_meta(q: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device.type == "meta" != q.device.type:
            raise ValueError(f"{name}: on meta, expected q's {q.device}; move one of them")


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, lo: Any, hi: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    how, _, kept = _parts(rest, _FORWARD)
    _check_no_other_is_meta(q, k=k, v=v, lo=lo, hi=hi, kept=kept)
    train = how[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    return empty_output(q), q.new_empty(q.shape[:3] if train else (0,), dtype=wide if train else torch.float32)


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Any, hi: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, kept = _parts(rest, _BACKWARD)
    _check_no_other_is_meta(q, grad_out=grad_out, k=k, v=v, out=out, lse=lse, lo=lo, hi=hi, kept=kept)
    return empty_output(q), empty_output(k), empty_output(v)


# Programs may call the operator directly: these check what ``Runtime.attention`` has checked already.


def _checked_forward(q: Tensor, k: Tensor, v: Tensor, lo: Any, hi: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    how, runtime, kept = _parts(rest, _FORWARD)
    lo, hi, kept = _checked_edges(lo, hi, kept, k.shape[2])
    return _forward(q, k, v, lo, hi, how, runtime, kept)


def _checked_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Any, hi: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_qkv(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, tensor, shape, dtype in (
        ("grad_out", grad_out, q.shape, q.dtype),
        ("out", out, q.shape, q.dtype),
        ("lse", lse, q.shape[:3], wide),
    ):
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, q.device):
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {dtype} "
                f"{tuple(shape)} on {q.device}, as the forward with train=True gave it"
            )
    how, runtime, kept = _parts(rest, _BACKWARD)
    lo, hi, kept = _checked_edges(lo, hi, kept, k.shape[2])
    return _backward(grad_out, q, k, v, out, lse.contiguous(), lo, hi, how, runtime, kept)


def _checked_edges(
    lo: Tensor | None, hi: Tensor | None, kept: Tensor | None, kv_len: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Both edges clipped to the keys, or neither; sizes and dtypes are checked when an engine is bound."""
    if lo is None or hi is None:
        if lo is not hi:
            raise ValueError(f"{'hi' if hi is None else 'lo'}: None, expected both edges of the rows or none")
        if kept is not None:
            raise ValueError("kept: a tensor without lo and hi, expected None for a band; give the edges too")
        return None, None, None
    edges = lo.clamp(0, kv_len).contiguous(), hi.clamp(0, kv_len).contiguous()
    return *edges, None if kept is None else kept.contiguous()


# The forwards below take ctx: ``apply`` inspects the signature of one without it at each call, which takes 40 us.


class _Attention(torch.autograd.Function):
    """The operator's derivative."""

    @staticmethod
    def forward(ctx: Any, recording: bool, *inputs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, lo, hi, *rest = inputs
        how, runtime, kept = _parts(tuple(rest), _FORWARD)
        if interpreters_active(q, k, v, lo, hi, kept):
            with below_autograd(recording):
                output = torch.ops.softcap_runtime.attention(*inputs)
        else:
            output = _forward(q, k, v, lo, hi, how, runtime, kept)
        ctx.save_for_backward(q, k, v, *output, lo, hi, kept)
        ctx.how, ctx.runtime = how[:_BACKWARD], runtime
        ctx.server = _servers.get(runtime)  # keeps it alive for the backward
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        nothing = (None,) * 10
        if grad_out is None:
            return (None, None, None, None, *nothing)
        *saved, lo, hi, kept = ctx.saved_tensors
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling()
        watched = watched or interpreters_active(grad_out, *saved, lo, hi, kept)
        if watched or is_batch_of_gradients(grad_out):
            backward = torch.ops.softcap_runtime.attention_backward
            return (None, *backward(grad_out, *saved, lo, hi, *ctx.how, ctx.runtime, kept), *nothing)
        q, k, v, out, lse = saved
        grads = _backward(grad_out, q, k, v, out, lse, lo, hi, ctx.how, ctx.runtime, kept)
        return (None, *grads, *nothing)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """For ``torch.func.jvp`` and forward-mode AD."""
        raise RuntimeError(
            "softcap_runtime::attention has no forward-mode derivative; use softcap_runtime.reference.attention for it"
        )


class _Backward(torch.autograd.Function):
    """The end of the line: no second derivative."""

    @staticmethod
    def forward(ctx: Any, recording: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd(recording):
            return torch.ops.softcap_runtime.attention_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "softcap_runtime::attention has no second derivative; use softcap_runtime.reference.attention for "
            "double backward"
        )

    jvp = backward


def _differentiable(q: Tensor, k: Tensor, v: Tensor, lo: Any, hi: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    how, runtime, kept = _parts(rest, _FORWARD)
    # torch.func's levels and the compiler hide from a caller that gradients are wanted.
    train = how[-1] or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    if not interpreters_active(q, k, v, lo, hi, kept):
        check_qkv(q, k, v)
        lo, hi, kept = _checked_edges(lo, hi, kept, k.shape[2])
    else:
        q, k, v, lo, hi, kept = sharded_inputs(q, k, v, lo, hi, kept)
    return apply_function(_Attention, q, k, v, lo, hi, *how[:-1], train, runtime, kept)


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, number: int) -> Tensor:
    """The operator's output, for checked inputs of the runtime ``number``: directly where nobody looks on."""
    mask = call.mask
    left, right = (0, 0) if mask.left is None or mask.right is None else (mask.left, mask.right)
    _, scale, softcap, engine, train, _ = call  # no slice of it: the compiler of torch 2.8 takes none
    scale, softcap = constant_in_graph(scale), constant_in_graph(softcap)
    lo, hi, kept = mask.lo, mask.hi, mask.kept
    how = (left, right, scale, softcap, engine, train, number)
    if torch.compiler.is_compiling() or interpreters_active(q, k, v, lo, hi, kept):
        if not torch.compiler.is_dynamo_compiling():  # there the operator's own autograd kernel does it
            q, k, v, lo, hi, kept = sharded_inputs(q, k, v, lo, hi, kept)
        output = torch.ops.softcap_runtime.attention(q, k, v, lo, hi, *how, kept)
    else:
        output = _Attention.apply(True, q, k, v, lo, hi, *how, kept)  # type: ignore[no-untyped-call]
    out: Tensor = output[0]
    return out


def _autocast(device: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = autocast_inputs(q, k, v)
    with torch.autocast(device, enabled=False):
        return torch.ops.softcap_runtime.attention(q, k, v, *rest)


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs cast as autocast casts those of scaled_dot_product_attention: floats to its dtype, except float64."""
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    cast = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)]
    return cast[0], cast[1], cast[2]


def checked_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs, cast as autocast asks and checked by ``check_qkv``."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v)
    return q, k, v


LIBRARY.impl("attention", _checked_forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _checked_backward, "CompositeExplicitAutograd")
LIBRARY.impl("attention", _differentiable, "Autograd")
LIBRARY.impl("attention_backward", functools.partial(apply_function, _Backward), "Autograd")
LIBRARY.impl("attention", functools.partial(_autocast, "cpu"), "AutocastCPU")
LIBRARY.impl("attention", functools.partial(_autocast, "cuda"), "AutocastCUDA")
torch.library.register_fake("softcap_runtime::attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake("softcap_runtime::attention_backward", _fake_backward, lib=LIBRARY)
register_formulas()
register_rules(LIBRARY)
