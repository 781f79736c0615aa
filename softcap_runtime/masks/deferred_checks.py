"""``checked``: a check of data that cannot be read now, because they are on a GPU or a program is being traced.

In a traced program the check is an operator of our own, ``torch.ops.softcap_runtime.checked``: Inductor would put
``torch._assert_async`` into multi-threaded loops, where its exception ends the process. The program continues with
the operator's result, so the check is never removed as unused.

On a GPU the check runs there, in order with the kernels, and nothing waits for it. A condition that is false is a
device-side assertion, which CUDA reports at the next synchronization, before any result can be read.
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

# Tensors on a GPU that were checked already, by id, as one mask serves many layers: each with its version, which grows
# when its data change, and its checks.
_running: dict[int, tuple[weakref.ref[Tensor], int, set[object]]] = {}


def checked(value: Tensor, condition: Callable[[], Tensor], message: str, bounds: tuple[object, ...] = ()) -> Tensor:
    """``value``, after a check that ``condition()`` is true everywhere. Use the result in place of ``value``.

    If it is not: RuntimeError(message) when a traced program runs on the CPU, or at once under ``torch.func``; a
    device-side assertion on a GPU. ``bounds``: what ``condition`` depends on besides ``value`` and ``message``.
    """
    if value.device.type != "cpu" and data_is_there(value):
        if not _is_running(value, (message, *bounds)):
            assert_on_device(condition().all(), message)
        return value
    result: Tensor = torch.ops.softcap_runtime.checked(value, condition().all(), message)
    return result


def next_to(x: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``compare`` each number of ``[B, S]`` with the one before it: bool ``[B, S]``, True for the first of a row.

    For conditions in graphs of any length: slicing to S - 1 would make short rows a special case.
    """
    first = torch.arange(x.shape[1], device=x.device) == 0
    return compare(x, x.roll(1, 1)) | first


def _is_running(value: Tensor, check: object) -> bool:
    """Whether ``check`` was started for these data before; notes that it is now."""
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
