"""A compiled GPU kernel as data: what it is compiled for, and the bytes that CUDA's driver loads.

Nothing here imports Triton or touches a GPU: a process whose kernels are in the cache needs no compiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from softcap_runtime.cuda.options import BlockOptions, Direction
from softcap_runtime.engines.spec import KernelSpec, MaskKind, dtype_name

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


class CubinSpec(NamedTuple):
    """The key of a GPU kernel: what its machine code depends on.

    ``tensors``: type names of its tensor parameters, "" for none. ``numbers``: a letter for each number after them,
    i int32, l int64, f float32. ``aligned``: whether every address is a multiple of 16. ``constants``: the compile-time
    arguments, in the order of its signature.
    """

    kernel: str
    capability: int
    dtype: str
    tensors: tuple[str, ...]
    numbers: str
    aligned: bool
    constants: tuple[tuple[str, int | bool | str], ...]
    warps: int
    stages: int

    def fields(self) -> dict[str, str | int | bool]:
        """The key as JSON fields for the store."""
        return {
            "op": self.kernel,
            "device": "cuda",
            "capability": self.capability,
            "dtype": self.dtype,
            "tensors": " ".join(name.replace(" ", "") or "-" for name in self.tensors),
            "numbers": self.numbers,
            "aligned": self.aligned,
            **{name.lower(): value for name, value in self.constants},
            "warps": self.warps,
            "stages": self.stages,
        }

    @classmethod
    def of_json(cls, text: str) -> CubinSpec:
        """From what ``json.dumps`` made of one."""
        kernel, capability, dtype, tensors, numbers, aligned, constants, warps, stages = json.loads(text)
        pairs = tuple((name, value) for name, value in constants)
        return cls(kernel, capability, dtype, tuple(tensors), numbers, aligned, pairs, warps, stages)

    def summary(self) -> KernelSpec:
        """The kernel in the words of all others."""
        known = dict(self.constants)
        mask: MaskKind = "" if "BAND" not in known else "band" if known["BAND"] else "intervals"
        head_dim, capped = int(known.get("D", 0)), known.get("FORM", 1) != 0
        return KernelSpec(self.kernel, "cuda", self.dtype, head_dim, capped, mask)


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


class Box(NamedTuple):
    """How a kernel wants one of its tiles delivered: elements a transfer, and the driver's swizzle mode."""

    sizes: tuple[int, ...]
    swizzle: int


class Cubin(NamedTuple):
    """``code`` with the kernel ``name``: ``shared`` bytes a block, ``threads``, a Box for each Tile among its
    parameters, and ``scratch`` pointers after all others, which it never reads."""

    name: str
    shared: int
    threads: int
    boxes: tuple[Box, ...]
    scratch: int
    code: bytes

    def pack(self) -> bytes:
        """The bytes to keep: a line of JSON, then the code."""
        return json.dumps(self._replace(code="")._asdict()).encode() + b"\n" + self.code  # type: ignore[arg-type]

    @classmethod
    def unpack(cls, data: bytes) -> Cubin:
        """From ``pack``'s bytes; ValueError when they are none."""
        line, _, code = data.partition(b"\n")
        try:
            head = json.loads(line)
            boxes = tuple(Box(tuple(map(int, sizes)), int(swizzle)) for sizes, swizzle in head["boxes"])
            numbers = [int(head[name]) for name in ("shared", "threads", "scratch")]
            return cls(str(head["name"]), numbers[0], numbers[1], boxes, numbers[2], code)
        except (KeyError, TypeError, ValueError):
            raise ValueError("cubin: not what this version writes; run: softcap-runtime clear, then prewarm") from None


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
