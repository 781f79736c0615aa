"""Private torch functions on what is between a call and its kernel: torch.func, modes, autocast, autograd.

As in ``torch_private``, each says what is private, why it is used, and what happens if it is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from softcap_runtime.compat.torch_private import public_only


def in_transform(x: Tensor) -> bool:
    """Whether ``x`` is a wrapper tensor of a torch.func transform.

    Private: the test for functorch's wrappers. Gone: False, and vmap refuses masks whose contents are checked.
    """
    wrapped = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return wrapped is not None and not public_only() and bool(wrapped(x))


def is_numbers_alone(x: Tensor | None) -> bool:
    """Whether a kernel may read ``x`` (or it is None): it is no wrapper, as of a torch.func transform or a class with a
    ``__torch_dispatch__``, and has no tangent of forward-mode AD."""
    return x is None or (_is_read(x) and not in_transform(x) and unpack_dual(x).tangent is None)


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents of forward-mode AD.

    Private: its level; the public ``unpack_dual`` tells it of one tensor, slowly. Gone: True.
    """
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def below_autograd(recording: bool) -> AbstractContextManager[object]:
    """A context in which a call of an operator skips its autograd kernel.

    It reaches the kernel that computes or, under torch.func, the autograd kernel of the next outer level.
    ``recording``: the grad mode of the outer levels, which an autograd function, applied at one level, switches off for
    all.

    Private: ``torch._C._AutoDispatchBelowAutograd``, the name that torch's own documentation of autograd kernels
    in Python uses; there is no public one. Gone: importing the operator fails and says so.
    """
    if public_only() or not torch._C._are_functorch_transforms_active():
        return _below_autograd()
    return _on_to_outer_levels(recording)


_below_autograd = torch._C._AutoDispatchBelowAutograd


@contextmanager
def _on_to_outer_levels(recording: bool) -> Iterator[None]:
    """As torch's own ``custom_function_call`` goes on. Private: ``_set_fwd_grad_enabled`` of forward-mode AD."""
    forward_gradients = torch.autograd.forward_ad._set_fwd_grad_enabled
    with torch.set_grad_enabled(recording), forward_gradients(True), _below_autograd():
        yield


def apply_function(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Apply an autograd function inside an operator's autograd kernel, also under torch.func transforms.

    The function gets the grad mode as its first input, for its ``below_autograd``.

    Private: ``torch._functorch.utils.enable_single_level_autograd_function``, and the class that it enables. The
    dispatcher has handled torch.func before the kernel runs; the public ``apply`` would do so again, and fail. Gone:
    the public ``apply``, without torch.func.
    """
    recording = torch.is_grad_enabled()
    if public_only() or not torch._C._are_functorch_transforms_active():
        return function.apply(recording, *inputs)  # type: ignore[no-untyped-call]
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return _of_single_level(function).apply(recording, *inputs)


@functools.cache
def _of_single_level(function: type[torch.autograd.Function]) -> Any:
    """The function on the base class of ``Function``: in 2.14 the class decides if ``apply`` looks for transforms."""
    members = {name: vars(function)[name] for name in ("forward", "backward", "jvp")}
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), members)


def is_batch_of_gradients(x: Tensor) -> bool:
    """Whether ``x`` stands for many gradients at once (``is_grads_batched=True`` of ``torch.autograd.grad``).

    Private: the mark of tensors that torch's first vmap makes. Gone: such gradients raise in the engines.
    """
    marked = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
    return marked is not None and bool(marked(x))


def interpreters_active(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the operator: under a dispatch mode, a functorch transform, autocast, forward-mode
    AD or ``torch.jit.trace``, or with a tensor of a class with a ``__torch_dispatch__``, which no kernel can read.

    Private: the depth of the dispatch-mode stack, functorch's stack, the flags of autocast on any device and of
    TorchScript's tracing, and the level of ``torch.autograd.forward_ad``, which no public name tells. Gone: True, and
    every call goes through the operator, some microseconds slower.
    """
    return _probe() or not (_PLAIN.issuperset(map(type, tensors)) or all(map(_is_read, tensors)))


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _is_read(x: Tensor | None) -> bool:
    return x is None or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def _make_probe() -> Callable[[], bool]:
    try:
        modes = torch._C._len_torch_dispatch_stack
        functorch = torch._C._functorch.peek_interpreter_stack
        autocast = torch._C._is_any_autocast_enabled
        forward_ad = torch.autograd.forward_ad
        traced = torch._C._is_tracing
        modes(), functorch(), autocast(), traced(), forward_ad._current_level
    except (AttributeError, TypeError):
        return lambda: True
    return lambda: modes() > 0 or autocast() or functorch() is not None or traced() or forward_ad._current_level >= 0


_probe: Callable[[], bool] = (lambda: True) if public_only() else _make_probe()
