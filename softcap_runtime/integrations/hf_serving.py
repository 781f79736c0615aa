"""Transformers' continuous batching (``model.generate_batch``) on this package's kernels.

Its batches are one packed row: new tokens of many requests side by side, each against its own part of the keys that
the paged cache hands out. A request's rows see one run of keys, so the whole batch is one mask of row intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softcap_runtime.checks import Cap
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals, clipped
from softcap_runtime.masks.readable import data_is_readable
from softcap_runtime.runtime import Runtime


class Batch(NamedTuple):
    """How a packed batch is attended to: ``single`` rows first, which are requests with one new token each.

    ``single``, ``rest``: int64 vectors of row numbers, None for all rows. ``single_mask``: ``[requests, 1]``, one
    request a batch row; ``rest_mask``: ``[1, rows]``. None where there are no such rows.
    """

    single: Tensor | None
    single_mask: RowIntervals | None
    rest: Tensor | None
    rest_mask: RowIntervals | None


_batches: WeakKeyDictionary[Any, dict[str, Batch]] = WeakKeyDictionary()


def attend_paged(
    runtime: Runtime,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cap: Cap,
    window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Write the new keys and values to the paged cache, attend to it: ``[1, rows, Hq, D]``.

    ``query`` ``[1, Hq, rows, D]``, ``key`` and ``value`` ``[1, Hkv, rows, D]``; ``kwargs``: what continuous batching
    gives attention functions (``cache``, ``cu_seq_lens_q``, ``cu_seq_lens_k`` by kind of layer, ``read_index``, ...).
    """
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "block_table: tables of transformers' decode fast path have no kernel; set max_blocks_per_request=0 in the "
            "continuous batching config"
        )
    cache = kwargs["cache"]
    allocator = cache.layer_to_allocator[module.layer_idx]
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=dict(kwargs)
    )
    kinds = _batches.setdefault(cache, {})
    kind = allocator.layer_type
    # The first layer of a kind makes the batch for the others: in a CUDA graph too, where the tensors stay the same.
    if module.layer_idx == allocator.layer_indices[0] or kind not in kinds:
        offsets = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][kind]
        kinds[kind] = packed_batch(query.shape[2], key.shape[2], *offsets, kwargs["max_length_q"], window)
    return _attend(runtime, query, key, value, cap, kinds[kind])


def packed_batch(
    rows: int, keys: int, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, max_length_q: int, window: int | None
) -> Batch:
    """Which of ``keys`` keys each of ``rows`` rows sees: those of its request up to its own, at most ``window``.

    ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32 ``[requests + 1]``, where the rows and keys of each request begin; the
    last row of a request stands at its last key. Rows past the last request are padding, and see nothing.
    """
    starts, ends = cu_seq_lens_q[:-1], cu_seq_lens_q[1:]
    numbers = torch.arange(rows, dtype=torch.int32, device=ends.device)
    request = torch.searchsorted(ends, numbers, right=True).clamp(max=ends.shape[0] - 1)
    hi = cu_seq_lens_k[1:][request] - (ends[request] - 1 - numbers)
    lo = torch.maximum(cu_seq_lens_k[:-1][request], hi - min(window or UNBOUNDED, UNBOUNDED))
    hi = torch.where(numbers < ends[-1], hi, 0)
    if data_is_readable(ends):
        alone = (ends - starts == 1)[request] & (numbers < ends[-1])
        single, rest = alone.nonzero()[:, 0], (~alone).nonzero()[:, 0]
    else:  # what all rows are is told by the host; padded batches say nothing of it
        none = numbers[:0]
        all_single = max_length_q == 1 and rows == ends.shape[0]
        single, rest = (numbers, none) if all_single else (none, numbers)

    def mask(chosen: Tensor, shape: tuple[int, int]) -> RowIntervals | None:
        if not len(chosen):
            return None
        return clipped(shape[1], keys, lo[chosen].view(shape), hi[chosen].view(shape))

    whole = len(single) in (0, rows)
    return Batch(
        None if whole else single,
        mask(single, (len(single), 1)),
        None if whole else rest,
        mask(rest, (1, len(rest))),
    )


def _attend(runtime: Runtime, query: Tensor, key: Tensor, value: Tensor, cap: Cap, batch: Batch) -> Tensor:
    single = rest = None
    if batch.single_mask is not None:
        count = batch.single_mask.vectors[0].shape[0]
        q = query if batch.single is None else query[:, :, batch.single]
        k, v = (x.expand(count, -1, -1, -1) for x in (key, value))
        single = runtime.attend(q.transpose(0, 2), k, v, cap, batch.single_mask)[:, :, 0][None]
    if batch.rest_mask is not None:
        q = query if batch.rest is None else query[:, :, batch.rest]
        rest = runtime.attend(q, key, value, cap, batch.rest_mask).transpose(1, 2)
    if single is None or rest is None:
        out = rest if single is None else single
        assert out is not None
        return out
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    out[:, batch.single], out[:, batch.rest] = single, rest
    return out


def admit(name: str) -> None:
    """Have transformers take ``name``, which holds "flash", for an implementation that needs no package.

    Private: ``_lazy_imports``, which looks for a package or a kernel of the hub behind every name with "flash", and
    ``generate_batch`` takes no other names. Where a version has none, transformers itself refuses the name when it is
    given to a model.
    """
    from transformers import modeling_flash_attention_utils as utils

    imports: Callable[..., Any] | None = getattr(utils, "_lazy_imports", None)
    if imports is None or name in getattr(imports, "admitted", ()):
        return

    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation == name:  # no function of a flash package is ever called under it
            return None, None, None, utils._pad_input, utils._unpad_input
        return imports(implementation, *args, **kwargs)

    lazy_imports.admitted = {name, *getattr(imports, "admitted", ())}  # type: ignore[attr-defined]
    utils._lazy_imports = lazy_imports
