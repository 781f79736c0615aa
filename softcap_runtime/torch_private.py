"""Every private torch API that the package uses, one function each.

Each function says what is private, why it is used, and what serves when it is gone: a public path, slower.
``SOFTCAP_PUBLIC_TORCH_ONLY=1`` takes the public path everywhere, so that tests can run both.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

Runner = Callable[[list[Tensor]], list[Tensor]]


def public_only() -> bool:
    """Whether the private paths are switched off."""
    return os.environ.get("SOFTCAP_PUBLIC_TORCH_ONLY", "") == "1"


def constant_in_graphs(function: Callable[[], bool]) -> Callable[[], bool]:
    """``function``, called by dynamo as it traces, its result a constant of the graph without a guard.

    Private: the mark that ``torch.compiler.assume_constant_result`` sets, which imports the compiler to do so.
    Gone: the graph breaks at the call.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_transform(x: Tensor) -> bool:
    """Whether ``x`` is a tensor of a torch.func transform, which wraps what it stands for.

    Private: how functorch's wrappers are told. Gone: none is, and vmap refuses masks that are checked.
    """
    wrapped = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return wrapped is not None and not public_only() and bool(wrapped(x))


def unwrapped(x: Tensor) -> Tensor:
    """What is inside a tensor of torch.func's transforms, with the dimensions that vmap hides. Private: the same."""
    while in_transform(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def requires_grad_inside(x: Tensor) -> bool:
    """Whether ``x`` requires gradients at any level of torch.func; vmap's tensors hide it. Private: the same."""
    while in_transform(x) and not x.requires_grad:
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Have the program that is being traced raise RuntimeError(message) when it runs and ``condition`` is False.

    Under torch.func, where nothing is traced, it raises here.

    Private: ``torch._assert_async``; of the public checks none takes a tensor that nobody has read. Gone: bad data
    inside a graph gives a wrong mask and no error, as with the Inductor of torch before 2.9, which drops the check.
    """
    check = getattr(torch, "_assert_async", None)
    if not torch.compiler.is_compiling() and in_transform(condition):
        if not bool(unwrapped(condition).all()):
            raise RuntimeError(message)
    elif check is not None and not public_only():
        check(condition, message)


def count_threads_at_run_time() -> None:
    """Have flex kernels that this process compiles for the CPU size their buffers by the threads of the run.

    Private: the text of Inductor's flex template, which writes in the number of threads that the compiling process
    has. A process with more threads then writes past the buffers (torch 2.9 to 2.13). Raises RuntimeError where the
    text is not as it was: the build fails then, and engine="blocked" serves.
    """
    import torch._inductor.lowering  # first, as the template's module can't be imported before it
    from torch._inductor.codegen import cpp_flex_attention_template as template

    baked = "num_thread = {{num_thread}};"
    texts = {name: text for name, text in vars(template).items() if isinstance(text, str) and baked in text}
    if not texts:
        raise RuntimeError(
            f"torch {torch.__version__} does not show how its flex kernels count threads; use engine='blocked'"
        )
    for name, text in texts.items():
        setattr(template, name, text.replace(baked, "num_thread = at::get_num_threads();"))


def load_package(data: bytes) -> Runner:
    """Load an AOTInductor package for the CPU (the bytes of a .pt2 file) and return its ``run(inputs) -> outputs``.

    Private: ``torch._C._aoti.AOTIModelContainerRunnerCpu``, which loads the shared library alone in about 2 ms and
    imports no compiler. The bytes go to an anonymous file in memory, so what was verified is what is loaded. Gone or
    switched off: ``torch._inductor.aoti_load_package``, about 1 s of imports.
    """
    runner_class = getattr(getattr(torch._C, "_aoti", None), "AOTIModelContainerRunnerCpu", None)
    if runner_class is None or public_only():
        return _load_public(data)
    with _MemoryFile(_shared_library(data)) as path:
        run: Runner = runner_class(path, 1).run
        return run


def _load_public(data: bytes) -> Runner:
    from torch._inductor import aoti_load_package

    # A name on disk, since this loader asks for one that ends so; it unpacks the file and needs it no longer.
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        file.write(data)
        file.flush()
        compiled = aoti_load_package(file.name)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        outputs = compiled(*inputs)
        if outputs is None:  # a kernel that works in place
            return []
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return run


def _shared_library(package: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        if len(names) != 1:
            raise ValueError(f"package: expected one shared library inside, found {len(names)}; rebuild it")
        return archive.read(names[0])


class _MemoryFile:
    """A file in memory with a path, gone when closed (what has been loaded from it stays mapped)."""

    _counter = itertools.count(1)

    def __init__(self, data: bytes) -> None:
        self._fd = os.memfd_create("softcap_kernel", os.MFD_CLOEXEC)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def __enter__(self) -> str:
        # The loader takes a library whose path it has seen for the one it has, and descriptors are reused: spell
        # each path in its own way, a "./" for every 1 in the binary digits of a counter.
        digits = f"{next(self._counter):b}"
        return f"/proc/self/{''.join('./' if digit == '1' else '/' for digit in digits)}fd/{self._fd}"

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)


def below_autograd(recording: bool) -> AbstractContextManager[object]:
    """A context in which an operator's call goes past its own autograd kernel, to what comes next.

    That is the kernel that computes, or under torch.func the autograd kernel of a level further out. ``recording``: the
    grad mode of those levels; an autograd function, which is applied at one of them, has switched it off for all.

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

    Private: ``torch._functorch.utils.enable_single_level_autograd_function``. The dispatcher has dealt with
    torch.func when the kernel runs; the public ``apply`` would do so again, and fail. Gone: the public ``apply``,
    without torch.func.
    """
    if public_only() or not torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)  # type: ignore[no-untyped-call]
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def is_batch_of_gradients(x: Tensor) -> bool:
    """Whether ``x`` stands for many gradients at once (``is_grads_batched=True`` of ``torch.autograd.grad``).

    Private: the mark of tensors that torch's first vmap makes. Gone: such gradients raise in the engines.
    """
    marked = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
    return marked is not None and bool(marked(x))


def interpreters_active() -> bool:
    """Whether a dispatch mode, a functorch transform, autocast or forward-mode AD stands between a call and its kernel.

    Private: the depth of the dispatch-mode stack, functorch's stack, the any-device autocast flag and the level of
    ``torch.autograd.forward_ad``; no public name tells them. Gone: True, and every call goes through the torch
    operator, some microseconds slower.
    """
    return _probe()


def _make_probe() -> Callable[[], bool]:
    try:
        modes = torch._C._len_torch_dispatch_stack
        functorch = torch._C._functorch.peek_interpreter_stack
        autocast = torch._C._is_any_autocast_enabled
        forward_ad = torch.autograd.forward_ad
        modes(), functorch(), autocast(), forward_ad._current_level
    except (AttributeError, TypeError):
        return lambda: True
    return lambda: modes() > 0 or autocast() or functorch() is not None or forward_ad._current_level >= 0


_probe: Callable[[], bool] = (lambda: True) if public_only() else _make_probe()
interpreters_active.__wrapped__ = _probe  # type: ignore[attr-defined]


def _make_current_stream() -> Callable[[int], int]:
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None or public_only():
        return lambda device: int(torch.cuda.current_stream(device).cuda_stream)
    return raw


# The handle of the stream that is current on a CUDA device, given by its index.
# Private: ``torch._C._cuda_getCurrentRawStream``, which Inductor's kernels ask as well. Gone: the public stream
# object, a microsecond slower.
current_stream = _make_current_stream()


@functools.cache
def cpu_has_amx() -> bool:
    """Whether this CPU multiplies bf16 in tiles (AMX).

    Private: ``torch.cpu._is_amx_tile_supported``; no public name tells. Gone: the kernel's list of CPU flags.
    """
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if probe is not None and not public_only():
        return bool(probe())
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            return "amx_bf16" in info.read(16384)
    except OSError:
        return False


def take_for_numbers(x: Tensor, dims: list[int]) -> None:
    """Have the compiler take these sizes of ``x`` for numbers where all others are symbols.

    Private: ``torch._dynamo.mark_static``, by its module's name; torch's guide to dynamic shapes tells of it. Gone:
    they are symbols too, and torch may compile anew or refuse.
    """
    mark = getattr(torch._dynamo, "mark_static", None)
    if mark is not None and not public_only():
        mark(x, dims)


def has_flex_backward() -> bool:
    """Whether ``flex_backward`` can be called; imports nothing more than flex itself does."""
    try:
        from torch._higher_order_ops.flex_attention import flex_attention_backward  # noqa: F401
        from torch.nn.attention.flex_attention import _apply_kernel_options  # noqa: F401
    except ImportError:
        return False
    return not public_only()


def flex_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    score_mod: Callable[..., Tensor],
    score_gradient: Callable[..., Tensor],
    score_arguments: Sequence[Tensor],
    block_mask: Any,
    mask_arguments: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``flex_attention(..., scale=1.0)`` from its output and natural logsumexp, to be compiled.

    ``score_mod`` and the mask's ``mask_mod`` take their tensors as further arguments. ``score_gradient(score, b, h,
    i, j, grad, *score_arguments)`` is the product of ``grad`` and the derivative of ``score_mod``.

    Private: ``flex_attention_backward`` of ``torch._higher_order_ops``, and ``_apply_kernel_options``, which knows what
    flex's kernels ask for. flex gives its backward to autograd alone, and an operator's backward, which runs below
    autograd, has tensors only. Gone or switched off: the flex engine does not train, and other engines serve.
    """
    from torch._higher_order_ops.flex_attention import flex_attention_backward
    from torch.nn.attention.flex_attention import _apply_kernel_options

    # As autograd would give them: of the score, the four positions, each argument. Without types: torch traces it.
    def joint(score, b, h, i, j, grad, *arguments):  # type: ignore[no-untyped-def]
        return [score_gradient(score, b, h, i, j, grad, *arguments), *[None] * (4 + len(arguments))]

    options: Any = _apply_kernel_options(q, k, v, True, None)
    grads = flex_attention_backward(
        q, k, v, out, lse / math.log(2), grad_out, torch.zeros_like(lse), score_mod, joint,  # type: ignore[arg-type]
        block_mask.as_tuple(), 1.0, options, tuple(score_arguments), tuple(mask_arguments),
    )  # fmt: skip
    return grads[0], grads[1], grads[2]
