"""From a kernel's key to the graph that is exported for it. A new compiled kernel is added here."""

from __future__ import annotations

from collections.abc import Callable

from softcap_runtime.engines.graphs import flex
from softcap_runtime.engines.graphs.example import Graph
from softcap_runtime.engines.spec import KernelSpec

_MAKERS: dict[str, Callable[[KernelSpec], Graph]] = {
    "flex_forward": flex.flex_forward,
}


def graph(spec: KernelSpec) -> Graph:
    """The module, example inputs and dynamic sizes of ``spec``; imported only where something is built."""
    if spec.op not in _MAKERS:
        raise ValueError(f"spec.op: {spec.op!r}, expected one of {sorted(_MAKERS)}")
    return _MAKERS[spec.op](spec)
