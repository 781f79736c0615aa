"""Times a GPU kernel under the options near those that its device's limits suggest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.cuda.cubin import CubinSpec
from softcap_runtime.cuda.driver import LoadedCubin
from softcap_runtime.cuda.kernel import GpuKernel
from softcap_runtime.cuda.options import BlockOptions, Direction, choose, device_limits, variants
from softcap_runtime.cuda.parameters import Function
from softcap_runtime.cuda.triton.attention import bind_forward
from softcap_runtime.cuda.triton.gradient import bind_backward

log = logging.getLogger(__name__)

ROUNDS = 15
DECODED_KEYS, DECODED_BATCH = 8192, 8
# Other options may change the order of a sum, and no more: bf16's rounding, with room.
CLOSE = 1e-2


class Shape(NamedTuple):
    """The calls to be fast for: causal, ``length`` tokens, a batch of one."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    length: int
    scale: float
    softcap: float | None


class Trial(NamedTuple):
    """Options and what a call takes under them."""

    options: BlockOptions
    milliseconds: float


class _Kernels(NamedTuple):
    """``GpuKernels`` with the ``options`` of one kernel ``given``; ``loaded`` is what the variants share."""

    given: tuple[Direction, BlockOptions]
    loaded: dict[CubinSpec, LoadedCubin]

    def function(self, spec: CubinSpec) -> Function:
        found = self.loaded.get(spec)
        if found is None:
            kernel = GpuKernel(spec, torch.cuda.current_device())
            found = self.loaded[spec] = kernel.load(kernel.build())
        return found

    def options(self, q: Tensor, direction: Direction) -> BlockOptions:
        if direction == self.given[0]:
            return self.given[1]
        return choose(device_limits(q.device.index), q.dtype, q.shape[-1], direction)


def trials(shape: Shape, direction: Direction, pool: Executor) -> list[Trial]:
    """Every variant of a kernel that runs and agrees with the first, the one that the device's limits suggest.

    ``pool`` compiles them, several at once; they are timed one after the other. A variant that fails is logged.
    """
    loaded: dict[CubinSpec, LoadedCubin] = {}
    try:
        return _trials(shape, direction, pool, loaded)
    finally:
        if loaded:
            torch.cuda.synchronize(shape.device)
        for kernel in loaded.values():  # most of them lose, and what is kept is loaded from the cache
            kernel.unload()


def _trials(shape: Shape, direction: Direction, pool: Executor, loaded: dict[CubinSpec, LoadedCubin]) -> list[Trial]:
    limits = device_limits(shape.device.index or 0)
    tensors = _tensors(shape, direction)

    def prepare(options: BlockOptions) -> Callable[[], tuple[Tensor, ...]] | None:
        try:
            with torch.cuda.device(shape.device):
                return _bind(shape, _Kernels((direction, options), loaded), direction, tensors)
        except Exception as error:  # a compiler's or the driver's, of any type
            log.info("%s with %s does not run: %s", direction, options, error)
            return None

    options = variants(limits, shape.dtype, shape.head_dim, direction)
    # The first alone: it builds what all of them share.
    runs = [prepare(options[0]), *pool.map(prepare, options[1:])]
    ready = [(one, run) for one, run in zip(options, runs, strict=True) if run]
    if not ready:
        raise RuntimeError(f"no variant of the {direction} kernel runs on {shape.device}")
    found: list[Trial] = []
    with torch.cuda.device(shape.device):
        want = [x.clone() for x in ready[0][1]()]
        for one, run in ready:
            if all(_close(a, b) for a, b in zip(run(), want, strict=True)):
                found.append(Trial(one, _milliseconds(run)))
            else:
                log.warning("%s with %s differs from %s and is not used", direction, one, ready[0][0])
    return found


def _tensors(shape: Shape, direction: Direction) -> list[Tensor]:
    """grad_out, q, k, v as projections make them."""
    batch = DECODED_BATCH if direction == "decode" else 1
    rows, keys = (1, DECODED_KEYS) if direction == "decode" else (shape.length, shape.length)

    def draw(length: int, heads: int) -> Tensor:
        x = torch.randn(batch, length, heads, shape.head_dim, device=shape.device)
        return x.to(shape.dtype).transpose(1, 2)

    return [
        draw(rows, shape.num_heads),
        draw(rows, shape.num_heads),
        draw(keys, shape.num_kv_heads),
        draw(keys, shape.num_kv_heads),
    ]


def _bind(
    shape: Shape, kernels: _Kernels, direction: Direction, tensors: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that spends its time in the kernel: the forward, or the whole backward."""
    grad_out, q, k, v = tensors
    how: dict[str, Any] = {"kernels": kernels, "scale": shape.scale, "softcap": shape.softcap, "gluon": False}
    how["right"] = k.shape[2] - q.shape[2] + 1
    attend = bind_forward(q, k, v, **how)
    if direction in ("forward", "decode"):
        return lambda: attend(q, k, v)[:1]
    out, lse = attend(q, k, v)
    differentiate = bind_backward(grad_out, q, k, v, out, lse, **how)
    return lambda: differentiate(grad_out, q, k, v, out, lse)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b.double()).norm() <= CLOSE * b.double().norm())


def _milliseconds(run: Callable[[], Any]) -> float:
    """The median of a call's times on the device."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()  # type: ignore[no-untyped-call]
        run()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()  # type: ignore[no-untyped-call]
        taken.append(begin.elapsed_time(end))  # type: ignore[no-untyped-call]
    return sorted(taken)[ROUNDS // 2]
