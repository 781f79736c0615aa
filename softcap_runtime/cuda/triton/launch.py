"""From tensors to a bound kernel: how their addresses and strides are passed, and the compile-time arguments.

Everything that a compilation depends on is in the parameters, the numbers' types and the constants, so a kernel is
found by its key, once for each layout of a call's tensors, and launched directly from then on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.cuda.options import (
    TRITON_WITH_DESCRIPTORS,
    BlockOptions,
    device_limits,
    tile_width,
    triton_version,
)
from softcap_runtime.cuda.parameters import GpuKernels, Number, Parameter, Pointer, Tile, spec_of
from softcap_runtime.cuda.triton.call import Mask

# Triton's interpreter runs the kernels on the CPU, for tests; it knows no inline assembly.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Elements that all strides must be multiples of for 16-byte loads of every dtype served.
ALIGNED = 8
# What a kernel for a band is given in place of a mask's vectors.
NO_EDGES = (None, None, None)
# Multiply-adds from which a call runs long enough (33 us) to hide the descriptors' cost on the host (2 us each).
TMA_FROM = 2**30


class Layout(NamedTuple):
    """What the kernels are compiled for of the tensors' addresses and strides.

    ``tma``: tiles come through the tensor memory accelerator. ``align``: the unit the strides are passed in; 1 where
    an address is no multiple of 16.
    """

    tma: bool
    align: int


def layout(work: int, *tensors: Tensor) -> Layout:
    """The layout of a call of ``work`` multiply-adds that reads or writes ``tensors`` ``[B, H, S, D]``."""
    steps = [step for x in tensors for step, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
    # The strides of what is written are multiples of head_dim.
    unaligned = tensors[0].shape[-1] % ALIGNED or any(step % ALIGNED for step in steps)
    if unaligned or any(x.data_ptr() % 16 for x in tensors):
        return Layout(False, 1)
    capability = device_limits(tensors[0].device.index).capability
    tma = work >= TMA_FROM and capability >= (9, 0) and triton_version() >= TRITON_WITH_DESCRIPTORS
    return Layout(tma and 0 not in steps, ALIGNED)  # no descriptor reads the same rows again


def strides(align: int, *steps: tuple[int, ...]) -> list[int]:
    """The batch, head and row strides of tensors with the strides ``steps``, in units of ``align`` elements."""
    return [stride // align for each in steps for stride in each[:3]]


def tile(tensor: Tensor, rows: int, tma: bool) -> Parameter:
    """What a kernel loads tiles of ``rows`` rows of ``tensor`` from."""
    if not tma:
        return Pointer(tensor.dtype)
    width = tile_width(tensor.shape[-1])
    # A dimension of one element may carry any stride in torch; the descriptor wants whole 16 bytes.
    steps = [s if n > 1 else width for s, n in zip(tensor.stride()[:3], tensor.shape, strict=False)]
    return Tile(tensor.dtype, tuple(tensor.shape), (*steps, 1), (1, 1, rows, width))


def vector(dtype: torch.dtype, size: int, rows: int, tma: bool) -> Parameter:
    """As ``tile`` for ``rows`` elements of a contiguous tensor of ``size`` elements, taken as one vector."""
    return Tile(dtype, (size,), (1,), (rows,)) if tma else Pointer(dtype)


def constants(head_dim: int, dtype: torch.dtype, options: BlockOptions, where: Layout) -> dict[str, Any]:
    """The compile-time arguments that all attention kernels end with, in the order of their signatures."""
    return {
        "BLOCK_M": options.block_m,
        "BLOCK_N": options.block_n,
        "D": head_dim,
        "DPAD": tile_width(head_dim),
        # Three TF32 products carry float32's mantissa (error near 1e-6); half precision takes no notice.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "STAGES": options.stages,
        "TMA": where.tma,
        "ALIGN": where.align,
        "ASM": not INTERPRETED,
    }


def launcher(
    kernels: GpuKernels,
    kernel: str,
    grid: tuple[int, int, int],
    parameters: list[Parameter],
    numbers: list[Number],
    fixed: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    warps: int,
    stages: int = 1,
    aligned: bool = True,
) -> Callable[..., None]:
    """``run(*tensors)`` launches ``kernel`` on the current device: a tensor, or None, for each of ``parameters``.

    ``numbers`` follow the tensors in its signature, then ``fixed``, its compile-time arguments.
    """
    spec = spec_of(
        kernel,
        parameters,
        numbers,
        fixed,
        capability=device_limits(device.index).capability,
        dtype=dtype,
        aligned=aligned,
        warps=warps,
        stages=stages,
    )
    return kernels.function(spec).bind(grid, parameters, numbers)


def reading(run: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
    """``run`` for tensors that lie as these: itself where kernels can read them, else one that makes copies."""
    if all(map(_is_readable, tensors)):
        return run
    return lambda *given, **how: run(*map(readable, given), **how)


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself where kernels can read it, else a contiguous copy (of the gradient of a sum, say)."""
    return tensor if _is_readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _is_readable(tensor: Tensor) -> bool:
    """Kernels read ``[B, H, S, D]`` with contiguous rows, anything else contiguous as a whole, and aligned."""
    if tensor.dim() < 4:
        return tensor.is_contiguous() and not tensor.data_ptr() % 16
    return tensor.stride(-1) == 1


class Output:
    """Makes uninitialised ``[B, H, S, D]`` tensors like x that lie as ``[B, S, H, D]``, in one call of torch.

    ``given``: one that is there already, a part of a larger one, of whose like none is made.
    """

    def __init__(self, x: Tensor, given: Tensor | None = None) -> None:
        self.shape = x.shape
        _, heads, length, dim = x.shape
        self.steps = (length * heads * dim, dim, heads * dim, 1) if given is None else given.stride()
        self.dtype, self.device = x.dtype, x.device

    def empty(self) -> Tensor:
        """One of them."""
        return torch.empty_strided(self.shape, self.steps, dtype=self.dtype, device=self.device)


def attending(kernel: Callable[..., None], output: Output) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of a ``kernel`` that takes q, k, v, out, the logsumexp and the mask's edges."""
    device, rows = output.device, output.shape[:3]

    def run(q: Tensor, k: Tensor, v: Tensor, *edges: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = output.empty() if out is None else out
        lse = torch.empty(rows, dtype=torch.float32, device=device)
        with on(device):
            kernel(q, k, v, out, lse, *as_edges(edges))
        return out, lse

    return run


def as_edges(vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """``RowIntervals.vectors`` as kernels take them: lo, hi and kept.

    Where all keys are kept another address stands in for the last, which is not read.
    """
    if not vectors:
        return NO_EDGES
    return tuple(vectors) if len(vectors) == 3 else (*vectors, vectors[1])


def edge_parameters(mask: Mask) -> list[Parameter]:
    """Those of ``as_edges``."""
    return [None if mask.band else Pointer(torch.int32)] * 3


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current for the launches; nothing to do where it is, which is nearly always."""
    if device.type != "cuda" or torch.cuda.device_count() == 1 or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
