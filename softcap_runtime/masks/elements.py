"""Masks given element by element: read as row intervals if they have that form, else kept as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from softcap_runtime.masks.intervals import RowIntervals, with_kept
from softcap_runtime.masks.readable import data_is_there


def read_elements(mask: Tensor, q: Tensor, kv_len: int, name: str) -> RowIntervals | Tensor:
    """A bool or additive mask as row intervals, or as the result of ``as_additive`` if it does not have that form.

    ``q`` ``[B, H, Sq, D]``; ``name``: the argument, for errors. Raises ValueError or TypeError if the mask does not fit
    ``q`` and ``kv_len``.
    """
    if mask.device != q.device:
        raise ValueError(f"{name}: on {mask.device}, expected Q's {q.device}; move it")
    elements = as_additive(mask, q.shape[2], kv_len, name)
    check_rows_and_heads(elements.shape, q, name)
    # A learned bias stays one, even while all its elements are 0.
    learned = torch.is_grad_enabled() and elements.requires_grad
    found = intervals_of_elements(elements) if data_is_there(elements) and not learned else None
    return elements if found is None else found


def check_rows_and_heads(shape: tuple[int, ...], q: Tensor, name: str) -> None:
    """Raise ValueError unless B and H of ``[B, H, ...]`` are q's or 1."""
    for size, wanted, words in zip(shape[:2], q.shape[:2], ("batch rows", "heads"), strict=True):
        if size not in (1, wanted):
            raise ValueError(f"{name}: {size} {words}, expected 1 or Q's {wanted}")


def as_additive(mask: Tensor, q_len: int, kv_len: int, name: str = "causal_mask") -> Tensor:
    """A bool (True: visible) or additive float mask as ``[B or 1, H or 1, Sq, Skv]``, cut to these lengths.

    ``mask``: ``[Sq, Skv]``, ``[B, Sq, Skv]`` or ``[B, H, Sq, Skv]``. It may be larger: of more than ``q_len`` rows,
    those ``kv_len - q_len`` to ``kv_len`` are taken; of more than ``kv_len`` keys, the first. Raises ValueError or
    TypeError.
    """
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{name}: {mask.dtype}, expected bool (True: visible) or additive floats")
    if not 2 <= mask.dim() <= 4:
        raise ValueError(f"{name}: shape {tuple(mask.shape)}, expected [Sq, Skv] to [B, H, Sq, Skv]")
    while mask.dim() < 4:
        mask = mask[None] if mask.dim() == 2 else mask[:, None]
    rows, keys = mask.shape[2:]
    first = 0 if rows == q_len else kv_len - q_len
    if rows < first + q_len or keys < kv_len:
        raise ValueError(
            f"{name}: {rows} rows and {keys} keys, expected at least {q_len} and {kv_len}; "
            "make it for the longest sequence"
        )
    return mask[:, :, first : first + q_len, :kv_len]


def intervals_of_elements(mask: Tensor) -> RowIntervals | None:
    """The row intervals of ``as_additive``'s result; None if it does not have that form.

    It has if each row sees one run of the keys that any row sees, all heads agree and no visible element has a bias.
    Reads every element and waits for the device.
    """
    if mask.shape[1] > 1:
        return None
    mask = mask[:, 0]
    q_len, kv_len = mask.shape[1:]
    visible = mask
    if mask.dtype != torch.bool:
        visible = ~(mask <= torch.finfo(mask.dtype).min / 2)  # NaN counts as visible, so that it shows in the result
        if bool(mask.masked_fill(~visible, 0).any()):
            return None
    # First and last visible key of each row; argmax gives the first of equal values.
    count = visible.sum(-1, dtype=torch.int32)
    seen = visible.to(torch.uint8)
    lo = seen.argmax(-1).to(torch.int32)
    hi = kv_len - seen.flip(-1).argmax(-1).to(torch.int32)
    empty = count == 0
    lo, hi = lo.masked_fill(empty, kv_len), hi.masked_fill(empty, 0)
    if bool(((hi - lo == count) | empty).all()):
        return RowIntervals(q_len, kv_len, None, None, lo.contiguous(), hi.contiguous())
    kept = visible.any(1)
    before = pad(kept.cumsum(1, dtype=torch.int32), (1, 0))
    between = before.gather(1, hi.to(torch.int64)) - before.gather(1, lo.to(torch.int64))
    if not bool(((between == count) | empty).all()):
        return None
    return with_kept(RowIntervals(q_len, kv_len, None, None, lo.contiguous(), hi.contiguous()), kept)
