"""Padding masks and document ids as kernels read them: their dtypes and strides."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# ``masks.row_intervals`` and its checks as one kernel, for warm calls with a padding mask or document ids. It takes the
# batch, q_len, kv_len, causal, window, attention_mask and document_ids; either of the last two may be None. It returns
# the vectors of a ``RowIntervals``; empty for a mask that hides nothing of the band; None for masks that it does not
# serve, which includes invalid ones if their data can be read.
FindIntervals = Callable[
    [int, int, int, bool, "int | None", "Tensor | None", "Tensor | None"], "tuple[Tensor, ...] | None"
]
# The kind of a tensor's numbers, and its stride from one batch row to the next, 0 if all share one row.
Tokens = tuple[int, int]
NO_TOKENS: Tokens = (0, 0)


def tokens_of(
    sizes: tuple[int, int, int],
    causal: bool,
    device: torch.device,
    *given: tuple[Tensor | None, Mapping[torch.dtype, int]],
) -> tuple[int, Tokens, Tokens] | None:
    """How many batch rows an attention mask and document ids have together, and the layout of each.

    ``sizes``: batch, q_len, kv_len. ``given``: the two, each with the kinds of numbers that the kernel reads, by dtype.
    None for what no kernel reads: other dtypes, wrong shapes, another device, strides along the keys.
    """
    batch, q_len, kv_len = sizes
    rows, found = 1, []
    for tensor, kinds in given:
        if tensor is None:
            found.append(NO_TOKENS)
            continue
        if type(tensor) is not Tensor or tensor.device != device or tensor.layout is not torch.strided:
            return None
        shape, kind = tensor.shape, kinds.get(tensor.dtype)
        if kind is None or len(shape) != 2 or shape[1] != kv_len or shape[0] not in (1, batch):
            return None
        step, inner = tensor.stride()
        if inner != 1:
            return None
        several = shape[0] > 1
        rows = shape[0] if several else rows
        found.append((kind, step if several else 0))
    shown, ids = found
    if shown == ids == NO_TOKENS or (q_len > kv_len and (causal or ids != NO_TOKENS)):
        return None
    return rows, shown, ids
