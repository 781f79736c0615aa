"""Attention under a mask that keeps only some keys, by kernels that only know row intervals.

Intervals stay intervals if keys are removed: the kept keys are gathered in order, and lo and hi become the numbers of
kept keys before them. Copies k and v; reads no data on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from softcap_runtime.engines.engine import Backward, Engine, Forward, Kernels, Problem, empty_output


def bind(engine: Engine, problem: Problem, kernels: Kernels) -> tuple[Forward, Backward | None]:
    """The engine's forward and, for training, backward, which take the vectors of the problem's mask."""
    gathers = problem.mask.kept is not None and not engine.reads_kept
    if gathers:
        problem = problem._replace(mask=problem.mask._replace(kept=None))
    forward = engine.forward(problem, kernels)
    backward = engine.backward(problem, kernels) if problem.train else None
    if not gathers:
        return forward, backward
    return _gathering(forward), None if backward is None else _gathering_backward(backward)


def _gathering(forward: Forward) -> Forward:
    def run(q: Tensor, k: Tensor, v: Tensor, *edges: Tensor) -> tuple[Tensor, Tensor | None]:
        order, lo, hi = _kept_first(*edges)
        return forward(q, _in_order(k, order), _in_order(v, order), lo, hi)

    return run


def _gathering_backward(backward: Backward) -> Backward:
    def run(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *edges: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        order, lo, hi = _kept_first(*edges)
        keys, values = _in_order(k, order), _in_order(v, order)
        grad_q, *grads = backward(grad_out, q, keys, values, out, lse, lo, hi)
        index = order[:, None, :, None].expand(k.shape)
        grad_k, grad_v = (empty_output(k).scatter_(2, index, grad) for grad in grads)
        return grad_q, grad_k, grad_v

    return run


def _kept_first(lo: Tensor, hi: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of keys with the kept ones first, int64 ``[B or 1, kv_len]``; and lo and hi in that order."""
    hidden = kept == 0
    order = torch.argsort(hidden.to(torch.uint8), dim=1, stable=True)
    before = pad((~hidden).cumsum(1, dtype=torch.int32), (1, 0))
    # For a row that sees nothing, lo == kv_len and hi == 0, so lo >= hi still holds.
    lo, hi = (before.gather(1, edge.to(torch.int64)) for edge in (lo, hi))
    empty = lo >= hi
    return order, lo.masked_fill(empty, kept.shape[1]), hi.masked_fill(empty, 0)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand(x.shape))
