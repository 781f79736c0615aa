"""The blocked engine on CUDA: our Triton kernels, forward with logsumexp and backward.

The kernels of a call also depend on its tensors' layout: ``artifacts`` lists those for torch's usual layout, and those
for others are found at their first call. Nothing here imports Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.cuda.cubin import CubinSpec
from softcap_runtime.cuda.intervals import bind_intervals
from softcap_runtime.cuda.kernel import GpuKernel
from softcap_runtime.cuda.options import (
    FEW_SPLITS,
    HEAD_DIMS,
    OLDEST_TRITON,
    BlockOptions,
    Direction,
    decode_rows,
    has_triton,
    triton_version,
)
from softcap_runtime.cuda.parameters import Function
from softcap_runtime.cuda.triton.launch import TMA_FROM
from softcap_runtime.engines.engine import Backward, Engine, Forward, Kernels, Problem
from softcap_runtime.masks.intervals import RowIntervals, band
from softcap_runtime.masks.tokens import FindIntervals

# A plan's tensors have one layout or a few; this bounds those of a caller that varies them without end.
MAX_LAYOUTS = 64
# Sizes of the problems that stand for all lengths: more rows than decoding takes; and enough keys for decoding to split
# them into more than a few shares, each of four blocks of 128 or more.
MANY_ROWS, MANY_KEYS = 128, 2 * FEW_SPLITS * 4 * 128
# Keys of a page where the number does not matter.
PAGE = 16


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"the Triton kernels run on CUDA, q is on {problem.device}"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, this torch is built for AMD's"
    if not has_triton():
        return "triton is not installed"
    if triton_version() < OLDEST_TRITON:
        return "triton {}.{} is too old, {}.{} and newer compile the kernels".format(*triton_version(), *OLDEST_TRITON)
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the Triton kernels serve float32, bfloat16 and float16"
    if problem.head_dim > max(HEAD_DIMS):
        return f"head_dim: {problem.head_dim}, the Triton kernels serve up to {max(HEAD_DIMS)}"
    return None


# Stands in for a loaded kernel; what is bound to it is never run.
_NOTHING: Any = SimpleNamespace(bind=lambda *how: lambda *tensors: None)


class GpuKernelsOf(NamedTuple):
    """``GpuKernels`` for calls on one device; with ``found`` it loads none, and records there those that are needed."""

    kernels: Kernels
    device: int
    found: dict[GpuKernel, None] | None = None

    def function(self, spec: CubinSpec) -> Function:
        """The kernel of ``spec``, loaded."""
        kernel = GpuKernel(spec, self.device)
        if self.found is not None:
            self.found[kernel] = None
        loaded: Function = self.kernels.get(kernel) if self.found is None else _NOTHING
        return loaded

    def options(self, q: Tensor, direction: Direction) -> BlockOptions:
        """The options of a kernel for tensors like q."""
        return self.kernels.options(q.device.index, q.dtype, q.shape[-1], direction)


class _Outline(NamedTuple):
    """What binding reads of an aligned tensor ``[B, H, S, D]``, laid out ``[B, S, H, D]`` in memory, without one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, place: int | None = None) -> Any:
        _, heads, length, head_dim = self.shape
        steps = (heads * length * head_dim, head_dim, heads * head_dim, 1)
        return steps if place is None else steps[place]

    def data_ptr(self) -> int:
        return 0

    def is_contiguous(self) -> bool:
        return True


def _artifacts(problem: Problem, kernels: Kernels) -> list[GpuKernel]:
    """Bind outlines of the problem's tensors to no kernels, to record those that a call would look up."""
    from softcap_runtime.cuda.triton import attention as triton_attention
    from softcap_runtime.cuda.triton import gradient as triton_gradient

    device, mask = problem.device, problem.mask
    batch, heads, kv_heads, head_dim = problem[2:6]
    found: dict[GpuKernel, None] = {}
    how = _how(problem, kernels, found)
    q: Any = _Outline((batch, heads, mask.q_len, head_dim), problem.dtype, device)
    k: Any = _Outline((batch, kv_heads, mask.kv_len, head_dim), problem.dtype, device)
    lse: Any = _Outline(q.shape[:3], torch.float32, device)
    edges: list[Any] = [_Outline(tuple(edge.shape), torch.int32, device) for edge in mask.vectors]
    triton_attention.bind_forward(q, k, k, *edges, train=problem.train, **how)
    if problem.train:
        triton_gradient.bind_backward(q, q, k, k, q, lse, *edges, **how)
    if edges:
        bind_intervals(device, how["kernels"])
    return list(found)


def paged_artifacts(problem: Problem, kernels: Kernels) -> list[GpuKernel]:
    """The kernels of calls over pages of any size: with few or many rows, side by side or in batch rows."""
    from softcap_runtime.cuda.paged import bind_paged

    device, (batch, heads, kv_heads, head_dim) = problem.device, problem[2:6]
    found: dict[GpuKernel, None] = {}
    how = _how(problem, kernels, found)
    pages: Any = _Outline((1, kv_heads, PAGE, head_dim), problem.dtype, device)
    for rows, pages_each in itertools.product(_decode_rows(problem), (1, MANY_KEYS // PAGE)):
        q: Any = _Outline((batch, heads, rows, head_dim), problem.dtype, device)
        table: Any = _Outline((1, pages_each), torch.int32, device)
        for ragged in (False, True):
            bind_paged(q, pages, pages, table, ragged=ragged, **how)
    return list(found)


def _alike(problem: Problem) -> list[Problem]:
    """Short and long problems, whose kernels differ, and those of decoding, whose kernels differ by query rows taken
    together and by shares of the keys."""
    lengths = [(MANY_ROWS, 1)]  # one key: little work, however many heads
    for keys in (MANY_ROWS, MANY_KEYS):
        rows = MANY_ROWS
        while 2 * problem.num_heads * problem.head_dim * rows * keys < TMA_FROM:
            rows *= 2
        lengths.append((rows, keys))
    lengths += [(count, keys) for keys in (1, MANY_KEYS) for count in _decode_rows(problem)]
    masks = [mask for each in lengths for mask in _masks_alike(problem.mask, *each)]
    return [problem._replace(batch=1, mask=mask) for mask in masks]


def _decode_rows(problem: Problem) -> list[int]:
    """The numbers of query rows for which decoding has different kernels."""
    group, most = problem.num_heads // problem.num_kv_heads, decode_rows(problem.dtype)
    return sorted({1, *(size // group for size in (32, 64) if size <= most)} - {0})


def _masks_alike(mask: RowIntervals, q_len: int, kv_len: int) -> list[RowIntervals]:
    """A band; or intervals without and with keys that are not kept, for which another kernel may be faster."""
    if mask.lo is None:
        return [band(q_len, kv_len, causal=True, window=None)]
    edge, kept = (torch.empty(1, size, dtype=torch.int32, device="meta") for size in (q_len, kv_len))
    plain = RowIntervals(q_len, kv_len, None, None, edge, edge)
    return [plain, plain._replace(kept=kept)]


def _how(problem: Problem, kernels: Kernels, found: dict[GpuKernel, None] | None = None) -> dict[str, Any]:
    mask = problem.mask
    return {
        "kernels": GpuKernelsOf(kernels, problem.device.index, found),
        "scale": problem.scale,
        "softcap": problem.softcap,
        "left": mask.left,
        "right": mask.right,
        "approx": problem.softcap_approx,
    }


def _bound(bind: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """A call that binds once for each layout of its tensors and ``out``: their strides and alignment."""
    ready: dict[tuple[object, ...], Callable[..., Any]] = {}

    def run(*tensors: Tensor, out: Tensor | None = None, **late: Any) -> Any:
        key = (*[x.data_ptr() & 15 for x in tensors], *[x.stride() for x in tensors])
        if out is not None:
            key += (out.data_ptr() & 15, out.stride())
            late["out"] = out
        bound = ready.get(key)
        if bound is None:
            if len(ready) >= MAX_LAYOUTS:
                ready.clear()
            bound = ready[key] = bind(*tensors, **how, **({} if out is None else {"out": out}))
        return bound(*tensors, **late)

    return run


def _forward(problem: Problem, kernels: Kernels) -> Forward:
    from softcap_runtime.cuda.triton import attention as triton_attention

    how = _how(problem, kernels)
    return _bound(triton_attention.bind_forward, train=problem.train, beside=problem.beside, **how)


def _backward(problem: Problem, kernels: Kernels) -> Backward:
    from softcap_runtime.cuda.triton import gradient as triton_gradient

    return _bound(triton_gradient.bind_backward, beside=problem.beside, **_how(problem, kernels))


def _intervals(problem: Problem, kernels: Kernels) -> FindIntervals | None:
    if not problem.mask.vectors:
        return None
    return bind_intervals(problem.device, GpuKernelsOf(kernels, problem.device.index))


ENGINE = Engine(
    "blocked", _refuses, _artifacts, _forward, _backward, _alike, reads_kept=True, parts=True, intervals=_intervals
)
