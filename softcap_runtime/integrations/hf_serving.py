"""Transformers' continuous batching (``model.generate_batch``) on this package's kernels.

A batch is one packed row: new tokens of many requests side by side, each with its own part of the keys that the paged
cache returns. A request's rows see one run of keys, so the whole batch has one mask of row intervals.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as cached
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softcap_runtime.checks import Cap
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals
from softcap_runtime.masks.readable import data_is_readable
from softcap_runtime.runtime import Runtime


class Run(NamedTuple):
    """Rows ``[first, past)`` of a packed batch, which are computed at once, and their mask.

    ``mask``: ``[1, rows]``, or ``[rows, 1]`` if each row is a request of its own, with one new token.
    """

    first: int
    past: int
    mask: RowIntervals


class Layers(NamedTuple):
    """For one cache: each layer's kind and the first layer of that kind; for each kind, the current batch."""

    kinds: dict[int, tuple[str, int]]
    batches: dict[str, list[Run]]


_layers: WeakKeyDictionary[Any, Layers] = WeakKeyDictionary()


@cached
def outside_of_graphs() -> Callable[..., Tensor]:
    """``attend_paged`` outside of compiled graphs, as it writes to the cache in place."""
    return torch.compiler.disable(attend_paged)


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
    """Write the new keys and values to the paged cache and attend to it: ``[1, rows, Hq, D]``.

    ``query`` ``[1, Hq, rows, D]``, ``key`` and ``value`` ``[1, Hkv, rows, D]``. ``kwargs``: what continuous batching
    passes to attention functions: ``cache``, ``cu_seq_lens_q``, ``cu_seq_lens_k`` (by kind of layer if there are two),
    ``read_index`` and others.
    """
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "block_table: tables of transformers' decode fast path have no kernel; set max_blocks_per_request=0 in the "
            "continuous batching config"
        )
    cache, layer = kwargs["cache"], module.layer_idx
    key, value = _updated(cache, layer, key, value, kwargs)
    known = _layers.get(cache)
    if known is None:
        known = _layers[cache] = Layers(_kinds_of(cache), {})
    kind, first = known.kinds[layer]
    # The first layer of a kind makes the batch for the others, in a CUDA graph too, where the tensors stay the same.
    if layer == first or kind not in known.batches:
        ends = kwargs["cu_seq_lens_k"]
        offsets = kwargs["cu_seq_lens_q"], ends if isinstance(ends, Tensor) else ends[kind]
        longest = kwargs.get("max_length_q") or kwargs["max_seqlen_q"]  # transformers to 5.18
        known.batches[kind] = packed_batch(query.shape[2], key.shape[2], *offsets, longest, window)
    return _attend(runtime, query, key, value, cap, known.batches[kind])


def _updated(cache: Any, layer: int, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The keys and values of all requests, ``[1, Hkv, keys, D]``, once the new ones are in the cache."""
    new = "kwargs" in _arguments_of(type(cache).update)
    indices = {"kwargs": dict(kwargs)} if new else {name: kwargs[name] for name in ("read_index", "write_index")}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, **indices)
    if new:
        return key, value
    # transformers to 5.18 returns them as they lie: [keys, Hkv, D].
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


@cached
def _arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _kinds_of(cache: Any) -> dict[int, tuple[str, int]]:
    """The kind of each layer, as ``cu_seq_lens_k`` names it, and the first layer of that kind."""
    allocators = getattr(cache, "cache_allocators", None)
    if allocators is not None:
        kinds = {kind: allocator.layer_indices for kind, allocator in allocators.items()}
    else:  # transformers 5.17: the window of each layer, 1 for none
        kinds = {"full_attention": [], "sliding_attention": []}
        for layer, window in cache.sliding_windows.items():
            kinds["full_attention" if window == 1 else "sliding_attention"].append(layer)
    return {layer: (kind, min(layers)) for kind, layers in kinds.items() for layer in layers}


def packed_batch(
    rows: int, keys: int, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, max_length_q: int, window: int | None
) -> list[Run]:
    """The runs of a batch of ``rows`` rows over ``keys`` keys: each row sees its request's keys up to its own, at most
    ``window`` of them.

    Adjacent requests with one new token each form a run, and so do adjacent other requests.

    ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32 ``[requests + 1]``, the offsets at which the rows and keys of each
    request begin; the last row of a request stands at its last key. Rows past the last request are padding, and see
    nothing.
    """
    starts, ends, row_ends = cu_seq_lens_k[:-1], cu_seq_lens_k[1:], cu_seq_lens_q[1:]

    def run(first: int, past: int, request: int | None = None) -> Run:
        """A run of these rows; with ``request``, they are one row each of the requests from there on."""
        count = past - first
        if request is not None:
            shape, of = (count, 1), slice(request, request + count)
            lo, hi = starts[of].clone(), ends[of].clone()  # kernels need vectors aligned to 16 bytes
        else:
            shape = (1, count)
            numbers = torch.arange(first, past, dtype=torch.int32, device=ends.device)
            at = torch.searchsorted(row_ends, numbers, right=True).clamp(max=ends.shape[0] - 1)
            shown = numbers < row_ends[-1]
            lo = torch.where(shown, starts[at], keys)
            hi = torch.where(shown, ends[at] - (row_ends[at] - 1 - numbers), 0)
        if window is not None:
            lo = torch.maximum(lo, hi - min(window, UNBOUNDED))
        return Run(first, past, RowIntervals(shape[1], keys, None, None, lo.view(shape), hi.view(shape)))

    # Offsets on a GPU are not read: all rows are one run, of single rows if the sizes tell (with padding they do not).
    if not data_is_readable(cu_seq_lens_q):
        return [run(0, rows, 0 if max_length_q == 1 and rows == ends.shape[0] else None)]
    runs, row, request = [], 0, 0
    for single, group in groupby(cu_seq_lens_q.diff().tolist(), (1).__eq__):
        counts = list(group)
        if any(counts):
            runs.append(run(row, row + sum(counts), request if single else None))
        row, request = row + sum(counts), request + len(counts)
    return [*runs, run(row, rows)] if row < rows else runs


def _attend(runtime: Runtime, query: Tensor, key: Tensor, value: Tensor, cap: Cap, runs: list[Run]) -> Tensor:
    outs = []
    for first, past, mask in runs:
        q = query if len(runs) == 1 else query[:, :, first:past]
        if mask.q_len < past - first:  # each row is a batch row of one
            k, v = key.expand(past - first, -1, -1, -1), value.expand(past - first, -1, -1, -1)
            out = runtime.attend_checked(q.transpose(0, 2), k, v, cap, mask)
            out = out.view(1, past - first, *out.shape[1::2])
        else:
            out = runtime.attend_checked(q, key, value, cap, mask).transpose(1, 2)
        outs.append(out)
    return outs[0] if len(runs) == 1 else torch.cat(outs, 1)


def admit(name: str) -> None:
    """Make transformers accept ``name``, which contains "flash", as an implementation that needs no package.

    ``generate_batch`` takes only names with "flash", and transformers looks for a package or hub kernel of that name.
    Private: ``_lazy_imports``, which does so. If a version has no such function, transformers itself refuses the name
    when it is given to a model.
    """
    from transformers import modeling_flash_attention_utils as utils

    imports: Callable[..., Any] | None = getattr(utils, "_lazy_imports", None)
    if imports is None or name in getattr(imports, "admitted", ()):
        return

    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation == name:  # its flash functions are never called
            return None, None, None, utils._pad_input, utils._unpad_input
        return imports(implementation, *args, **kwargs)

    lazy_imports.admitted = {name, *getattr(imports, "admitted", ())}  # type: ignore[attr-defined]
    utils._lazy_imports = lazy_imports
