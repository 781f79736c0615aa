"""``context_mask``: plans what each rank sends, receives and computes for the mask of a batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from softcap_runtime.checks import check_config, check_type
from softcap_runtime.config import AttentionConfig, checked_count
from softcap_runtime.distributed.agree import agree, digest, digest_of
from softcap_runtime.distributed.layout import SequenceLayout, check_mesh
from softcap_runtime.distributed.ranges import (
    Ranges,
    common,
    keys_seen,
    length,
    merged,
    pairs_of,
    placed,
    renumbered,
    rows_within,
)
from softcap_runtime.engines.engine import Call
from softcap_runtime.masks.intervals import RowIntervals, row_intervals
from softcap_runtime.masks.validate import check_mask_arguments
from softcap_runtime.plans import Server

Method = Literal["auto", "keys", "heads"]


# A rank's inner rows are computed separately only if they have at least this share of its pairs: a few of them hide
# less time than two calls and joining their outputs cost.
LEAST_INNER = 1 / 8


class Part(NamedTuple):
    """Adjacent keys: rows ``start`` to ``end`` of those that arrived, in the order of ranks, or of this rank's own."""

    arrived: bool
    start: int
    end: int


class KeyPlan(NamedTuple):
    """One rank's part in the keys method.

    Its inner rows see only this rank's keys; they are computed while the other ranks' keys arrive, which its outer rows
    see too. The gradients of all rows are computed together.

    ``sent``: for each rank, which of this rank's rows it is sent. ``received``: for each rank, how many rows it sends.
    ``silent``: whether no rank sends anything.
    ``rows``: the numbers of outer rows before the inner ones, of inner rows, and of outer rows behind them. ``inner``:
    the mask of the inner rows over all keys of this rank. ``outer``: the mask of the outer rows over ``outer_keys``,
    which they see, in the sequence's order. Either mask is None if there are no such rows. ``every``: the mask of all
    rows over ``keys``, which include all that they see.
    """

    sent: list[Ranges]
    received: list[int]
    silent: bool
    rows: tuple[int, int, int]
    inner: RowIntervals | None
    outer: RowIntervals | None
    outer_keys: list[Part]
    every: RowIntervals
    keys: list[Part]

    def masks(self, train: bool) -> tuple[RowIntervals, ...]:
        """A mask for each kernel call."""
        every = self.every if train else None
        return tuple(mask for mask in (self.inner, self.outer, every) if mask is not None)


class HeadPlan(NamedTuple):
    """The heads method: the sizes of every rank's ``pieces`` of rows, and their ``order`` in the sequence.

    ``back``: the place of each rank's pieces in that order. ``rows``: how many rows each rank holds.
    """

    pieces: list[list[int]]
    order: list[int]
    sorted_pieces: list[int]
    back: list[int]
    rows: list[int]


@dataclass(frozen=True, eq=False)
class ContextMask:
    """The mask of a sequence over the ranks of a mesh; made by ``context_mask``, once per batch.

    ``pairs``: for each rank, the visible pairs of a row and a key that it computes per head, over the mask's batch rows
    (in the heads method: all pairs times its share of the heads).
    """

    config: AttentionConfig
    layout: SequenceLayout
    mesh: DeviceMesh
    method: Method
    rank: int
    pairs: tuple[float, ...]
    key_rows: tuple[int, ...]
    by_keys: KeyPlan | None
    by_heads: HeadPlan | None
    whole: RowIntervals

    def received_bytes(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, batch: int = 1
    ) -> tuple[int, ...]:
        """The bytes that each rank receives from others in one forward pass of one layer.

        The backward of the keys method sends as many back, as gradients of k and v. Raises TypeError or ValueError for
        what is no number above 0 or no dtype, and if the method cannot serve these numbers of heads.
        """
        check_type("dtype", dtype, torch.dtype, "a torch.dtype such as torch.bfloat16")
        heads, kv_heads = checked_count("heads", heads), checked_count("kv_heads", kv_heads)
        row_bytes = checked_count("batch", batch) * checked_count("head_dim", head_dim) * dtype.itemsize
        if self.resolved(heads, kv_heads) == "keys":
            return tuple(2 * kv_heads * rows * row_bytes for rows in self.key_rows)
        ranks, total = self.layout.ranks, self.layout.seq_len
        here, kv_here = heads // ranks, max(1, kv_heads // ranks)
        counts = [self.layout.count(rank) for rank in range(ranks)]
        return tuple(((total - own) * (here + 2 * kv_here) + own * (heads - here)) * row_bytes for own in counts)

    def resolved(self, heads: int, kv_heads: int) -> Literal["keys", "heads"]:
        """The method that serves these numbers of heads. Raises ValueError if ``heads`` was asked for and cannot."""
        ranks = self.layout.ranks
        divides = heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
        if self.method == "heads" and not divides:
            raise ValueError(
                f"method: 'heads' for {heads} query and {kv_heads} key heads over {ranks} ranks, expected query heads "
                "divisible by the ranks, and key heads that are divisible by them or divide them; use method='keys'"
            )
        if self.method == "auto":
            return "heads" if divides and self.config.window is None else "keys"
        return self.method


class Layer(NamedTuple):
    """A call of ``Runtime.context_attention``, all but its tensors; ``stages``: groups of key heads."""

    runtime: Server
    config: AttentionConfig
    context: ContextMask
    stages: int

    def call(self, mask: RowIntervals, train: bool, beside: bool = False) -> Call:
        """The call of one kernel; ``beside``: while an exchange runs."""
        config, engine = self.config, self.runtime.settings.engine
        return Call(mask, config.scale, config.softcap, engine, train, beside)


def context_mask(
    config: AttentionConfig,
    layout: SequenceLayout,
    mesh: DeviceMesh,
    *,
    method: Method = "auto",
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    spans: Tensor | None = None,
) -> ContextMask:
    """Plan ``Runtime.context_attention`` for the layers with this config; every rank calls it, once per batch.

    ``mesh``: one dimension, with as many ranks as the layout. The masks are those of ``Runtime.attention``, for the
    whole sequence, on the CPU, and the same on every rank; digests of them are compared.
    ``method``: ``keys`` sends each rank the keys that its rows see; ``heads`` (Ulysses) sends it all rows of some
    heads; ``auto`` takes ``heads`` if there is no window and the heads divide, else ``keys``.

    Raises ValueError or TypeError for what does not fit, RuntimeError if another rank failed or disagrees.
    """
    check_config(config)
    rank = check_mesh(layout, mesh)
    masks = {
        "attention_mask": attention_mask,
        "document_ids": document_ids,
        "prefix_lengths": prefix_lengths,
        "spans": spans,
    }
    made, error = None, None
    facts = dict.fromkeys(("layout", "mask", "config", "method"), 0)
    try:
        if method not in get_args(Method):
            raise ValueError(f"method: {method!r}, expected one of {', '.join(get_args(Method))}")
        with torch.device("cpu"):  # plans are made there, whatever the default device is
            whole = _whole(config, layout.seq_len, masks)
            facts = {
                "layout": digest(layout),
                "mask": digest([whole.left, whole.right, *map(digest_of, whole.vectors)]),
                "config": digest(config),
                "method": digest(method),
            }
            made = _made(config, layout, mesh, rank, method, whole)
    except Exception as raised:  # whatever it is, the others are told before it is raised again
        error = raised
    agree("context_mask", mesh, facts, error)
    assert made is not None
    return made


def _made(
    config: AttentionConfig, layout: SequenceLayout, mesh: DeviceMesh, rank: int, method: Method, whole: RowIntervals
) -> ContextMask:
    device = _device(mesh)
    each = iter(pairs_of(whole, [part for own in layout.ranges for part in own]))
    pairs: tuple[float, ...] = tuple(sum(itertools.islice(each, len(own))) for own in layout.ranges)
    if method == "heads" or (method == "auto" and config.window is None):
        pairs = (sum(pairs) / layout.ranks,) * layout.ranks
    # If a rank's rows see nothing, one key of its own, as kernels need one.
    seen = [keys_seen(whole, own) or ((own[0][0], own[0][0] + 1),) for own in layout.ranges]
    received = tuple(length(keys) - length(common(own, keys)) for own, keys in zip(layout.ranges, seen, strict=True))
    by_keys = by_heads = None
    if method != "heads":
        by_keys = _key_plan(layout, rank, seen, whole, device, silent=not any(received))
    if method == "heads" or (method == "auto" and config.window is None):
        by_heads = _head_plan(layout)
    return ContextMask(config, layout, mesh, method, rank, pairs, received, by_keys, by_heads, _on(whole, device))


def _whole(config: AttentionConfig, seq_len: int, masks: dict[str, Tensor | None]) -> RowIntervals:
    batch = 1
    for name, mask in masks.items():
        if mask is None:
            continue
        if isinstance(mask, Tensor):
            if mask.device.type != "cpu":
                raise ValueError(
                    f"{name}: on {mask.device}, expected the CPU, where plans are made (it would wait for the device); "
                    "pass the batch's own, before it is moved"
                )
            if name in ("attention_mask", "document_ids") and mask.dim() == 2 and mask.shape[1] != seq_len:
                raise ValueError(
                    f"{name}: {mask.shape[1]} tokens, expected the {seq_len} of the layout; give the mask of the whole "
                    "sequence, not of this rank's rows"
                )
            batch = max(batch, mask.shape[0]) if mask.dim() else batch
    cpu = torch.device("cpu")
    check_mask_arguments(seq_len, seq_len, batch, cpu, causal=config.causal, holes=False, **masks)
    return row_intervals(seq_len, seq_len, causal=config.causal, window=config.window, **masks)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _on(mask: RowIntervals, device: torch.device) -> RowIntervals:
    if mask.lo is None or mask.hi is None:
        return mask
    return mask._replace(lo=mask.lo.to(device), hi=mask.hi.to(device))


def _key_plan(
    layout: SequenceLayout, rank: int, seen: list[Ranges], whole: RowIntervals, device: torch.device, silent: bool
) -> KeyPlan:
    own, rows = layout.ranges[rank], layout.count(rank)
    first, last = _inner_rows(whole, own)
    start = own[0][0]
    inner: Ranges = merged([(start + first, start + last)])
    outer: Ranges = merged([(start, start + first), (start + last, own[-1][1])]) if inner else own
    needed = seen[rank] if not inner else keys_seen(whole, outer) if outer else ()
    incoming = [() if source == rank else common(rows, needed) for source, rows in enumerate(layout.ranges)]
    inner_mask = _on(renumbered(whole, inner, own), device) if inner else None
    outer_mask = _on(renumbered(whole, outer, needed), device) if outer else None
    outer_keys = _parts(own, common(own, needed), incoming)
    every, keys = outer_mask or inner_mask, outer_keys if outer else [Part(False, 0, rows)]
    if inner and outer:
        every = _on(renumbered(whole, own, merged(own + needed)), device)
        keys = _parts(own, own, incoming)
    assert every is not None
    return KeyPlan(
        [() if to == rank else merged(placed(own, keys)) for to, keys in enumerate(seen)],
        [length(part) for part in incoming],
        silent,
        (first, last - first, rows - last),
        inner_mask,
        outer_mask,
        outer_keys,
        every,
        keys,
    )


def _parts(own: Ranges, kept: Ranges, incoming: list[Ranges]) -> list[Part]:
    """The rank's own keys in ``kept``, and those that arrive, in the sequence's order."""
    found = [(start, Part(False, *at)) for (start, _), at in zip(kept, placed(own, kept), strict=True)]
    here = 0
    for start, end in itertools.chain(*incoming):
        found.append((start, Part(True, here, here + end - start)))
        here += end - start
    parts: list[Part] = []
    for _, part in sorted(found):
        before = parts[-1] if parts else None
        if before is not None and before.arrived == part.arrived and before.end == part.start:
            parts[-1] = before._replace(end=part.end)
        else:
            parts.append(part)
    return parts


def _inner_rows(whole: RowIntervals, own: Ranges) -> tuple[int, int]:
    """A rank's inner rows as a range among its own; (0, 0) if they are not worth a separate call.

    Only ranks with one chunk have any: with more, rows of one chunk see keys between the chunks.
    """
    if len(own) > 1:
        return 0, 0
    start = own[0][0]
    first, last = rows_within(whole, own[0])
    inner, all_pairs = pairs_of(whole, [(first, last), own[0]]) if first < last else (0, 1)
    if (first, last) != own[0] and inner < LEAST_INNER * all_pairs:
        return 0, 0
    return first - start, last - start


def _head_plan(layout: SequenceLayout) -> HeadPlan:
    parts = [part for own in layout.ranges for part in own]
    order = sorted(range(len(parts)), key=lambda at: parts[at][0])
    sizes = [end - start for start, end in parts]
    back = [0] * len(order)
    for place, at in enumerate(order):
        back[at] = place
    rows = [layout.count(rank) for rank in range(layout.ranks)]
    pieces = [[end - start for start, end in own] for own in layout.ranges]
    return HeadPlan(pieces, order, [sizes[at] for at in order], back, rows)
