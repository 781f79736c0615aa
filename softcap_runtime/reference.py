"""The specification: dense softcapped attention in plain torch, any float dtype up to float64.

    s_ij  = softcap * tanh(scale * <q_i, k_j> / softcap)      (no tanh when softcap is None)
    out_i = sum_j softmax_j(s_ij over the visible j) * v_j    (a row that sees nothing is 0)

Every engine is tested against these lines; nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(lo: Tensor, hi: Tensor, kv_len: int) -> Tensor:
    """Row intervals as a dense mask: bool ``[B, Sq, Skv]``, True where row i sees key j, ``lo_i <= j < hi_i``.

    ``lo``, ``hi``: integer tensors ``[B, Sq]``.
    """
    keys = torch.arange(kv_len, device=lo.device)
    return (keys >= lo[..., None]) & (keys < hi[..., None])


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | Tensor, softcap: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softcapped attention and its logsumexp, differentiable.

    ``q`` ``[B, Hq, Sq, D]``, ``k`` and ``v`` ``[B, Hkv, Skv, D]`` with Hq a multiple of Hkv; ``mask`` bool
    ``[B or 1, Sq, Skv]`` (True: visible) or None. Returns out ``[B, Hq, Sq, D]`` in q's dtype and the
    logsumexp of the visible logits ``[B, Hq, Sq]`` (float32, or float64 for float64 inputs; -inf for a row that
    sees nothing). The softmax is computed in float32 at least.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q @ k.mT) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        return torch.softmax(logits, -1).to(v.dtype) @ v, torch.logsumexp(logits, -1)
    hidden = ~mask[:, None]
    empty = hidden.all(-1, keepdim=True)
    # A row of -inf has no softmax; give it finite logits and zero its weights instead, so gradients stay 0.
    logits = logits.masked_fill(hidden, -torch.inf).masked_fill(empty, 0.0)
    weights = torch.softmax(logits, -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(logits, -1).masked_fill(empty[..., 0], -torch.inf)
    return weights.to(v.dtype) @ v, lse
