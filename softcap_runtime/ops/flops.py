"""The operator's FLOP formulas, registered with ``torch.utils.flop_counter`` once somebody imports it.

Importing that module imports Triton if it is installed, which would be half of our own import time on a machine with a
GPU (136 of 290 ms, torch 2.11), and few processes count FLOPs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def _forward(q_shape: Any, k_shape: Any, v_shape: Any, *rest: Any, **named: Any) -> int:
    """As torch counts its own attention: two products of every query with every key."""
    batch, heads, q_len, head_dim = q_shape
    return 4 * batch * heads * q_len * k_shape[2] * head_dim


def _backward(grad_shape: Any, q_shape: Any, k_shape: Any, *rest: Any, **named: Any) -> int:
    """Five products of every query with every key."""
    batch, heads, q_len, head_dim = q_shape
    return 10 * batch * heads * q_len * k_shape[2] * head_dim


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.softcap_runtime.attention)(_forward)
    counter.register_flop_formula(torch.ops.softcap_runtime.attention_backward)(_backward)


class _WhenImported(MetaPathFinder):
    """Comes before the usual finders until the counter is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The counter's own spec, whose loader registers the formulas at its end; None for any other module."""
        if name != COUNTER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_formulas() -> None:
    """Register the formulas with torch's counter, now or as soon as it is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
