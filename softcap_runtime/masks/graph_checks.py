"""``torch.ops.softcap_runtime.checked``: a check of data that nobody can look at yet, as part of a traced program.

An operator of our own, since Inductor puts ``torch._assert_async`` into loops of several threads, where what it throws
ends the process. What the check lets through is what the program goes on with, so it is never left out as unused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("softcap_runtime", "FRAGMENT")
_LIBRARY.define("checked(Tensor value, Tensor condition, str message) -> Tensor")


def checked(value: Tensor, condition: Tensor, message: str) -> Tensor:
    """``value``; the program that is traced raises RuntimeError(message) when it runs and any ``condition`` is False.

    Use the result in the place of ``value``. Where nothing is traced (``torch.func``) it raises at once.
    """
    result: Tensor = torch.ops.softcap_runtime.checked(value, condition.all(), message)
    return result


def _checked(value: Tensor, condition: Tensor, message: str) -> Tensor:
    # A program that was exported on the CPU may run on a GPU, which nobody waits for.
    if condition.device.type == "cpu" and not bool(condition):
        raise RuntimeError(message)
    return value.clone(memory_format=torch.contiguous_format)


def _fake(value: Tensor, condition: Tensor, message: str) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _of_samples(
    info: Any, in_dims: tuple[int | None, ...], value: Tensor, condition: Tensor, message: str
) -> tuple[Tensor, int | None]:
    return checked(value, condition, message), in_dims[0]


_LIBRARY.impl("checked", _checked, "CompositeExplicitAutograd")
torch.library.register_fake("softcap_runtime::checked", _fake, lib=_LIBRARY)
if hasattr(torch.library, "register_vmap"):  # torch 2.4 runs sample by sample, and warns
    torch.library.register_vmap("softcap_runtime::checked", _of_samples, lib=_LIBRARY)
