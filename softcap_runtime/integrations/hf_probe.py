"""Transformers' mask functions, evaluated at a few keys: for torch.compile, which cannot read closures.

Each row's visible keys are one run around the row's own position, whose two ends are searched for: every step evaluates
the function at ``FAN - 1`` keys of each row at once. A mask costs O(rows), and the graph is the same for any length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.integrations.hf_mask_functions import MaskFunction, Place
from softcap_runtime.masks.intervals import RowIntervals, clipped

FAN = 64
# Five steps of these strides reach 2**30 keys, as far as a mask can (UNBOUNDED).
STRIDES = tuple(FAN**power for power in (4, 3, 2, 1, 0))


def probe(function: MaskFunction, batch: int, place: Place) -> RowIntervals:
    """The intervals of ``function``, without padding, as ``hf_mask_functions.read`` finds them.

    ``function`` must be transformers' own: gaps between its visible keys would not be noticed here.
    """
    q_len, kv_len, end, offset, _, device = place
    batch_rows = torch.arange(batch, device=device)[:, None, None]
    head = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    own = (torch.arange(q_len, device=device) + (end - q_len))[None, :, None]

    def sees(keys: Tensor) -> Tensor:
        inside = (keys >= 0) & (keys < kv_len)
        # Not keys.clamp(...): with the masks of transformers 5.18, Inductor of torch 2.13 emits the bounds check of an
        # index that is pure arithmetic before the index itself, which does not compile.
        return inside & function(batch_rows, head, own + offset, torch.where(inside, keys, 0) + offset)

    seen = sees(own)
    lo = torch.where(seen, own - _reach(sees, own, -1), kv_len)
    hi = torch.where(seen, own + _reach(sees, own, 1) + 1, 0)
    return clipped(q_len, kv_len, lo[..., 0].to(torch.int32), hi[..., 0].to(torch.int32))


def _reach(sees: Callable[[Tensor], Tensor], own: Tensor, way: int) -> Tensor:
    """How many keys beyond its own each row sees without a gap, downwards (``way`` -1) or upwards (1)."""
    reach = torch.zeros_like(own)
    for stride in STRIDES:
        probes = reach + stride * torch.arange(1, FAN, device=own.device)
        reach = reach + stride * sees(own + way * probes).sum(-1, keepdim=True)
    return reach
