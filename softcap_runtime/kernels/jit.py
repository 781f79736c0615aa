"""Kernels that ``torch.compile`` makes in this process: the dense engine's, and none that reaches the disk."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.kernels import dense
from softcap_runtime.kernels.engine import Runner
from softcap_runtime.kernels.key import KernelSpec

_FUNCTIONS = {"dense_forward": dense.attend, "dense_backward": dense.attend_backward}


def compiles_in_process(spec: KernelSpec) -> bool:
    """Whether ``spec`` is made here rather than loaded from a package."""
    return spec.op in _FUNCTIONS


def compile_runner(spec: KernelSpec) -> Runner:
    """A runner of functions compiled with dynamic sizes, each at its first call.

    torch compiles anew for sizes of 1 and for strides that relate to sizes in another way, and raises at its limit of
    eight recompilations a code object (``fullgraph=True``; else it would go on uncompiled in silence). So inputs are
    made contiguous, which is little beside S x S logits, and each pattern of ones has code of its own.
    """
    variants: dict[tuple[bool, ...], Any] = {}

    def run(inputs: list[Tensor]) -> list[Tensor]:
        plain = [None if x is None else x.contiguous() for x in inputs]
        kind = tuple(flag for x in plain if x is not None for flag in _ones(x))
        compiled = variants.get(kind)
        if compiled is None:
            compiled = variants.setdefault(kind, _compiled(spec))
        return list(compiled(*plain))

    return run


def _ones(x: Tensor) -> tuple[bool, ...]:
    return (x.storage_offset() == 0, *(size == 1 for size in x.shape))


def _compiled(spec: KernelSpec) -> Any:
    function = _FUNCTIONS[spec.op]
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, spec.op, None, function.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)
