"""Masks given element by element: read as row intervals where they are some, kept as they are where not."""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime.masks.intervals import RowIntervals


def as_additive(mask: Tensor, q_len: int, kv_len: int) -> Tensor:
    """A bool (True: visible) or additive float mask as ``[B or 1, H or 1, Sq, Skv]``, cut to these lengths.

    ``mask``: ``[Sq, Skv]``, ``[B, Sq, Skv]`` or ``[B, H, Sq, Skv]``; sizes may be larger. Of more rows than
    ``q_len`` those that end at key ``kv_len`` are taken, of more keys the first. Raises ValueError or TypeError.
    """
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"causal_mask: {mask.dtype}, expected bool (True: visible) or additive floats")
    if not 2 <= mask.dim() <= 4:
        raise ValueError(f"causal_mask: shape {tuple(mask.shape)}, expected [Sq, Skv] to [B, H, Sq, Skv]")
    while mask.dim() < 4:
        mask = mask[None] if mask.dim() == 2 else mask[:, None]
    rows, keys = mask.shape[2:]
    first = 0 if rows == q_len else kv_len - q_len
    if rows < first + q_len or keys < kv_len:
        raise ValueError(
            f"causal_mask: {rows} rows and {keys} keys, expected at least {q_len} and {kv_len}; "
            "make it for the longest sequence"
        )
    return mask[:, :, first : first + q_len, :kv_len]


def intervals_of_elements(mask: Tensor) -> RowIntervals | None:
    """The row intervals of ``as_additive``'s result, or None when it is not that simple.

    It is when each row sees one run of keys, no head differs and no visible element carries a bias. Costs one look
    at every element and waits for the device.
    """
    if mask.shape[1] > 1:
        return None
    mask = mask[:, 0]
    q_len, kv_len = mask.shape[1:]
    visible = mask
    if mask.dtype != torch.bool:
        visible = ~(mask <= torch.finfo(mask.dtype).min / 2)  # a NaN hides nothing: it is to come out as NaN
        if bool(mask.masked_fill(~visible, 0).any()):
            return None
    # First and last visible key of each row; argmax gives the first of equal values.
    count = visible.sum(-1, dtype=torch.int32)
    seen = visible.to(torch.uint8)
    lo = seen.argmax(-1).to(torch.int32)
    hi = kv_len - seen.flip(-1).argmax(-1).to(torch.int32)
    empty = count == 0
    if not bool(((hi - lo == count) | empty).all()):
        return None
    lo, hi = lo.masked_fill(empty, kv_len), hi.masked_fill(empty, 0)
    return RowIntervals(q_len, kv_len, None, None, lo.contiguous(), hi.contiguous())
