"""The blocked engine's matrix products: batches of float32 matrices, or of bfloat16 ones where the CPU has tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime.kernels.workspace import Workspace
from softcap_runtime.torch_private import cpu_has_amx


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products: bfloat16 only where the CPU has bf16 tiles (AMX), else float32.

    Measured on an AVX-512 CPU without AMX: float32 products run at 300 GFLOP/s on two cores, bf16 at 160; with
    AMX at 290 and 1,400.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 and cpu_has_amx() else torch.float32


# Terms of a sum at most. At head_dim 256 sums of 128 leave 0.85 of eager code's error on a CPU with AVX-512, 1.005 on
# one with AVX2, whose library cuts such sums as well; of 64, 0.77.
PART = 64


def multiply_in_parts(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out`` in several sums over the inner dimension: shorter sums, and so less rounding."""
    inner = a.shape[-1]
    size = min(-(-inner // 2), PART)
    torch.bmm(a[..., :size], b[:, :size], out=out)
    for start in range(size, inner, size):
        out.baddbmm_(a[..., start : start + size], b[:, start : start + size])
    return out


def accumulate(space: Workspace, total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """``total += a @ b`` in float32, or ``=`` where it is the first; a bf16 product is not rounded into the sum."""
    if a.dtype == torch.float32:
        total.baddbmm_(a, b, beta=0 if first else 1)
        return
    product = torch.bmm(a, b, out=space.empty("product", a.dtype, *total.shape))
    if first:
        total.copy_(product)
    else:
        total += product
