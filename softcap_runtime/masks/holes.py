"""Padding masks with holes: row intervals over the keys that are left.

Intervals stay intervals when keys are taken out: lo and hi are renumbered by the count of kept keys before them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from softcap_runtime.masks.intervals import RowIntervals, clipped, edges
from softcap_runtime.masks.validate import data_is_readable, has_holes


def may_have_holes(attention_mask: Tensor) -> bool:
    """Whether a mask ``[B, kv_len]`` can't be told to be one run of keys in each row.

    A GPU's data is not looked at, which would wait for it. In a traced graph on the CPU
    ``validate.check_mask_arguments`` has the graph refuse holes.
    """
    if attention_mask.device.type != "cpu":
        return True
    return data_is_readable(attention_mask) and has_holes(attention_mask)


def without_hidden(
    k: Tensor, v: Tensor, mask: RowIntervals, attention_mask: Tensor
) -> tuple[Tensor, Tensor, RowIntervals]:
    """Keys, values and mask with the visible keys of each batch row first and the hidden ones out of all sight.

    ``k``, ``v`` ``[B, Hkv, Skv, D]``; ``attention_mask`` ``[B or 1, Skv]``, 0 hides a key. Copies k and v; reads no
    data on the host.
    """
    kept = attention_mask != 0
    order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
    before = pad(kept.cumsum(1, dtype=torch.int32), (1, 0))
    lo, hi = edges(mask, kept.device)
    rows = max(lo.shape[0], kept.shape[0])
    before = before.expand(rows, -1)
    lo, hi = (before.gather(1, edge.expand(rows, -1).to(torch.int64)) for edge in (lo, hi))
    index = order[:, None, :, None].expand(k.shape)
    return k.gather(2, index), v.gather(2, index), clipped(mask.q_len, mask.kv_len, lo, hi)
