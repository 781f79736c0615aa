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
    """A compiled runner with dynamic sizes; it compiles at its first call, and for a size of 1 once more.

    ``fullgraph=True`` makes torch raise at its recompile limit, where it would go on uncompiled in silence.
    """
    function = _FUNCTIONS[spec.op]
    assert isinstance(function, FunctionType)
    # Code of its own: torch counts recompilations per code object, and one spec's must not use up another's.
    own = FunctionType(function.__code__.replace(), function.__globals__, spec.op, None, function.__closure__)
    compiled: Any = torch.compile(own, dynamic=True, fullgraph=True)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        return list(compiled(*inputs))

    return run
