"""Transformers' mask functions, evaluated at a few keys: for torch.compile, which cannot read closures.

Each row's visible keys are one run around the row's own position, whose two ends are searched for: every step evaluates
the function at ``FAN - 1`` keys on both sides of each row at once. A mask costs O(rows), and the graph is the same for
any length.
"""

from __future__ import annotations

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
    batch_rows = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    own = (torch.arange(q_len, device=device) + (end - q_len))[None, :, None, None]

    def sees(keys: Tensor) -> Tensor:
        inside = (keys >= 0) & (keys < kv_len)
        # Not keys.clamp(...): with the masks of transformers 5.18, Inductor of torch 2.13 emits the bounds check of an
        # index that is pure arithmetic before the index itself, which does not compile.
        return inside & function(batch_rows, head, own + offset, torch.where(inside, keys, 0) + offset)

    # How many keys beyond its own each row sees without a gap, down and up: [B, q_len, 2, 1].
    ways = torch.arange(-1, 2, 2, device=device)[:, None]
    steps = torch.arange(1, FAN, device=device)
    reach = torch.zeros_like(own)
    for stride in STRIDES:
        probes = reach + stride * steps
        reach = reach + stride * sees(own + ways * probes).sum(-1, keepdim=True)
    seen = sees(own)[..., 0, 0]
    lo = torch.where(seen, (own - reach)[..., 0, 0], kv_len)
    hi = torch.where(seen, (own + reach)[..., 1, 0] + 1, 0)
    return clipped(q_len, kv_len, lo.to(torch.int32), hi.to(torch.int32))
