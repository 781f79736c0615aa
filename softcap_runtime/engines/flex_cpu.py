"""The flex engine on the CPU: PyTorch's ``flex_attention``, compiled once for every length, window, cap and scale.

flex has no backward and no logsumexp there (torch 2.13), so it serves inference only. ``flex_cuda`` is its
counterpart, which trains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime.compat import torch_features
from softcap_runtime.engines.engine import (
    Backward,
    Engine,
    Kernels,
    MaskedForward,
    Problem,
    empty_output,
    per_mask,
    scalars,
)
from softcap_runtime.engines.package import Package
from softcap_runtime.engines.spec import KernelSpec, MaskKind, dtype_name
from softcap_runtime.masks.blocks import BlockTables, block_tables
from softcap_runtime.masks.intervals import RowIntervals, band

# The kernel's interval vectors have room for this many rows (batch x length); see graphs/flex.py.
MAX_ROWS = 2**24
FORWARD = "flex_forward"
# With 8 of 16 columns left over, Inductor's transposed product of AVX2 stores all 16 where a head has fewer elements
# than this (torch 2.13, stock flex_attention as well: wrong rows over 24 and 40 keys at head_dim 16).
SHORT_HEAD = 24
# Keys of all heads from which a group's heads are better taken together, which itself costs 10 to 30 us. At Hq8 Hkv4
# D256 (AVX2) they then take 1.2, 1.0 and 0.8 of the time in float32 for 1,024, 4,096 and 8,192 keys, and 1.2, 0.8 and
# 0.5 in bf16 for 64, 256 and 512.
FEW_KEYS, FEW_HALF_KEYS = 4096, 256


def kernel_spec(problem: Problem, op: str) -> KernelSpec:
    """What flex's kernel ``op`` is compiled for to solve a problem."""
    mask: MaskKind = "band" if problem.mask.lo is None else "intervals"
    return KernelSpec(
        op, problem.device.type, dtype_name(problem.dtype), problem.head_dim, problem.softcap is not None, mask
    )


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
    if problem.mask.lo is not None and problem.mask.lo.numel() > MAX_ROWS:
        return f"the mask has {problem.mask.lo.numel()} rows, the flex engine takes {MAX_ROWS}"
    if not torch_features.FLEX_ATTENTION:
        return f"torch {torch.__version__} has no flex_attention (2.5 and newer have)"
    if not torch_features.FLEX_PACKAGES:
        return f"torch {torch.__version__} cannot compile flex_attention ahead of time (2.9 and newer can)"
    return None


def _forward(problem: Problem, kernels: Kernels) -> MaskedForward:
    """Bind the kernel to the mask; it returns out ``[B, Hq, Sq, D]`` and no logsumexp."""
    if not _decodes_groups(problem):
        return _bound(problem, kernels)
    bound: dict[bool, MaskedForward] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        # A task of the kernel is one head: with fewer groups than threads each head is better off with one of its own.
        by_group = problem.batch * problem.num_kv_heads >= torch.get_num_threads()
        if by_group not in bound:
            bound[by_group] = (_bound_by_group if by_group else _bound)(problem, kernels)
        return bound[by_group](q, k, v)

    return run


def _bound(problem: Problem, kernels: Kernels) -> MaskedForward:
    run_kernel = kernels.get(_package(problem))
    fixed = [*key_tables(problem, kernels), *mask_arguments(problem), *scalars(problem)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return run_kernel([q, k, v, *fixed])[0], None

    return run


def _decodes_groups(problem: Problem) -> bool:
    """Whether there is one query row a head, which sees keys that other heads read as well, and enough of them."""
    if problem.mask.q_len > 1 or problem.num_heads == problem.num_kv_heads:
        return False
    first, past = _row_keys(problem.mask)
    few = FEW_KEYS if problem.dtype == torch.float32 else FEW_HALF_KEYS
    return problem.batch * problem.num_kv_heads * (past - first) >= few


def _row_keys(mask: RowIntervals) -> tuple[int, int]:
    """The keys ``[first, past)`` that a single row may see."""
    if mask.left is None or mask.right is None:
        return 0, mask.kv_len
    return max(0, mask.left), min(mask.right, mask.kv_len)


def _bound_by_group(problem: Problem, kernels: Kernels) -> MaskedForward:
    """As ``_bound`` for one query row a head: the heads of a group become rows of one, which reads their keys once.

    A thread with AVX2, D256, 4,096 keys: 1.4 (float32), 3.2 (bf16) and 1.3 times (fp16) as fast for groups of two, 2.1,
    5.5 and 1.5 for groups of four.
    """
    mask, kv_heads = problem.mask, problem.num_kv_heads
    groups = problem.num_heads // kv_heads
    first, past = _row_keys(mask)
    if mask.lo is None:
        # The rows of a band see different keys: only those of the one are handed on, and all rows see all of them.
        rows = band(groups, past - first, causal=False, window=None)
    else:
        lo, hi = (edge.expand(-1, groups).contiguous() for edge in mask.vectors)
        rows = RowIntervals(groups, mask.kv_len, None, None, lo, hi)
    attend = _bound(problem._replace(num_heads=kv_heads, mask=rows), kernels)
    shape = (problem.batch, kv_heads, groups, problem.head_dim)
    whole = (first, past) == (0, mask.kv_len)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if not whole:
            k, v = k[:, :, first:past], v[:, :, first:past]
        out = empty_output(q)
        out.view(shape).copy_(attend(q.view(shape), k, v)[0])
        return out, None

    return run


def key_tables(problem: Problem, kernels: Kernels) -> BlockTables:
    """The block tables over the keys; those of a band are kept."""
    mask, device = problem.mask, problem.device
    if mask.lo is not None:
        return block_tables(mask, device)
    return kernels.masks.get_or_make((mask, device), lambda: block_tables(mask, device))


def mask_arguments(problem: Problem) -> list[Tensor]:
    """What ``in_band`` or ``in_intervals`` reads of the problem's mask."""
    mask, device = problem.mask, problem.device
    if mask.lo is None or mask.hi is None:
        return [_number(edge, device) for edge in (mask.left, mask.right)]
    row_stride = 0 if mask.lo.shape[0] == 1 else mask.q_len
    return [mask.lo.flatten(), mask.hi.flatten(), _number(row_stride, device)]


def in_band(b: Tensor, h: Tensor, i: Tensor, j: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A band's elements, for flex: row i sees ``i + left <= j < i + right``."""
    return (j >= i + left) & (j < i + right)


def in_intervals(b: Tensor, h: Tensor, i: Tensor, j: Tensor, lo: Tensor, hi: Tensor, row_stride: Tensor) -> Tensor:
    """The elements of intervals, for flex: row i of batch b sees ``lo[b * row_stride + i] <= j < hi[...]``."""
    row = b * row_stride + i
    return (j >= lo[row]) & (j < hi[row])


def _avx2_at_most() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _number(value: int | None, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=device)


def _backward(problem: Problem, kernels: Kernels) -> Backward:
    raise AssertionError("unreachable: the engine refuses training")


ENGINE = Engine("flex", _refuses, lambda problem, kernels: [_package(problem)], per_mask(_forward), _backward)
