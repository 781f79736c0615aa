"""Every private torch API that the package uses, one function each; those on transforms are in ``torch_transforms``.

Each function says what is private, why it is used, and what serves when it is gone: a public path, slower.
``SOFTCAP_PUBLIC_TORCH_ONLY=1`` takes the public path everywhere, so that tests can run both.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.compat.memory_file import MemoryFile

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


def assert_on_device(condition: Tensor, message: str) -> None:
    """Have the device of ``condition``, one bool, check it in order with its kernels; nothing waits.

    Private: ``torch._assert_async``, CUDA's device-side assertion, which the next synchronisation reports.
    Gone: data on a device aren't checked.
    """
    check = None if public_only() else getattr(torch, "_assert_async", None)
    if check is not None and condition.device.type == "cuda":
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
    with MemoryFile(_shared_library(data)) as path:
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


def _make_current_stream() -> Callable[[int], int]:
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None or public_only():
        return lambda device: int(torch.cuda.current_stream(device).cuda_stream)
    return raw


# The handle of the stream that is current on a CUDA device, given by its index.
# Private: ``torch._C._cuda_getCurrentRawStream``, which Inductor's kernels ask as well. Gone: the public stream
# object, a microsecond slower.
current_stream = _make_current_stream()


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
