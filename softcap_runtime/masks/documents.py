"""``document_ids`` from FlashAttention's ``cu_seqlens`` or Hugging Face's ``position_ids``.

Contents are checked where the data are: at once on the CPU, in a traced graph when it runs, and on a GPU by the GPU
(``deferred_checks``).
"""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor

from softcap_runtime.masks.deferred_checks import checked
from softcap_runtime.masks.readable import data_is_readable
from softcap_runtime.masks.validate import check_integers

_OFFSETS = "cu_seqlens: expected offsets from 0 that never decrease and end at seq_len; make padding a document too"


def document_ids_from_cu_seqlens(cu_seqlens: Tensor, seq_len: int) -> Tensor:
    """Document ids ``[1, seq_len]``, int32, from the offsets at which documents start, as in FlashAttention.

    ``cu_seqlens``: integers ``[documents + 1]``: 0, the end of the first document, ..., ``seq_len``; equal neighbours
    are empty documents.

    Raises ValueError unless it is a vector of two or more entries that starts at 0, ends at ``seq_len`` and never
    decreases; TypeError unless it holds integers.
    """
    check_integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens.shape)}, expected [documents + 1], at least 2 offsets; "
            "pass the offsets of one packed row"
        )
    if data_is_readable(cu_seqlens):
        _check_offsets(cu_seqlens, seq_len)
    else:
        cu_seqlens = checked(
            cu_seqlens, lambda: rise_from_zero(cu_seqlens) & (cu_seqlens[-1] == seq_len), _OFFSETS, (seq_len,)
        )
    ends = cu_seqlens[1:].to(torch.int64).clamp(0, seq_len)
    marks = torch.zeros(seq_len + 1, dtype=torch.int32, device=ends.device)
    marks.scatter_add_(0, ends, torch.ones_like(ends, dtype=torch.int32))
    return marks[:seq_len].cumsum(0, dtype=torch.int32)[None]


def document_ids_from_position_ids(position_ids: Tensor) -> Tensor:
    """Document ids ``[B, S]``, int32: a document starts wherever a position is not the one before plus 1.

    ``position_ids``: integers ``[B, S]`` in which each document counts from 0, as Hugging Face packs them. Raises
    ValueError for another rank or an empty row, TypeError unless it holds integers.
    """
    check_integers("position_ids", position_ids)
    if position_ids.dim() != 2 or position_ids.shape[1] < 1:
        raise ValueError(
            f"position_ids: shape {tuple(position_ids.shape)}, expected [batch, seq_len] with seq_len >= 1; "
            "add the batch dimension"
        )
    # In uint8 the position after 255 would be 0, where a document starts.
    positions = position_ids.to(torch.int64)
    restarts = positions[:, 1:] != positions[:, :-1] + 1
    return torch.nn.functional.pad(restarts, (1, 0)).cumsum(1, dtype=torch.int32)


def rise_from_zero(offsets: Tensor) -> Tensor:
    """Whether a vector starts at 0 and never decreases: a 0-d bool tensor, which is not read here."""
    return (offsets[1:] >= offsets[:-1]).all() & (offsets[0] == 0)


def _check_offsets(cu_seqlens: Tensor, seq_len: int) -> None:
    if isinstance(seq_len, bool) or not isinstance(seq_len, SupportsIndex):
        raise TypeError(f"seq_len: {seq_len!r}, expected an integer")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens: starts at {offsets[0]}, expected 0; put the first offset in front")
    if offsets[-1] != seq_len:
        raise ValueError(
            f"cu_seqlens: ends at {offsets[-1]}, expected seq_len {seq_len}; make padding a document of its own"
        )
    for index in range(1, len(offsets)):
        if offsets[index] < offsets[index - 1]:
            raise ValueError(
                f"cu_seqlens: {offsets[index]} after {offsets[index - 1]} at index {index}, expected offsets "
                "that never decrease; pass cumulative lengths, not lengths"
            )
