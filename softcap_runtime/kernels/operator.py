"""``torch.ops.softcap_runtime.attention``: the one door from torch to the engines.

The operator is what autograd, ``torch.compile``, ``torch.export``, checkpointing and ``torch.func`` see. It is
defined through ``torch.library.Library``, since a ``custom_op`` imports the compiler at its first call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from softcap_runtime.masks.intervals import RowIntervals

LIBRARY = torch.library.Library("softcap_runtime", "DEF")

_MASK = "Tensor? lo, Tensor? hi, SymInt left, SymInt right"
_HOW = "float scale, float? softcap, str engine"
LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_MASK}, {_HOW}, bool train, int runtime) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}, {_HOW},"
    " int runtime) -> (Tensor, Tensor, Tensor)"
)


class Server(Protocol):
    """What a runtime offers the operator."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: RowIntervals,
        scale: float,
        softcap: float | None,
        engine: str,
        train: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute out and, for training, the logsumexp."""

    def backward(
        self,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        mask: RowIntervals,
        scale: float,
        softcap: float | None,
        engine: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients from (grad_out, q, k, v, out, lse)."""


# Runtimes by number, since an operator takes numbers. 0 is the process's own, made when first needed.
_servers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_default: Callable[[], Server] | None = None


def register(server: Server, number: int) -> None:
    """Let the operator find ``server`` under ``number``, for as long as it lives."""
    _servers[number] = server


def register_default(make: Callable[[], Server]) -> None:
    """``make()`` gives the server of number 0, and of a program exported in another process."""
    global _default
    _default = make


def _server(number: int) -> Server:
    server = _servers.get(number)
    if server is None:
        assert _default is not None
        server = _default()
    return server


def _mask(q: Tensor, k: Tensor, lo: Tensor | None, hi: Tensor | None, left: int, right: int) -> RowIntervals:
    if lo is None:
        return RowIntervals(q.shape[2], k.shape[2], left, right, None, None)
    return RowIntervals(q.shape[2], k.shape[2], None, None, lo, hi)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    engine: str,
    train: bool,
    runtime: int,
) -> tuple[Tensor, Tensor]:
    mask = _mask(q, k, lo, hi, left, right)
    out, lse = _server(runtime).forward(q, k, v, mask, scale, softcap, engine, train)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None or not train else lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    engine: str,
    runtime: int,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(q, k, lo, hi, left, right)
    tensors = (grad_out, q, k, v, out, lse)
    return _server(runtime).backward(tensors, mask, scale, softcap, engine)


def _like_output(q: Tensor) -> Tensor:
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    train = rest[-2]
    wide = torch.promote_types(q.dtype, torch.float32)
    return _like_output(q), q.new_empty(
        q.shape[:3] if train else (0,), dtype=wide if train else torch.float32
    )


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_output(q), _like_output(k), _like_output(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lo, hi, *how, train, runtime = inputs
    if not train:
        raise RuntimeError(
            "softcap_runtime::attention was called with train=False on inputs that require gradients; "
            "pass train=True, or call it under torch.no_grad()"
        )
    ctx.save_for_backward(q, k, v, *output, lo, hi)
    ctx.how, ctx.runtime = how, runtime
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if grad_out is None:
        return (None, None, None, *nothing)
    q, k, v, out, lse, lo, hi = ctx.saved_tensors
    operator = torch.ops.softcap_runtime.attention_backward
    return (*operator(grad_out, q, k, v, out, lse, lo, hi, *ctx.how, ctx.runtime), *nothing)


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "softcap_runtime::attention has no second derivative; use softcap_runtime.reference.attention for "
        "double backward"
    )


LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("softcap_runtime::attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake("softcap_runtime::attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "softcap_runtime::attention", _differentiate, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "softcap_runtime::attention_backward", _no_double_backward, setup_context=lambda *_: None, lib=LIBRARY
)
