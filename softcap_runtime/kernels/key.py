"""The key of a compiled kernel: what its machine code depends on, and nothing else.

Lengths, batch, head counts, strides, windows, caps and scales are run-time arguments of every kernel, so
one artifact serves all of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

MaskKind = Literal["band", "intervals", ""]


class KernelSpec(NamedTuple):
    """``op`` names the graph (see ``graphs/``); ``head_dim`` 0 and ``mask`` "" where it depends on neither."""

    op: str
    device: str
    dtype: str
    head_dim: int
    capped: bool
    mask: MaskKind

    def fields(self) -> dict[str, str | int | bool]:
        """The key as JSON fields for the store."""
        return self._asdict()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return dtype_of(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """``"float32"`` -> ``torch.float32``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {name!r}, expected a torch dtype name such as 'float32'")
    return dtype
