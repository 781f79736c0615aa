"""Masks that are no row intervals: any mask element by element, and any ``BlockMask`` through flex itself.

They cost S x S elements, or one compilation per process, mask function and softcap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def attend_elements(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, softcap: float | None, dropout: float = 0.0
) -> Tensor:
    """Attention under ``mask`` ``[B or 1, H or 1, Sq, Skv]``, bool (True: visible) or added after the softcap.

    ``dropout``: the probability that a weight is set to 0; the others are scaled by ``1 / (1 - dropout)``. Plain torch,
    differentiable, in float32 at least; a row that sees nothing gives 0. Returns ``[B, Hq, Sq, D]`` in q's dtype, laid
    out ``[B, Sq, Hq, D]`` in memory.
    """
    with torch.autocast(q.device.type, enabled=False):  # the inputs are cast already, the sums stay float32
        wide = torch.promote_types(q.dtype, torch.float32)
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
        logits = (q.to(wide) @ keys.mT) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask.dtype == torch.bool:
            hidden = ~mask
        else:
            hidden = mask <= torch.finfo(mask.dtype).min / 2
            logits = logits + mask.to(wide).masked_fill(hidden, 0.0)
        empty = hidden.all(-1, keepdim=True)
        logits = logits.masked_fill(hidden, -torch.inf).masked_fill(empty, 0.0)
        weights = torch.softmax(logits, -1).masked_fill(empty, 0.0)
        if dropout:
            weights = torch.dropout(weights, dropout, True)
        return (weights @ values).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def attend_block_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, scale: float, softcap: float | None
) -> Tensor:
    """Attention under a caller's ``BlockMask``, by flex compiled in this process.

    Raises torch's error at its recompile limit, rather than falling back to the unfused path.
    """
    flex = _compiled_flex()
    out: Tensor = flex(q, k, v, score_mod=_score_mod(softcap, q.device), block_mask=mask, scale=scale, enable_gqa=True)
    return out


def elements_of(mask: BlockMask, q: Tensor, k: Tensor) -> Tensor:
    """Every element of a ``BlockMask``: bool ``[B or 1, H or 1, Sq, Skv]``, without compiling."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.shape[:2]
    elements: Tensor = create_mask(mask.mask_mod, batch, heads, q.shape[2], k.shape[2], device=str(q.device))
    return elements


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@functools.lru_cache(maxsize=64)
def _score_mod(softcap: float | None, device: torch.device) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None
    # A tensor: with dynamic sizes a Python number becomes a symbol here, which fails to lower.
    cap = torch.tensor(softcap, device=device)

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped
