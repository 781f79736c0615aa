"""``checked``: a check of data that nobody can look at now, as they lie on a GPU or a program is being traced.

In a traced program the check is ``torch.ops.softcap_runtime.checked``, an operator of our own: Inductor puts
``torch._assert_async`` into loops of several threads, where what it throws ends the process. What the check lets
through is what the program goes on with, so it is never left out as unused.

On a GPU the check runs there, in order with the kernels. Nothing waits for it: a condition that doesn't hold is a
device-side assertion, which CUDA reports at the next synchronisation, before any result can be read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.compat.torch_private import assert_on_device
from softcap_runtime.masks.readable import data_is_there

_LIBRARY = torch.library.Library("softcap_runtime", "FRAGMENT")
_LIBRARY.define("checked(Tensor value, Tensor condition, str message) -> Tensor")

# Tensors on a GPU whose checks run already, by id: one mask serves many layers. Each with its version, which grows
# when its data change, and what was checked.
_running: dict[int, tuple[weakref.ref[Tensor], int, set[object]]] = {}


def checked(value: Tensor, condition: Callable[[], Tensor], message: str, bounds: tuple[object, ...] = ()) -> Tensor:
    """``value``, once it is made sure that every element of ``condition()`` holds. Use the result in its place.

    In a traced program on the CPU RuntimeError(message) when it runs, under ``torch.func`` at once; on a GPU a
    device-side assertion. ``bounds``: what ``condition`` depends on besides ``value`` and ``message``.
    """
    if value.device.type != "cpu" and data_is_there(value):
        if not _is_running(value, (message, *bounds)):
            assert_on_device(condition().all(), message)
        return value
    result: Tensor = torch.ops.softcap_runtime.checked(value, condition().all(), message)
    return result


def next_to(x: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``compare`` of each number of ``[B, S]`` with the one before: bool ``[B, S]``, True for the first of a row.

    For conditions: nothing is sliced, as S - 1 would make short rows a case of their own in a graph of any length.
    """
    first = torch.arange(x.shape[1], device=x.device) == 0
    return compare(x, x.roll(1, 1)) | first


def _is_running(value: Tensor, check: object) -> bool:
    """Whether ``check`` of these data was started before; from now on it was."""
    if value.is_inference():  # counts no versions
        return False
    key, version = id(value), value._version
    found = _running.get(key)
    if found is None or found[0]() is not value or found[1] != version:
        _running[key] = found = weakref.ref(value, lambda _: _running.pop(key, None)), version, set()
    before = check in found[2]
    found[2].add(check)
    return before


def _checked(value: Tensor, condition: Tensor, message: str) -> Tensor:
    if condition.device.type != "cpu":
        assert_on_device(condition, message)
    elif not bool(condition):
        raise RuntimeError(message)
    return value.clone(memory_format=torch.contiguous_format)


def _fake(value: Tensor, condition: Tensor, message: str) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _of_samples(
    info: Any, in_dims: tuple[int | None, ...], value: Tensor, condition: Tensor, message: str
) -> tuple[Tensor, int | None]:
    return checked(value, lambda: condition, message), in_dims[0]


_LIBRARY.impl("checked", _checked, "CompositeExplicitAutograd")
torch.library.register_fake("softcap_runtime::checked", _fake, lib=_LIBRARY)
if hasattr(torch.library, "register_vmap"):  # torch 2.4 runs sample by sample, and warns
    torch.library.register_vmap("softcap_runtime::checked", _of_samples, lib=_LIBRARY)
