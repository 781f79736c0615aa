"""Packed documents of a layer without a mask, from ``cu_seq_lens_q`` and ``cu_seq_lens_k`` or from ``position_ids``.

Wrappers that spread a sequence over devices drop the mask and keep these. What cannot be read is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcap_runtime.masks.documents import document_ids_from_cu_seqlens, document_ids_from_position_ids
from softcap_runtime.masks.readable import data_is_readable

_INSTEAD = "give the layer its mask (attention_mask)"


def packed_arguments(batch: int, q_len: int, kv_len: int, causal: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``document_ids`` and ``query_positions`` for ``row_intervals``; empty if each row is one document.

    Raises ValueError for offsets or positions that do not determine the documents.
    """
    offsets, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if offsets is not None:
        return _from_offsets(offsets, kwargs.get("cu_seq_lens_k"), batch, q_len, kv_len)
    # In cross attention, positions say nothing about the keys.
    if positions is None or (not causal and q_len != kv_len):
        return {}
    return _from_positions(positions, batch, q_len, kv_len)


def _from_offsets(queries: Tensor, keys: Tensor | None, batch: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
    keys = queries if keys is None else keys
    if batch != 1 or queries.shape != keys.shape:
        raise ValueError(
            f"cu_seq_lens_q: {tuple(queries.shape)} and cu_seq_lens_k: {tuple(keys.shape)} for {batch} batch rows, "
            f"expected offsets of the same documents in one packed row; {_INSTEAD}"
        )
    try:
        document_ids = document_ids_from_cu_seqlens(keys, kv_len)
        rows = document_ids if keys is queries else document_ids_from_cu_seqlens(queries, q_len)
    except ValueError as error:
        raise ValueError(f"cu_seq_lens_q, cu_seq_lens_k, for {q_len} rows over {kv_len} keys: {error}") from None
    given = {} if keys.shape[0] == 2 else {"document_ids": document_ids}
    if keys is queries or (data_is_readable(keys) and torch.equal(keys, queries)):
        return given
    # The rows of a document stand at its last keys.
    ahead = (keys[1:] - queries[1:])[rows[0].to(torch.int64)]
    return {**given, "query_positions": torch.arange(q_len, device=ahead.device) + ahead}


def _from_positions(positions: Tensor, batch: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
    rows = positions[None] if positions.dim() == 1 else positions
    if rows.dim() != 2 or rows.shape[1] != q_len or rows.shape[0] not in (1, batch):
        raise ValueError(
            f"position_ids: shape {tuple(positions.shape)} without a mask, expected ({batch}, {q_len}), a position for "
            f"each row of the layer; {_INSTEAD}"
        )
    document_ids = document_ids_from_position_ids(rows)
    readable = data_is_readable(rows)
    if q_len == kv_len:
        return {} if readable and not bool(document_ids.any()) else {"document_ids": document_ids}
    # Over a cache, a row of one unpadded document has the number of tokens before it as its position.
    whole = readable and not bool(document_ids.any()) and bool((rows[:, -1] >= kv_len - 1).all())
    if not whole:
        raise ValueError(
            f"position_ids: for {q_len} rows over {kv_len} keys and no mask, expected positions on the CPU that "
            f"continue from the keys before them, as no others tell the documents apart; {_INSTEAD}"
        )
    return {}
