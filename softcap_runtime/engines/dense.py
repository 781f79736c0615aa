"""The dense engines compute the whole S x S matrix in plain torch, uncompiled (eager) or through ``torch.compile``.

``eager`` never compiles and serves every dtype up to float64. ``dense`` serves where neither ``blocked`` nor ``flex``
does. Both compute half-precision inputs in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softcap_runtime import reference
from softcap_runtime.engines.engine import Engine, Kernels, MaskedBackward, MaskedForward, Problem, laid_out, per_mask
from softcap_runtime.engines.jit import Compiled
from softcap_runtime.engines.spec import KernelSpec, dtype_name
from softcap_runtime.masks.intervals import edges

_FORWARD, _BACKWARD = "dense_forward", "dense_backward"


def attend(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: Tensor, cap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The reference in float32 at least; lo, hi int32 ``[B or 1, Sq]``, scale and cap 0-d tensors.

    Returns out ``[B, Hq, Sq, D]`` in q's dtype and the logsumexp ``[B, Hq, Sq]``.
    """
    mask = reference.visible(lo, hi, k.shape[2])
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = reference.attention(q.to(wide), k.to(wide), v.to(wide), mask, scale=scale, softcap=cap)
    return out.to(q.dtype), lse


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: Tensor, cap: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend``: ``ds = scale * p * (grad_p - delta) * (1 - (logit / cap)^2)``.

    The softmax is recomputed, and delta is its mean of grad_p: with the forward's logsumexp and rounded output the
    weights would not sum to 1, nor would delta cancel if one key has all the weight.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    groups = heads // kv_heads

    # Every size by name: torch infers none (-1) of an empty tensor.
    def grouped(x: Tensor) -> Tensor:
        return x.to(wide).reshape(batch, kv_heads, groups * q_len, head_dim)

    rows_q, rows_grad, keys, values = grouped(q), grouped(grad_out), k.to(wide), v.to(wide)
    logit = (rows_q @ keys.mT) * scale
    slope = scale
    if cap is not None:
        bounded = torch.tanh(logit / cap)
        logit, slope = cap * bounded, scale * (1 - bounded * bounded)
    hidden = ~reference.visible(lo, hi, kv_len)[:, None, None]
    empty = hidden.all(-1, keepdim=True)
    logit = logit.view(batch, kv_heads, groups, q_len, kv_len).masked_fill(hidden, -torch.inf)
    p = torch.softmax(logit.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    p = p.view(batch, kv_heads, groups * q_len, kv_len)
    grad_p = rows_grad @ values.mT
    ds = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * slope
    grad_q = (ds @ keys).view(batch, heads, q_len, head_dim)
    return grad_q.to(q.dtype), (ds.mT @ rows_q).to(k.dtype), (p.mT @ rows_grad).to(v.dtype)


def _arguments(problem: Problem) -> list[Tensor | None]:
    wide = torch.promote_types(problem.dtype, torch.float32)

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=wide, device=problem.device)

    cap = None if problem.softcap is None else number(problem.softcap)
    return [*edges(problem.mask, problem.device), number(problem.scale), cap]


def _refuses(problem: Problem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the dense engine serves float32, bfloat16 and float16"
    return None


def _eager_refuses(problem: Problem) -> str | None:
    return None if problem.dtype.is_floating_point else f"q.dtype: {problem.dtype}, expected a float dtype"


def _function(spec: KernelSpec) -> Callable[..., Any]:
    return attend if spec.op == _FORWARD else attend_backward


def _compiled(problem: Problem, op: str) -> Compiled:
    capped = problem.softcap is not None
    return Compiled(KernelSpec(op, problem.device.type, dtype_name(problem.dtype), 0, capped), _function)


def _artifacts(problem: Problem, kernels: Kernels) -> list[Compiled]:
    return [_compiled(problem, op) for op in ((_FORWARD, _BACKWARD) if problem.train else (_FORWARD,))]


def _forward(compile: bool, problem: Problem, kernels: Kernels) -> MaskedForward:
    """``attend`` bound to a problem and its mask, compiled or not."""
    fixed = _arguments(problem)
    compiled = kernels.get(_compiled(problem, _FORWARD)) if compile else None

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = [*tensors, *fixed]
        out, lse = attend(*inputs) if compiled is None else compiled(inputs)  # type: ignore[arg-type]
        return laid_out(out, tensors[0]), lse

    return run


def _backward(compile: bool, problem: Problem, kernels: Kernels) -> MaskedBackward:
    """``attend_backward``, likewise."""
    fixed = _arguments(problem)
    compiled = kernels.get(_compiled(problem, _BACKWARD)) if compile else None

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [*tensors[:4], *fixed]
        grads = attend_backward(*inputs) if compiled is None else compiled(inputs)  # type: ignore[arg-type]
        grad_q, grad_k, grad_v = map(laid_out, grads, tensors[1:4])
        return grad_q, grad_k, grad_v

    return run


EAGER = Engine(
    "eager",
    _eager_refuses,
    lambda problem, kernels: [],
    per_mask(partial(_forward, False)),
    per_mask(partial(_backward, False)),
)
DENSE = Engine("dense", _refuses, _artifacts, per_mask(partial(_forward, True)), per_mask(partial(_backward, True)))
