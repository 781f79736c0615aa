"""The blocked engine on the CPU: one C++ library for every dtype, head_dim, mask of row intervals, length and cap.

The top of cpu/attention.cpp says what it computes, and how. This module binds a problem to it: sizes and strides are
stored once for each layout of a call's tensors, and each call passes addresses.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.cpu.library import Library, library
from softcap_runtime.engines.engine import (
    Backward,
    Engine,
    Forward,
    Kernels,
    KeysDone,
    Problem,
    empty_output,
    output_layout,
)
from softcap_runtime.masks.tokens import FindIntervals, tokens_of

# The library's numbers for the dtypes.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STRIDES = [
    f"{name}_{dim}" for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v") for dim in "bhs"
]
# The most rows that decoding takes: query heads of a group times query rows (cpu/decode.h).
MOST_ROWS = 64
# A plan's tensors have one layout or a few; this bounds those of a caller that varies them without end.
MAX_LAYOUTS = 64
# Bytes of the numbers that the library reads as a mask, as signed integers.
_ID_BYTES = {torch.int64: 8, torch.int32: 4, torch.int8: 1}
_MASK_BYTES = {**_ID_BYTES, torch.uint8: 1, torch.bool: 1}
# The library's return code for a table, lengths or offsets that do not fit.
_DOES_NOT_FIT = 2
# Whether a call of this process has used several threads; whether this is a forked child of such a process.
_threaded, _alone = False, False


class CpuProblem(ctypes.Structure):
    """``Problem`` of cpu/problem.h: the same fields in the same order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "batch", "heads", "kv_heads", "q_len", "kv_len", "dim")),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int64) for name in ("left", "right", "edge_stride", "threads", "arithmetic", "fetch")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("page_size", "table_stride", "pages")),
    ]


class CpuPages(ctypes.Structure):
    """``Pages`` of cpu/pages.h: the same fields in the same order."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("table_bytes", "table_step", "length_bytes", "offset_bytes", "causal", "window")
    ]


def _refuses(problem: Problem) -> str | None:
    if problem.dtype not in DTYPES:
        return f"q.dtype: {problem.dtype}, the blocked engine serves float32, bfloat16 and float16"
    return None


def _artifacts(problem: Problem, kernels: Kernels) -> Sequence[Artifact]:
    return [library()]


def _described(problem: Problem, loaded: Library, threads: int, *strides: tuple[int, ...]) -> CpuProblem:
    """The library's description of a problem, for tensors ``[B, H, S, D]`` with these strides."""
    mask = problem.mask
    steps = [step for each in strides for step in each[:3]]
    return CpuProblem(
        DTYPES[problem.dtype],
        problem.batch,
        problem.num_heads,
        problem.num_kv_heads,
        mask.q_len,
        mask.kv_len,
        problem.head_dim,
        *steps,
        *[0] * (len(_STRIDES) - len(steps)),
        mask.left or 0,
        mask.right or 0,
        mask.q_len if mask.lo is not None and mask.lo.shape[0] > 1 else 0,
        threads,
        loaded.arithmetic,
        loaded.fetch,
        problem.scale,
        problem.softcap or 0.0,
    )


def _layouts(problem: Problem, loaded: Library) -> Callable[..., tuple[int, CpuProblem]]:
    """A function that returns the described problem and its address, cached by strides and number of threads.

    The caller must keep both until the library returns, as another thread may clear the cache.
    """
    known: dict[tuple[Any, ...], tuple[int, CpuProblem]] = {}

    def layout(*strides: tuple[int, ...]) -> tuple[int, CpuProblem]:
        threads = _threads()
        key = (threads, *strides)
        found = known.get(key)
        if found is None:
            if len(known) >= MAX_LAYOUTS:
                known.clear()
            made = _described(problem, loaded, threads, *strides)
            found = known[key] = ctypes.addressof(made), made
        return found

    return layout


def _forward(problem: Problem, kernels: Kernels) -> Forward:
    loaded: Library = kernels.get(library())
    attend, layout, train = loaded.forward, _layouts(problem, loaded), problem.train

    shape, strides = output_layout(problem.batch, problem.num_heads, problem.mask.q_len, problem.head_dim)

    def run(q: Tensor, k: Tensor, v: Tensor, *edges: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        out = q.new_empty_strided(shape, strides) if out is None else out
        lse = q.new_empty(shape[:3], dtype=torch.float32) if train else None
        lo, hi, kept = _addresses(edges)
        described = layout(q.stride(), k.stride(), v.stride(), out.stride())
        _check(
            attend(
                described[0],
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                out.data_ptr(),
                None if lse is None else lse.data_ptr(),
                lo,
                hi,
                kept,
            )
        )
        return out, lse

    return run


def bind_paged(
    problem: Problem,
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    offsets: Tensor | None,
    *,
    causal: bool,
    window: int | None,
) -> Callable[..., Tensor | None]:
    """Attention over keys in pages, for a problem of at most ``MOST_ROWS`` (new rows x heads of a group).

    ``q`` ``[B, Hq, Sq, D]``, or with ``offsets`` ``[1, Hq, B * Sq, D]``; ``k``, ``v`` ``[num_pages, page_size, Hkv,
    D]``; ``table`` ``[B, pages]``, ``lengths`` ``[B]`` and ``offsets`` ``[B + 1]``, int32 or int64; last strides 1. The
    result takes tensors of the same layouts and returns out, or None if the contents of the last three do not fit or
    the sequences have different numbers of rows.
    """
    loaded: Library = kernels.get(library())
    attend, rows = loaded.paged, problem.mask.q_len
    shape, strides = output_layout(*q.shape)
    steps = [q.stride(), *[(page, head, row) for page, row, head, _ in (k.stride(), v.stride())], strides]
    if offsets is not None:  # the rows of each sequence begin after those of the one before
        for at in (0, 3):
            steps[at] = (rows * steps[at][2], *steps[at][1:])
    offset_bytes = 0 if offsets is None else offsets.element_size()
    pages = CpuPages(
        table.element_size(), table.stride(0), lengths.element_size(), offset_bytes, int(causal), window or 0
    )
    where, sizes = ctypes.addressof(pages), (k.shape[1], table.shape[1], k.shape[0])
    described: dict[int, CpuProblem] = {}

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, offsets: Tensor | None) -> Tensor | None:
        threads = _threads()
        made = described.get(threads)
        if made is None:
            made = _described(problem, loaded, threads, *steps)
            made.page_size, made.table_stride, made.pages = sizes
            described[threads] = made
        out = q.new_empty_strided(shape, strides)
        code = attend(
            ctypes.addressof(made),
            where,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            table.data_ptr(),
            lengths.data_ptr(),
            None if offsets is None else offsets.data_ptr(),
        )
        if code == _DOES_NOT_FIT:
            return None
        _check(code)
        return out

    run.pages = pages  # type: ignore[attr-defined]  # keeps it alive as long as its address is used
    return run


def bind_intervals(kernels: Kernels) -> FindIntervals:
    """``masks.tokens.FindIntervals`` on the CPU."""
    loaded: Library = kernels.get(library())
    find, device = loaded.intervals, torch.device("cpu")

    def run(
        batch: int,
        q_len: int,
        kv_len: int,
        causal: bool,
        window: int | None,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
    ) -> tuple[Tensor, ...] | None:
        given = (attention_mask, _MASK_BYTES), (document_ids, _ID_BYTES)
        tokens = tokens_of((batch, q_len, kv_len), causal, device, *given)
        if tokens is None:
            return None
        rows, shown, ids = tokens
        lo, hi = (torch.empty((rows, q_len), dtype=torch.int32, device=device) for _ in range(2))
        found = find(
            None if attention_mask is None else attention_mask.data_ptr(), *shown,
            None if document_ids is None else document_ids.data_ptr(), *ids,
            rows, q_len, kv_len, causal, window or 0, lo.data_ptr(), hi.data_ptr(),
        )  # fmt: skip
        return ((lo, hi), None, ())[found]

    return run


def _backward(problem: Problem, kernels: Kernels) -> Backward:
    loaded: Library = kernels.get(library())
    differentiate, layout = loaded.backward, _layouts(problem, loaded)

    def run(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *edges: Tensor,
        keys_done: KeysDone | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = empty_output(q), empty_output(k), empty_output(v)
        tensors = (q, k, v, out, grad_out, *grads)
        described = layout(*[x.stride() for x in tensors])
        _check(
            differentiate(
                described[0],
                *[x.data_ptr() for x in (q, k, v, out, lse)],
                *_addresses(edges),
                grad_out.data_ptr(),
                *[grad.data_ptr() for grad in grads],
            )
        )
        if keys_done is not None:
            keys_done(*grads[1:])
        return grads

    return run


def _addresses(edges: Sequence[Tensor]) -> tuple[int | None, int | None, int | None]:
    """The addresses of a mask's ``lo``, ``hi`` and ``kept``; None for a missing one."""
    if not edges:
        return None, None, None
    return edges[0].data_ptr(), edges[1].data_ptr(), edges[2].data_ptr() if len(edges) == 3 else None


def _threads() -> int:
    """The number of threads of a call."""
    global _threaded
    threads = 1 if _alone else torch.get_num_threads()
    _threaded = _threaded or threads > 1
    return threads


def _in_forked_child() -> None:
    """Use one thread: OpenMP would wait forever for the parent's threads, which a fork does not copy."""
    global _alone
    _alone = _alone or _threaded


os.register_at_fork(after_in_child=_in_forked_child)


def _check(code: int) -> None:
    if code:
        raise MemoryError(
            "attention: out of memory for its buffers; use shorter sequences, smaller batches or fewer threads"
        )


ENGINE = Engine(
    "blocked",
    _refuses,
    _artifacts,
    _forward,
    _backward,
    reads_kept=True,
    parts=True,
    intervals=lambda problem, kernels: bind_intervals(kernels),
)
