"""Kernels that ``torch.compile`` makes in this process; they are not kept in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.compat.torch_private import Runner, take_for_numbers
from softcap_runtime.engines.spec import KernelSpec


class Compiled(NamedTuple):
    """``function(spec)``, compiled. ``heads``: the place of q among its inputs, with k after it, if heads and head_dim
    are to be constants of the compiled code; None if they are symbols."""

    spec: KernelSpec
    function: Callable[[KernelSpec], Callable[..., Any]]
    heads: int | None = None

    def key(self) -> None:
        """None: there are no bytes to keep (see ``Artifact``)."""

    def describe(self) -> KernelSpec:
        """See ``Artifact``."""
        return self.spec

    def build(self) -> bytes:
        """Never called, as there is no key."""
        raise AssertionError("unreachable: it has no key")

    def provenance(self) -> Mapping[str, str]:
        """Never called, as there is no key."""
        raise AssertionError("unreachable: it has no key")

    def load(self, data: bytes) -> Runner:
        """A runner that compiles it with dynamic sizes, for each kind of sizes at its first call; ``data`` is empty."""
        return _runner(self)


def _runner(source: Compiled) -> Runner:
    """A runner of functions compiled with dynamic sizes, each at its first call.

    torch recompiles for sizes of 1, for equal sizes, and for other relations of strides to sizes, and raises at eight
    recompilations of a code object (with ``fullgraph=True``; else it would silently run uncompiled). So inputs are made
    contiguous, and each pattern of ones and constants gets a code object of its own.
    """
    variants: dict[tuple[object, ...], Any] = {}

    def run(inputs: list[Tensor]) -> list[Tensor]:
        plain = [None if x is None else _plain(x) for x in inputs]
        there = [x for x in plain if x is not None]
        kind: tuple[object, ...] = tuple((x.storage_offset() == 0, *(size == 1 for size in x.shape)) for x in there)
        if source.heads is not None:
            q, k = inputs[source.heads : source.heads + 2]
            kind += (q.shape[1], k.shape[1], q.shape[3], q.shape[2] == k.shape[2])
            for x in there:
                _make_heads_static(x)
        compiled = variants.get(kind)
        if compiled is None:
            compiled = variants.setdefault(kind, _compiled(source))
        return list(compiled(*plain))

    return run


def _plain(x: Tensor) -> Tensor:
    # A contiguous tensor may have any stride in a dimension of size 1: the views normalize them. Detached, as torch
    # would also inspect the base of a view.
    return x.contiguous().view(-1).view(x.shape).detach()


def _make_heads_static(x: Tensor) -> None:
    """Make H and D of floats ``[B, H, S, D]`` and ``[B, H, S]`` constants of the compiled code."""
    if x.is_floating_point() and x.dim() >= 3:
        take_for_numbers(x, [1, 3][: x.dim() - 2])


def _compiled(source: Compiled) -> Any:
    function = source.function(source.spec)
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, source.spec.op, None, function.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)
