"""What a compiled kernel is for, in words that all kernels share.

Lengths, batch, head counts, strides, windows, caps and scales are run-time arguments of every kernel, so
one artifact serves all of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

MaskKind = Literal["band", "intervals", ""]


class KernelSpec(NamedTuple):
    """``op`` names the kernel; ``head_dim`` 0 and ``mask`` "" where it depends on neither (``mask``: GPU kernels)."""

    op: str
    device: str
    dtype: str
    head_dim: int
    capped: bool
    mask: MaskKind = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return dtype_of(self.dtype)


def kernel_name(spec: KernelSpec) -> str:
    """A kernel in words, as progress bars, tables and errors show it."""
    words = [spec.op, spec.dtype, f"head_dim {spec.head_dim}" if spec.head_dim else "", spec.mask]
    return " ".join(word for word in words if word) + ("" if spec.capped else " (no softcap)")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """``"float32"`` -> ``torch.float32``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {name!r}, expected a torch dtype name such as 'float32'")
    return dtype
