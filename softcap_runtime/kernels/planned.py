"""A training call that was made before just so: an autograd function around its plan, and nothing else.

The operator's own function (``operator._Attention``) serves all other calls. What it reads at each call, a plan holds:
checks, mask and engine. On the host a training step so costs little more than its launches.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from softcap_runtime.kernels.engine import Backward, Forward, Problem
from softcap_runtime.torch_transforms import interpreters_active, is_batch_of_gradients


class Plan(Protocol):
    """What of a ``plans.Plan`` is used here."""

    hits: int
    problem: Problem
    forward: Forward
    backward: Backward | None


def attend(plan: Plan, engine: str, server: Any, *tensors: Tensor) -> Tensor:
    """Attention of ``plan``, differentiable, of q, k, v and the edges of its mask.

    ``engine`` is the setting under which ``server``, a runtime, made the plan.
    """
    out: Tensor = _Planned.apply(plan, engine, server, *tensors)  # type: ignore[no-untyped-call]
    return out


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, engine: str, server: Any, *tensors: Tensor) -> Tensor:
        out, lse = plan.forward(*tensors)
        ctx.save_for_backward(*tensors[:3], out, lse, *tensors[3:])
        ctx.how = plan, engine, server
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        plan, engine, server = ctx.how
        edges = saved[5:]
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if watched or interpreters_active(grad_out, *saved) or is_batch_of_gradients(grad_out):
            problem = plan.problem
            mask = (0, 0) if edges else (None, None, problem.mask.left, problem.mask.right)
            how = (*mask, problem.scale, problem.softcap, engine, server.number)
            grads = torch.ops.softcap_runtime.attention_backward(grad_out, *saved, *how)
        else:
            plan.hits += 1
            if grad_out.is_neg() or grad_out.stride(-1) != 1:
                grad_out = grad_out.resolve_neg().contiguous()
            grads = plan.backward(grad_out, *saved)
        return None, None, None, *grads, *(None for _ in edges)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Of forward-mode AD."""
        raise RuntimeError(
            "softcap_runtime::attention has no forward-mode derivative; use softcap_runtime.reference.attention for it"
        )
