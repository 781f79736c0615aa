"""How far rounding alone can take a result: first-order bounds on errors, for inputs where relative errors say nothing.

A logit's error is eps times the sum of |q_i k_i|, whatever cancels in it; the cap passes it on by its slope; the
softmax makes it the relative error of a weight; the cap's second derivative makes it an error of the slope.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcap_runtime import AttentionConfig


class _Softmax(NamedTuple):
    """Exact weights and slopes ``[B, Hq, Sq, Skv]``, and the errors of both: relative, and absolute.

    ``logsumexp_error`` ``[B, Hq, Sq]``: the weighted mean of the logits' errors.
    """

    weights: Tensor
    weight_error: Tensor
    logsumexp_error: Tensor
    slope: Tensor
    slope_error: Tensor


def _softmax(q: Tensor, k: Tensor, config: AttentionConfig, mask: Tensor, eps: float) -> _Softmax:
    logits = (q @ k.mT) * config.scale
    error = eps * (q.abs() @ k.abs().mT) * config.scale
    slope, slope_error = torch.ones_like(logits), torch.zeros_like(logits)
    if config.softcap is not None:
        shift = error / config.softcap
        # Over all arguments that the error reaches: the derivative of 1 - tanh(u)^2 is at most 2 / cosh(u)^2.
        nearest = (logits.abs() / config.softcap - shift).clamp(min=0)
        slope_error = (2 * shift / nearest.cosh() ** 2 + 2 * eps).clamp(max=1)
        tanh = torch.tanh(logits / config.softcap)
        logits, slope = config.softcap * tanh, 1 - tanh**2
        error = error / nearest.cosh() ** 2 + eps * config.softcap
    hidden = ~mask[:, None]
    # A row that sees nothing has no weights.
    weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1).masked_fill(hidden, 0.0)
    mean = (weights * error).sum(-1)
    relative = (error + mean[..., None] + eps).clamp(max=1)
    return _Softmax(weights, relative, mean, slope, slope_error)


def output_error(
    q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, mask: Tensor, eps: float, stored: float
) -> Tensor:
    """The error of the output ``[B, Hq, Sq, D]`` of anyone who computes logits with unit roundoff ``eps``.

    ``mask`` bool ``[B or 1, Sq, Skv]``. ``stored``: the relative error of weights and results as they are stored.
    """
    q, k, v = _wide(q, k, v)
    made = _softmax(q, k, config, mask, eps)
    return (made.weights * (made.weight_error + stored)) @ v.abs()


def logsumexp_error(q: Tensor, k: Tensor, config: AttentionConfig, mask: Tensor, eps: float) -> Tensor:
    """The error of the logsumexp ``[B, Hq, Sq]``: that of its logits, and its own rounding."""
    q, k, _ = _wide(q, k, k)
    made = _softmax(q, k, config, mask, eps)
    return made.logsumexp_error + eps


def gradient_errors(
    inputs: tuple[Tensor, ...], grad_out: Tensor, config: AttentionConfig, mask: Tensor, eps: float, stored: float
) -> tuple[Tensor, ...]:
    """The errors of dq, dk and dv, likewise; ``stored`` also of dp - delta."""
    groups = inputs[0].shape[1] // inputs[1].shape[1]
    q, k, v = _wide(*inputs)
    grad = grad_out.double()
    made = _softmax(q, k, config, mask, eps)
    dp = grad @ v.mT
    size = dp.abs() + (made.weights * dp).sum(-1, keepdim=True).abs()
    relative = made.weight_error + stored
    ds = made.weights * size * (made.slope * relative + made.slope_error) * config.scale

    def folded(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, groups)).sum(2)

    return ds @ k.abs(), folded(ds.mT @ q.abs()), folded((made.weights * relative).mT @ grad.abs())


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.detach().double() for x in (q, k, v))
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
