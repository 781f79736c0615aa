"""Kernels that ``torch.compile`` makes in this process: none of them reaches our store on disk."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.kernels import dense, flex_cuda
from softcap_runtime.kernels.engine import Runner
from softcap_runtime.kernels.key import KernelSpec


class _Source(NamedTuple):
    """``function(spec)`` is compiled; ``static``: its heads and head_dim are constants, not symbols."""

    function: Callable[[KernelSpec], Callable[..., Any]]
    static: bool


_SOURCES = {
    "dense_forward": _Source(lambda spec: dense.attend, False),
    "dense_backward": _Source(lambda spec: dense.attend_backward, False),
    flex_cuda.FORWARD: _Source(flex_cuda.function, True),
    flex_cuda.BACKWARD: _Source(flex_cuda.function, True),
}


def compiles_in_process(spec: KernelSpec) -> bool:
    """Whether ``spec`` is made here rather than loaded from a package."""
    return spec.op in _SOURCES


def compile_runner(spec: KernelSpec) -> Runner:
    """A runner of functions compiled with dynamic sizes, each at its first call.

    torch compiles anew for sizes of 1 and for strides that relate to sizes in another way, and raises at its limit of
    eight recompilations a code object (``fullgraph=True``; else it would go on uncompiled in silence). So inputs are
    made contiguous, and each pattern of ones, and of sizes that are constants, has code of its own.
    """
    source = _SOURCES[spec.op]
    variants: dict[tuple[object, ...], Any] = {}

    def run(inputs: list[Tensor]) -> list[Tensor]:
        plain = [None if x is None else x.contiguous() for x in inputs]
        kind: tuple[object, ...] = tuple(flag for x in plain if x is not None for flag in _ones(x))
        if source.static:
            kind += tuple(size for x in plain[:3] if x is not None for size in (x.shape[1], x.shape[3]))
        compiled = variants.get(kind)
        if compiled is None:
            compiled = variants.setdefault(kind, _compiled(source, spec))
        return list(compiled(*plain))

    return run


def _ones(x: Tensor) -> tuple[bool, ...]:
    return (x.storage_offset() == 0, *(size == 1 for size in x.shape))


def _compiled(source: _Source, spec: KernelSpec) -> Any:
    function = source.function(spec)
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, spec.op, None, function.__closure__)
    return torch.compile(own, dynamic=None if source.static else True, fullgraph=True)
