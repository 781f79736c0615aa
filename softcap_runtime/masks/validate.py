"""Checks of mask arguments, before any kernel runs: one line that names the argument and its value.

Shapes, dtypes and devices are always checked. Contents are checked where the data are: at once on the CPU; as a part
of the graph, with a shorter message, when traced or under torch.func; on a GPU by the GPU, without waiting for it
(``deferred_checks``). docs/reference/masks.md lists the checks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcap_runtime.checks import OTHER_LAYOUT
from softcap_runtime.masks.deferred_checks import checked, next_to
from softcap_runtime.masks.intervals import RowIntervals
from softcap_runtime.masks.padding import runs_of
from softcap_runtime.masks.readable import data_is_readable

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ZEROS_AND_ONES = "attention_mask: other numbers than 0 (padding) and 1; pass mask != 0 if that is meant"
_DOCUMENTS = "document_ids: decreasing, expected ids that never decrease; number them in the row's order"
_SPANS = (
    "spans: out of range or overlapping, expected disjoint ones with 0 <= start < end <= the number of keys, or "
    "start == end for an unused slot"
)


def check_mask_arguments(
    q_len: int,
    kv_len: int,
    batch: int,
    device: torch.device,
    *,
    causal: bool,
    holes: bool = False,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    spans: Tensor | None = None,
    cache_lengths: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``intervals.row_intervals``, which documents them; returns the checked arguments.

    Use the results in their place, so that a traced graph keeps the checks. ``holes``: whether the caller serves an
    ``attention_mask`` with several runs of 1, which is no row interval; if not, masks must be on the CPU, outside of
    graphs.

    Raises TypeError for anything but a tensor of the right dtype. Raises ValueError for a shape other than the
    documented one (with 1 or ``batch`` batch rows), for another device than ``device``, for more queries than keys
    where every query needs a position among the keys, and for contents that no mask can have.
    """
    placed = query_positions is not None
    if causal and q_len > kv_len and not placed:
        hint = f"; {OTHER_LAYOUT}" if kv_len and q_len % kv_len == 0 else ""  # like query heads and key heads
        raise ValueError(
            f"q: {q_len} rows over {kv_len} keys with causal=True, expected at most as many rows as keys; "
            f"pass the keys of the earlier tokens too, query_positions, or causal=False{hint}"
        )
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask, batch, (kv_len,), device, (torch.bool, *_INTEGERS))
        if data_is_readable(attention_mask):
            _check_zeros_and_ones(attention_mask)
            if not holes:
                _check_runs(attention_mask)
        elif attention_mask.dtype != torch.bool:
            shown = attention_mask
            attention_mask = checked(shown, lambda: (shown == 0) | (shown == 1), _ZEROS_AND_ONES)
    if document_ids is not None:
        _check_tensor("document_ids", document_ids, batch, (kv_len,), device, _INTEGERS)
        if q_len > kv_len and not placed:
            raise ValueError(
                f"document_ids: {kv_len} ids for {q_len} query rows, expected one for every row; "
                "packed sequences need the keys of all their queries"
            )
        if data_is_readable(document_ids):
            _check_documents(document_ids)
        else:
            ids = document_ids
            document_ids = checked(ids, lambda: next_to(ids, torch.ge), _DOCUMENTS)
    if prefix_lengths is not None:
        _check_tensor("prefix_lengths", prefix_lengths, batch, (), device, _INTEGERS)
        words = "between 0 and the number of keys"
        prefix_lengths = _check_range("prefix_lengths", prefix_lengths, 0, kv_len, words)
    if spans is not None:
        count = spans.shape[1] if isinstance(spans, Tensor) and spans.dim() == 3 else -1
        _check_tensor("spans", spans, batch, (count, 2), device, _INTEGERS)
        if data_is_readable(spans):
            _check_spans(spans, kv_len)
        else:
            slots = spans
            spans = checked(slots, lambda: _spans_fit(slots, kv_len), _SPANS, (kv_len,))
    if cache_lengths is not None:
        _check_tensor("cache_lengths", cache_lengths, batch, (), device, _INTEGERS)
        words = f"from {'0' if placed else 'the number of query rows'} to the number of keys"
        cache_lengths = _check_range("cache_lengths", cache_lengths, 0 if placed else q_len, kv_len, words)
    if query_positions is not None:
        query_positions = _check_query_positions(query_positions, q_len, kv_len, batch, device)
    return {
        "attention_mask": attention_mask,
        "document_ids": document_ids,
        "prefix_lengths": prefix_lengths,
        "spans": spans,
        "cache_lengths": cache_lengths,
        "query_positions": query_positions,
    }


def check_row_intervals(mask: RowIntervals, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless the mask's lengths and vectors fit ``q`` and ``k`` ``[B, H, S, D]``.

    Kernels do not check the vectors' sizes: with a wrong one they would read out of bounds.
    """
    lengths = (q.shape[2], k.shape[2])
    if (mask.q_len, mask.kv_len) != lengths:
        raise ValueError(
            f"mask: made for {mask.q_len} queries over {mask.kv_len} keys, expected {lengths[0]} over {lengths[1]}"
        )
    batches = [1] if q.shape[0] == 1 else [1, q.shape[0]]
    if mask.lo is not None and mask.lo.shape[:1] in [(batch,) for batch in batches]:
        batches = [mask.lo.shape[0]]  # hi and kept have as many rows as lo
    sizes = mask.q_len, mask.q_len, mask.kv_len
    for name, vector, size in zip(("lo", "hi", "kept"), mask.vectors, sizes, strict=False):
        wanted = [(batch, size) for batch in batches]
        if vector.shape not in wanted or (vector.dtype, vector.device) != (torch.int32, q.device):
            raise ValueError(
                f"mask.{name}: {vector.dtype} {tuple(vector.shape)} on {vector.device}, expected int32 "
                f"{' or '.join(map(str, wanted))} on {q.device}; make it for this batch and these lengths"
            )


def check_integers(name: str, tensor: Any) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of integers."""
    _check_dtype(name, tensor, _INTEGERS)


def _check_dtype(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    expected = "bool or integers 0 and 1" if torch.bool in dtypes else "integers"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}, expected a tensor of {expected}; use torch.tensor(...)")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: {tensor.dtype}, expected {expected}; convert it")


def _check_tensor(
    name: str, tensor: Any, batch: int, shape: tuple[int, ...], device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    _check_dtype(name, tensor, dtypes)
    # Size by size: to dynamo a symbol in a tuple never equals a number.
    fits = tensor.dim() == 1 + len(shape) and all(tensor.shape[1 + at] == size for at, size in enumerate(shape))
    if not fits or (tensor.shape[0] != 1 and tensor.shape[0] != batch):
        rest = "".join(", slots" if size < 0 else f", {size}" for size in shape)
        wanted = f"({batch}{rest})" if batch == 1 else f"({batch}{rest}), or (1{rest}) for all batch rows"
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {wanted}; q and k are [B, H, S, D]")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, expected {device} as q; move it with .to({str(device)!r})")


def _check_range(name: str, lengths: Tensor, low: int, high: int, words: str) -> Tensor:
    if not data_is_readable(lengths):
        message = f"{name}: out of range, expected {words}"
        return checked(lengths, lambda: (lengths >= low) & (lengths <= high), message, (low, high))
    for row, length in enumerate(lengths.tolist()):
        if not low <= length <= high:
            raise ValueError(f"{name}: {length} in batch row {row}, expected {low} to {high}, {words}")
    return lengths


def _check_query_positions(positions: Tensor, q_len: int, kv_len: int, batch: int, device: torch.device) -> Tensor:
    shared = isinstance(positions, Tensor) and positions.dim() == 1
    rows = positions[None] if shared else positions
    _check_tensor("query_positions", rows, batch, (q_len,), device, _INTEGERS)
    if not data_is_readable(positions):
        message = "query_positions: out of range, expected 0 to the number of keys - 1"
        return checked(positions, lambda: (positions >= 0) & (positions < kv_len), message, (kv_len,))
    inside = (rows >= 0) & (rows < kv_len)
    if not bool(inside.all()):
        row, index = (int(at) for at in (~inside).nonzero()[0])
        raise ValueError(
            f"query_positions: {int(rows[row, index])} for query row {index} of batch row {row}, expected 0 to "
            f"{kv_len - 1}, the place of the row's own key among the {kv_len} keys"
        )
    return positions


def _check_zeros_and_ones(attention_mask: Tensor) -> None:
    if attention_mask.dtype == torch.bool:
        return
    if not torch.equal((attention_mask != 0).to(attention_mask.dtype), attention_mask):
        bad = attention_mask[(attention_mask != 0) & (attention_mask != 1)][0].item()
        raise ValueError(f"attention_mask: {bad}, expected 0 (padding) or 1; pass mask != 0 if that is meant")


def _check_runs(attention_mask: Tensor) -> None:
    runs = runs_of(attention_mask)
    if bool((runs > 1).any()):
        row = int(runs.argmax())
        raise ValueError(
            f"attention_mask: {int(runs[row])} separate runs of 1 in batch row {row}, expected one, with padding "
            "before or after it"
        )


def _check_documents(document_ids: Tensor) -> None:
    drops = document_ids[:, 1:] < document_ids[:, :-1]
    if bool(drops.any()):
        row, key = (int(index) for index in drops.nonzero()[0])
        before, after = document_ids[row, key : key + 2].tolist()
        raise ValueError(
            f"document_ids: {after} after {before} at position {key + 1} of batch row {row}, expected ids "
            "that never decrease; number the documents in the order of the row"
        )


def _check_spans(spans: Tensor, kv_len: int) -> None:
    for row, slots in enumerate(spans.tolist()):
        past = 0
        for start, end in sorted(slot for slot in slots if slot[0] != slot[1]):
            if not 0 <= start < end <= kv_len:
                raise ValueError(
                    f"spans: [{start}, {end}) in batch row {row}, expected 0 <= start < end <= {kv_len}, or "
                    "start == end for an unused slot"
                )
            if start < past:
                raise ValueError(
                    f"spans: [{start}, {end}) in batch row {row} overlaps one that ends at {past}, expected "
                    "disjoint spans; join them"
                )
            past = end


def _spans_fit(spans: Tensor, kv_len: int) -> Tensor:
    """Whether ``_check_spans`` would find nothing, without reading the data: bool ``[B]``."""
    start, end = spans.to(torch.int64).unbind(-1)
    used = start != end
    start, order = torch.where(used, start, kv_len).sort(1)
    end = torch.where(used, end, kv_len).gather(1, order)
    inside = (start >= 0) & (start <= end) & (end <= kv_len)
    return inside.all(1) & (start[:, 1:] >= end[:, :-1]).all(1)
