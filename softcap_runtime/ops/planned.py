"""A training call whose plan is known: an autograd function around the plan, and nothing else.

The operator's own function (``operator._Attention``) serves all other calls. The plan already covers its checks, mask
and engine, so that on the host a training step costs little more than its launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcap_runtime.compat.torch_transforms import interpreters_active, is_batch_of_gradients


def attend(plan: Any, engine: str, server: Any, q: Tensor, k: Tensor, v: Tensor, *edges: Tensor) -> Tensor:
    """Differentiable attention by ``plan``, a ``plans.Plan``, which ``server``, a runtime, made for ``engine``."""
    out: Tensor = _Planned.apply(plan, engine, server, q, k, v, *edges)  # type: ignore[no-untyped-call]
    return out


def rows_together(x: Tensor) -> Tensor:
    """``x``, copied if its last stride is not 1 or it is a lazy negative: kernels take any other strides."""
    if x.stride(3) == 1 and not x.is_neg():
        return x
    return x.resolve_neg().contiguous()


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Any, engine: str, server: Any, q: Tensor, k: Tensor, v: Tensor, *edges: Tensor
    ) -> Tensor:
        q, k, v = rows_together(q), rows_together(k), rows_together(v)
        out, lse = plan.forward(q, k, v, *edges)
        ctx.save_for_backward(q, k, v, out, lse, *edges)
        ctx.how = plan, engine, server
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan, engine, server = ctx.how
        saved = ctx.saved_tensors
        no_edges = (None,) * (len(saved) - 5)
        if grad_out is None:
            return (None,) * 6 + no_edges
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if watched or interpreters_active(grad_out, *saved) or is_batch_of_gradients(grad_out):
            problem = plan.problem
            left, right = problem.mask.left, problem.mask.right
            lo, hi, kept = (*saved[5:], None, None, None)[:3]
            band = (0, 0) if left is None or right is None else (left, right)
            how = (lo, hi, *band, problem.scale, problem.softcap, engine, server.number, kept)
            grads = torch.ops.softcap_runtime.attention_backward(grad_out, *saved[:5], *how)
        else:
            plan.hits += 1
            grads = plan.backward(rows_together(grad_out), *saved)
        return None, None, None, *grads, *no_edges

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Never called: under forward-mode AD, calls go through the operator."""
        raise RuntimeError("softcap_runtime: no forward-mode derivative of a planned call")
