"""Attention over a paged cache: the checks of a call, and how it is served."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.checks import FLOATS, check_config
from softcap_runtime.compat.torch_transforms import in_forward_mode, interpreters_active, is_numbers_alone
from softcap_runtime.config import AttentionConfig
from softcap_runtime.engines import blocked_cpu as blocked
from softcap_runtime.engines import blocked_cuda
from softcap_runtime.engines.engine import Call, Problem, empty_output
from softcap_runtime.errors import EngineUnavailable
from softcap_runtime.masks.deferred_checks import checked
from softcap_runtime.masks.documents import rise_from_zero
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals, band, clipped
from softcap_runtime.masks.readable import data_is_readable
from softcap_runtime.masks.validate import check_integers
from softcap_runtime.ops.planned import rows_together
from softcap_runtime.plans import Server

PAGE_SIZES = (16, 32, 64, 128, 256)
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_READ = (torch.int32, torch.int64)
_OFFSETS = "cu_seqlens_q: expected 0 and then offsets that never decrease, up to the rows of q"
_LENGTHS = "cache_lengths: out of range, expected from a sequence's new rows to what its pages hold"
_TABLE = "page_table: no page of k, expected 0 to the number of pages - 1 up to a sequence's last page"


class Pages(NamedTuple):
    """Keys and values of a batch of sequences: ``k``, ``v`` ``[num_pages, page_size, Hkv, D]``.

    ``table`` ``[B, pages]``: the numbers of each sequence's pages, in order; ``lengths`` ``[B]``: its number of keys,
    including the new ones. Entries past a sequence's last page are never read.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor


# Serves calls of one kind: takes q, the pages and the offsets. Returns None for contents that it refuses.
Way = Callable[[Tensor, Pages, "Tensor | None"], "Tensor | None"]


def paged_attention(
    runtime: Server, q: Tensor, pages: Pages, config: AttentionConfig, cu_seqlens_q: Tensor | None
) -> Tensor:
    """See ``Runtime.paged_attention``."""
    kind = _kind(q, pages, config, cu_seqlens_q)
    way = None if kind is None else runtime.plans.paged.get(kind)  # a look at plans would be a guard of a graph
    # The kernels look at the contents of table, lengths and offsets themselves, at each call.
    out = None if way is None else way(q, pages, cu_seqlens_q)
    if out is None:
        pages, cu_seqlens_q = check(q, pages, config, cu_seqlens_q)
        if q.shape[0] == 0 or q.shape[2] == 0:  # no sequence, or no new row
            return empty_output(q)
        if way is None and not torch.compiler.is_compiling():  # a graph has no addresses to hand on
            bind = _on_gpu if _through_the_table(runtime, q, config) else _on_cpu
            way = bind(runtime, q, pages, config, cu_seqlens_q)
            if way is not None:
                if kind is not None:
                    runtime.plans.keep_paged(kind, way)
                out = way(q, pages, cu_seqlens_q)
    if out is not None:
        runtime.plans.paged_calls += 1
        return out
    k, v, mask = gathered(q, pages, config, cu_seqlens_q)
    return runtime.attend_checked(q, k, v, config, mask)


def _kind(q: Tensor, pages: Pages, config: AttentionConfig, cu_seqlens_q: Tensor | None) -> Hashable:
    """Everything in which calls can differ, except contents. None for a call that needs the full path: with anything
    but dense tensors in memory on one device, in forward-mode AD, on the CPU under a transform, a mode or autocast."""
    k, v, table, lengths = pages
    offsets = lengths if cu_seqlens_q is None else cu_seqlens_q
    tensors = q, k, v, table, lengths, offsets
    if type(config) is not AttentionConfig or not _PLAIN.issuperset(map(type, tensors)):
        return None
    device = q.device
    on_cpu = device.type == "cpu"
    if torch.compiler.is_compiling() or (interpreters_active() if on_cpu else in_forward_mode()):
        return None
    for x in tensors:
        if x.device != device or x.layout is not torch.strided or x.is_nested or x.is_neg():
            return None
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    try:
        aligned = None if on_cpu else (q.data_ptr() & 15, k.data_ptr() & 15, v.data_ptr() & 15, table.data_ptr() & 15)
    except RuntimeError:  # a torch.func transform's tensors have no memory
        return None
    return (
        config, recorded, cu_seqlens_q is None, device, aligned,
        q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
        table.shape, table.stride(), table.dtype, lengths.shape, lengths.stride(), lengths.dtype,
        offsets.shape, offsets.stride(), offsets.dtype,
    )  # fmt: skip


def _through_the_table(runtime: Server, q: Tensor, config: AttentionConfig) -> bool:
    """Whether a GPU kernel reads the pages in place: on CUDA, if ``blocked`` serves the call."""
    if q.device.type != "cuda" or runtime.settings.engine not in ("auto", "blocked"):
        return False
    refusal = blocked_cuda.ENGINE.refuses(_problem(runtime, q, q, config))
    if refusal is not None and runtime.settings.engine == "blocked":
        raise EngineUnavailable(f"engine: 'blocked' cannot serve this call: {refusal}; use engine='auto'")
    return refusal is None


def _problem(runtime: Server, q: Tensor, k: Tensor, config: AttentionConfig) -> Problem:
    reach = band(1, 1, causal=config.causal, window=config.window)
    call = Call(reach, config.scale, config.softcap, runtime.settings.engine, False)
    return call.problem(q, k, runtime.settings.softcap_approx)


def _on_gpu(
    runtime: Server, q: Tensor, pages: Pages, config: AttentionConfig, cu_seqlens_q: Tensor | None
) -> Way | None:
    """The kernel of ``cuda.triton.paged``, bound for this layout of tensors; None for tensors that no kernel reads."""
    from softcap_runtime.cuda.paged import bind_paged

    if pages.k.stride(-1) != 1 or pages.v.stride(-1) != 1:
        raise ValueError("k, v: last stride above 1, expected pages whose heads are contiguous")
    if pages.k.is_neg() or pages.v.is_neg() or not all(map(is_numbers_alone, (q, *pages, cu_seqlens_q))):
        return None
    like = _as_on_gpu(q, pages, None)[:4]
    problem = _problem(runtime, q, like[1], config)
    run = bind_paged(
        *like,
        ragged=cu_seqlens_q is not None,
        kernels=blocked_cuda.GpuKernelsOf(runtime.supply.kernels(problem, paged=True), q.device.index),
        scale=config.scale,
        softcap=config.softcap,
        left=problem.mask.left if config.window is not None else None,
        right=problem.mask.right,
        approx=problem.softcap_approx,
    )
    return lambda *given: run(*_as_on_gpu(*given))


def _as_on_gpu(
    q: Tensor, pages: Pages, cu_seqlens_q: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A call's tensors as the kernel takes them; the offsets have passed a check on the GPU."""
    offsets = None if cu_seqlens_q is None else _int32(_checked_offsets(q, cu_seqlens_q))
    k, v = pages.k.transpose(1, 2), pages.v.transpose(1, 2)
    return rows_together(q), k, v, _int32(pages.table), _int32(pages.lengths), offsets


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def _on_cpu(
    runtime: Server, q: Tensor, pages: Pages, config: AttentionConfig, cu_seqlens_q: Tensor | None
) -> Way | None:
    """The C++ library, if it serves the call and the rows are few; else None.

    The result serves calls with the same number of rows in every sequence, and returns None for others and for wrong
    contents.
    """
    sequences, group = pages.table.shape[0], q.shape[1] // pages.k.shape[2]
    each, spare = divmod(q.shape[2], sequences) if cu_seqlens_q is not None else (q.shape[2], 0)
    if q.device.type != "cpu" or not 0 < each * group <= blocked.MOST_ROWS or spare:
        return None
    contents = (pages.table, pages.lengths, cu_seqlens_q)
    if not all(x is None or data_is_readable(x) for x in contents):
        return None
    if not all(map(is_numbers_alone, (q, pages.k, pages.v))):
        return None
    if pages.k.stride(-1) != 1 or pages.v.stride(-1) != 1 or pages.k.is_neg() or pages.v.is_neg():
        return None
    edges = torch.empty(sequences, each, dtype=torch.int32, device="meta")
    mask = RowIntervals(each, pages.table.shape[1] * pages.k.shape[1], None, None, edges, edges)
    call = Call(mask, config.scale, config.softcap, runtime.settings.engine, False)
    problem = call.problem(q, pages.k.transpose(1, 2))._replace(batch=sequences)
    if runtime.supply.engine(problem, call.engine).engine is not blocked.ENGINE:
        return None
    like = _as_read(q, pages, cu_seqlens_q)
    run = blocked.bind_paged(
        problem, runtime.supply.kernels(problem), *like, causal=config.causal, window=config.window
    )
    return lambda *given: run(*_as_read(*given))


def _as_read(
    q: Tensor, pages: Pages, cu_seqlens_q: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A call's tensors as the library takes them, copied if need be."""
    offsets = None if cu_seqlens_q is None else _integers(cu_seqlens_q)
    return rows_together(q), pages.k, pages.v, _integers(pages.table), _integers(pages.lengths), offsets


def _integers(x: Tensor) -> Tensor:
    if x.dtype in _READ and x.stride(-1) == 1:
        return x
    return _int32(x)


def gathered(
    q: Tensor, pages: Pages, config: AttentionConfig, cu_seqlens_q: Tensor | None
) -> tuple[Tensor, Tensor, RowIntervals]:
    """Keys and values copied out of their pages, and the mask of q's rows over them.

    k and v: ``[B, Hkv, pages * page_size, D]``; with ``cu_seqlens_q`` all sequences stand side by side in one batch
    row, as those of q do.
    """
    table = pages.table.to(torch.int64).clamp(0, pages.k.shape[0] - 1)
    keys = table.shape[1] * pages.k.shape[1]
    # Whatever lies past a sequence's end may be NaN, and an engine may multiply it by a weight of 0.
    past = torch.arange(keys, device=table.device)[None] >= pages.lengths[:, None]
    k, v = (
        x[table].flatten(1, 2).masked_fill(past[..., None, None], 0.0)  # [B, keys, Hkv, D]
        for x in (pages.k, pages.v)
    )
    lo, hi = _edges(q, pages, config, cu_seqlens_q)
    if cu_seqlens_q is not None:
        first = (_sequence_of(q, cu_seqlens_q) * keys).to(torch.int32)[None]
        k, v = (x.flatten(0, 1)[None] for x in (k, v))
        empty = lo >= hi
        lo, hi, keys = lo + first, (hi + first).masked_fill(empty, 0), keys * table.shape[0]
    return k.transpose(1, 2), v.transpose(1, 2), clipped(q.shape[2], keys, lo, hi)


def _edges(q: Tensor, pages: Pages, config: AttentionConfig, cu_seqlens_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """``lo`` and ``hi`` of the keys of its sequence that each row sees: int32 ``[B or 1, Sq]`` both."""
    ends, positions = row_positions(q, pages, cu_seqlens_q)
    hi = torch.minimum(positions + 1, ends) if config.causal else ends.expand_as(positions)
    reach = min(config.window or UNBOUNDED, UNBOUNDED)
    lo = (positions + 1 - reach).clamp(min=0)
    if config.window is not None and not config.causal:
        hi = torch.minimum(hi, positions + reach)
    return lo, hi


def row_positions(q: Tensor, pages: Pages, cu_seqlens_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """The number of keys of each row's sequence, and the row's key position: int32 ``[B or 1, Sq]`` both.

    The last row of a sequence stands at its last key. Rows past the last sequence have no keys.
    """
    most = pages.table.shape[1] * pages.k.shape[1]
    lengths = pages.lengths.to(torch.int32).clamp(0, most)
    numbers = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    if cu_seqlens_q is None:
        ends = lengths[:, None].expand(-1, q.shape[2])
        return ends, ends - q.shape[2] + numbers
    sequence = _sequence_of(q, cu_seqlens_q)
    past = cu_seqlens_q[1:].to(torch.int32)[sequence]
    ends = lengths[sequence].masked_fill(numbers >= past, 0)
    return ends[None], (ends - past + numbers)[None]


def _sequence_of(q: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    numbers = torch.arange(q.shape[2], dtype=cu_seqlens_q.dtype, device=q.device)
    found = torch.searchsorted(cu_seqlens_q[1:].contiguous(), numbers, right=True)
    return found.clamp(max=cu_seqlens_q.shape[0] - 2)


def check(q: Tensor, pages: Pages, config: Any, cu_seqlens_q: Tensor | None) -> tuple[Pages, Tensor | None]:
    """Raise TypeError or ValueError for what does not fit, naming the argument, its value and what was expected.

    Returns the checked pages and offsets; use them in place of the given ones, so that a traced graph keeps their
    checks.

    Contents are checked on the CPU, those of a graph when it runs. A GPU checks the offsets, and its kernels give NaN
    where a table or a length does not fit.
    """
    check_config(config)
    for name, x, words in (
        ("q", q, "[B, Hq, Sq, D]"),
        ("k", pages.k, "[num_pages, page_size, Hkv, D]"),
        ("v", pages.v, "[num_pages, page_size, Hkv, D]"),
    ):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {type(x).__name__}, expected a tensor {words}")
        needed = x.shape[1::2] if name == "q" else x.shape  # q may have no sequence, or no new row
        if x.dim() != 4 or 0 in needed:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {words}, at least one of each; reshape it")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: {x.dtype}, expected float32, bfloat16, float16 or float64")
        if (x.dtype, x.device, x.shape[3]) != (q.dtype, q.device, q.shape[3]):
            raise ValueError(
                f"{name}: {x.dtype} on {x.device}, head_dim {x.shape[3]}, expected q's {q.dtype} on {q.device}, "
                f"{q.shape[3]}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: requires a gradient, and a paged cache has none; use torch.no_grad()")
    if pages.v.shape != pages.k.shape:
        raise ValueError(f"v: shape {tuple(pages.v.shape)}, expected k's {tuple(pages.k.shape)}")
    if pages.k.shape[1] not in PAGE_SIZES:
        sizes = ", ".join(map(str, PAGE_SIZES))
        raise ValueError(f"k: pages of {pages.k.shape[1]} keys, expected one of {sizes}")
    if q.shape[1] % pages.k.shape[2]:
        raise ValueError(f"q: {q.shape[1]} heads, expected a multiple of the {pages.k.shape[2]} key heads")
    _check_table(q, pages, cu_seqlens_q)
    if cu_seqlens_q is not None:
        _check_offsets(q, pages, cu_seqlens_q)
    if all(x is None or data_is_readable(x) for x in (pages.table, pages.lengths, cu_seqlens_q)):
        _check_contents(q, pages, cu_seqlens_q)
        return pages, cu_seqlens_q
    if cu_seqlens_q is not None and q.device.type in ("cpu", "cuda"):
        cu_seqlens_q = _checked_offsets(q, cu_seqlens_q)
    return _checked_contents(q, pages, cu_seqlens_q) if q.device.type == "cpu" else pages, cu_seqlens_q


def _check_table(q: Tensor, pages: Pages, cu_seqlens_q: Tensor | None) -> None:
    for name, x, sizes in (("page_table", pages.table, 2), ("cache_lengths", pages.lengths, 1)):
        check_integers(name, x)
        if x.dim() != sizes or 0 in x.shape[1:] or (cu_seqlens_q is not None and x.shape[0] == 0):
            words = "[B, pages]" if sizes == 2 else "[B]"
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {words}")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, expected q's {q.device}; move it")
    batch = q.shape[0] if cu_seqlens_q is None else pages.table.shape[0]
    for name, x in (("page_table", pages.table), ("cache_lengths", pages.lengths)):
        if x.shape[0] != batch:
            raise ValueError(f"{name}: {x.shape[0]} sequences, expected {batch}")


def _check_offsets(q: Tensor, pages: Pages, cu_seqlens_q: Tensor) -> None:
    check_integers("cu_seqlens_q", cu_seqlens_q)
    # By size: dynamo takes a symbol for unequal to a number in a tuple.
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] != pages.table.shape[0] + 1:
        raise ValueError(
            f"cu_seqlens_q: shape {tuple(cu_seqlens_q.shape)}, expected ({pages.table.shape[0] + 1},), one more than "
            "page_table's rows"
        )
    if q.shape[0] != 1:
        raise ValueError(f"q: batch {q.shape[0]}, expected 1 with cu_seqlens_q; lay the sequences side by side")
    if cu_seqlens_q.device != q.device:
        raise ValueError(f"cu_seqlens_q: on {cu_seqlens_q.device}, expected q's {q.device}; move it")


def _checked_offsets(q: Tensor, offsets: Tensor) -> Tensor:
    rows = q.shape[2]
    return checked(offsets, lambda: rise_from_zero(offsets) & (offsets[-1] <= rows), _OFFSETS, (rows,))


def _check_contents(q: Tensor, pages: Pages, cu_seqlens_q: Tensor | None) -> None:
    rows = [q.shape[2]] * q.shape[0]
    if cu_seqlens_q is not None:
        offsets = cu_seqlens_q.tolist()
        rows = [past - first for first, past in pairwise(offsets)]
        if offsets[0] != 0 or offsets[-1] > q.shape[2] or min(rows) < 0:
            raise ValueError(
                f"cu_seqlens_q: {offsets}, expected 0 and then offsets that never decrease, up to q's {q.shape[2]} rows"
            )
    most = pages.table.shape[1] * pages.k.shape[1]
    for row, (count, length) in enumerate(zip(rows, pages.lengths.tolist(), strict=True)):
        if not count <= length <= most:
            raise ValueError(
                f"cache_lengths: {length} of sequence {row}, expected {count} to {most}, from its new rows to what "
                "its pages hold"
            )
    bad = _bad_entries(pages)
    if bool(bad.any()):
        row, place = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"page_table: {int(pages.table[row, place])} at place {place} of sequence {row}, expected 0 to "
            f"{pages.k.shape[0] - 1}, a page of k"
        )


def _checked_contents(q: Tensor, pages: Pages, cu_seqlens_q: Tensor | None) -> Pages:
    """``_check_contents`` of data on the CPU that nobody can look at now; the pages that it lets through."""
    rows = q.shape[2] if cu_seqlens_q is None else cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    most = pages.table.shape[1] * pages.k.shape[1]
    lengths, table = pages.lengths, pages.table
    pages = pages._replace(lengths=checked(lengths, lambda: (lengths >= rows) & (lengths <= most), _LENGTHS))
    return pages._replace(table=checked(table, lambda: ~_bad_entries(pages), _TABLE))


def _bad_entries(pages: Pages) -> Tensor:
    """Of a table: those that are no page of k. Entries past a sequence's last page count for nothing."""
    size = pages.k.shape[1]
    last = (pages.lengths[:, None] + size - 1) // size
    used = torch.arange(pages.table.shape[1], device=pages.table.device)[None] < last
    return used & ((pages.table < 0) | (pages.table >= pages.k.shape[0]))
