"""What a GPU kernel takes, tensors and numbers, and where a call finds the kernel for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from softcap_runtime.cuda.cubin import CubinSpec
from softcap_runtime.cuda.options import BlockOptions, Direction
from softcap_runtime.engines.spec import dtype_name

# Triton's names of the dtypes that kernels point to.
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


class Pointer(NamedTuple):
    """A tensor that a kernel takes as an address."""

    dtype: torch.dtype

    def type_name(self) -> str:
        """The parameter's type as Triton spells it."""
        return f"*{TRITON_NAMES[self.dtype]}"


class Tile(NamedTuple):
    """A tensor whose ``block``s come through the tensor memory accelerator; strides in elements, the last is 1."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def type_name(self) -> str:
        """The parameter's type as Triton spells it."""
        return f"tensordesc<{TRITON_NAMES[self.dtype]}{list(self.block)}>"


# None: a tensor that this kernel is compiled without.
Parameter = Pointer | Tile | None
Number = int | float


def spec_of(
    kernel: str,
    parameters: Sequence[Parameter],
    numbers: Sequence[Number],
    constants: Mapping[str, int | bool | str],
    *,
    capability: tuple[int, int],
    dtype: torch.dtype,
    aligned: bool,
    warps: int,
    stages: int,
) -> CubinSpec:
    """The key of a kernel for a call's parameters, numbers and compile-time arguments."""
    return CubinSpec(
        kernel,
        10 * capability[0] + capability[1],
        dtype_name(dtype),
        tuple("" if one is None else one.type_name() for one in parameters),
        "".join(map(letter, numbers)),
        aligned,
        tuple(constants.items()),
        warps,
        stages,
    )


def letter(number: Number) -> str:
    """How a number is passed: f float32, i int32, l int64."""
    if isinstance(number, float):
        return "f"
    return "i" if -(2**31) <= number < 2**31 else "l"


class Function(Protocol):
    """A loaded kernel."""

    def bind(
        self, grid: tuple[int, int, int], parameters: Sequence[Parameter], numbers: Sequence[Number]
    ) -> Callable[..., None]:
        """``run(*tensors)`` launches it on the device's current stream: one tensor, or None, for each parameter."""


class GpuKernels(Protocol):
    """Where a call on a GPU finds its kernels."""

    def function(self, spec: CubinSpec) -> Function:
        """The kernel of ``spec``: loaded, built, or refused with an error."""

    def options(self, q: Tensor, direction: Direction) -> BlockOptions:
        """The blocks, warps and stages of a kernel for inputs like ``q`` ``[B, H, S, D]``."""
