"""The flex engine on the CPU: PyTorch's ``flex_attention``, compiled once for every length, window, cap and scale.

flex has no backward and no logsumexp there (torch 2.13), so it serves inference only. ``flex_cuda`` is its
counterpart, which trains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime.compat import torch_features
from softcap_runtime.engines.engine import Backward, Engine, Kernels, MaskedForward, Problem, per_mask, scalars
from softcap_runtime.engines.package import Package
from softcap_runtime.engines.spec import KernelSpec, dtype_name
from softcap_runtime.masks.blocks import block_tables
from softcap_runtime.masks.intervals import edges

FORWARD = "flex_forward"
# With 8 of 16 columns left over, Inductor's transposed product of AVX2 stores all 16 where a head has fewer elements
# than this (torch 2.13, stock flex_attention as well: wrong rows over 24 and 40 keys at head_dim 16).
SHORT_HEAD = 24


def kernel_spec(problem: Problem, op: str) -> KernelSpec:
    """What flex's kernel ``op`` is compiled for to solve a problem."""
    return KernelSpec(op, problem.device.type, dtype_name(problem.dtype), problem.head_dim, problem.softcap is not None)


def _package(problem: Problem) -> Package:
    return Package(*kernel_spec(problem, FORWARD))


def _refuses(problem: Problem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the flex engine serves float32, bfloat16 and float16"
    if problem.train:
        return "flex_attention has no backward on the CPU"
    if problem.head_dim < SHORT_HEAD and _avx2_at_most():
        return (
            f"head_dim: {problem.head_dim}, torch's product for heads below {SHORT_HEAD} writes past its buffer on a "
            "CPU without AVX-512"
        )
    if not torch_features.FLEX_ATTENTION:
        return f"torch {torch.__version__} has no flex_attention (2.5 and newer have)"
    if not torch_features.FLEX_PACKAGES:
        return f"torch {torch.__version__} cannot compile flex_attention ahead of time (2.9 and newer can)"
    return None


def _forward(problem: Problem, kernels: Kernels) -> MaskedForward:
    """Bind the kernel to the mask; it returns out ``[B, Hq, Sq, D]`` and no logsumexp."""
    run_kernel = kernels.get(_package(problem))
    fixed = [*mask_tensors(problem, kernels), *scalars(problem)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return run_kernel([q, k, v, *fixed])[0], None

    return run


def mask_tensors(problem: Problem, kernels: Kernels) -> tuple[Tensor, ...]:
    """Four block tables over the keys, then what ``is_visible`` reads of the mask; those of a band are kept."""
    mask, device = problem.mask, problem.device

    def make() -> tuple[Tensor, ...]:
        lo, hi = edges(mask, device)
        row_stride = torch.tensor(0 if lo.shape[0] == 1 else mask.q_len, dtype=torch.int32, device=device)
        return *block_tables(mask, device), lo.flatten(), hi.flatten(), row_stride

    return make() if mask.vectors else kernels.masks.get_or_make((mask, device), make)


# Without types: torch traces this into graphs, which it can't cache when a type is a string, as they are here.
def is_visible(b, h, i, j, lo, hi, row_stride):  # type: ignore[no-untyped-def]
    """The elements of a mask, for flex: row i of batch b sees ``lo[b * row_stride + i] <= j < hi[...]``."""
    row = b * row_stride + i
    return (j >= lo[row]) & (j < hi[row])


def _avx2_at_most() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _backward(problem: Problem, kernels: Kernels) -> Backward:
    raise AssertionError("unreachable: the engine refuses training")


ENGINE = Engine("flex", _refuses, lambda problem, kernels: [_package(problem)], per_mask(_forward), _backward)
