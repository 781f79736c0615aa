"""A compiled GPU kernel as data: what it is compiled for, and the bytes that CUDA's driver loads.

Nothing here imports Triton or touches a GPU: a process whose kernels are in the cache needs no compiler. Nor is torch
imported, which would take a builder longer than most kernels.
"""

from __future__ import annotations

import json
from typing import NamedTuple


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
