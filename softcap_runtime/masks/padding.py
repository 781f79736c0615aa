"""Padding masks ``[B, kv_len]``, bool or 0/1: the first and last visible key, and whether there are holes between."""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime.masks.readable import data_is_readable


def padding_edges(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first visible key and one past the last, int32 ``[B, 1]``; (kv_len, 0) for a row without any."""
    kv_len = attention_mask.shape[1]
    keys = torch.arange(kv_len, dtype=torch.int32, device=attention_mask.device)
    hidden = attention_mask == 0
    first = keys.masked_fill(hidden, kv_len).amin(1, keepdim=True)
    last = keys.masked_fill(hidden, -1).amax(1, keepdim=True) + 1
    return first, last


def may_have_holes(attention_mask: Tensor) -> bool:
    """Whether a row of a mask ``[B, kv_len]`` may have more than one run of keys.

    True where the data cannot be read: on a GPU, which would have to be waited for, and in a traced graph.
    """
    return not data_is_readable(attention_mask) or has_holes(attention_mask)


def has_holes(attention_mask: Tensor) -> bool:
    """Whether any row of a mask ``[B, kv_len]`` has more than one run of keys; reads the data."""
    return bool((runs_of(attention_mask) > 1).any())


def runs_of(attention_mask: Tensor) -> Tensor:
    """The number of runs of visible keys in each row: int32 ``[B]``."""
    seen = attention_mask != 0
    return (seen[:, 1:] & ~seen[:, :-1]).sum(1, dtype=torch.int32) + seen[:, 0]
