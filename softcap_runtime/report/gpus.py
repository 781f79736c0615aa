"""What ``softcap-runtime inspect`` shows of the GPUs: their limits, and the kernel options chosen for them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from softcap_runtime.cuda import options as gpu_options
from softcap_runtime.cuda import tuned
from softcap_runtime.cuda.options import BlockOptions, DeviceLimits, Direction
from softcap_runtime.engines.spec import dtype_name
from softcap_runtime.store import Store
from softcap_runtime.store.report import Frozen


class GpuKernel(Frozen):
    """The options of one Triton kernel on a device, which are part of its key.

    ``block_m`` query rows and ``block_n`` keys per block, at most ``shared_bytes`` of shared memory. ``tuned``: they
    were measured on this machine, by ``prewarm --tune``.
    """

    kernel: str
    dtype: str
    head_dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    shared_bytes: int
    tuned: bool


class Gpu(Frozen):
    """A device; ``shared_bytes``: the limit per block; ``tanh``: ``exact``, or ``approximate`` (``SOFTCAP_APPROX``)."""

    device: str
    name: str
    capability: str
    shared_bytes: int
    multiprocessors: int
    tanh: str
    kernels: list[GpuKernel]


# The measured options of a kernel, by dtype, head_dim and direction; None if nothing was measured.
Tuned = Callable[[torch.dtype, int, Direction], BlockOptions | None]


def gpus(store: Store, softcap_approx: bool) -> list[Gpu]:
    """The CUDA devices that this process sees."""
    return [
        describe(
            f"cuda:{index}",
            torch.cuda.get_device_name(index),
            gpu_options.device_limits(index),
            softcap_approx,
            functools.partial(tuned.read, store, gpu_options.device_limits(index), index),
        )
        for index in range(torch.cuda.device_count())
    ]


def describe(device: str, name: str, limits: DeviceLimits, softcap_approx: bool, measured: Tuned) -> Gpu:
    """The description of a device with ``limits``."""

    def kernel(dtype: torch.dtype, head_dim: int, direction: Direction, chosen: BlockOptions) -> GpuKernel:
        best = measured(dtype, head_dim, direction)
        options = best or chosen
        return GpuKernel(
            kernel=direction,
            dtype=dtype_name(dtype),
            head_dim=head_dim,
            **options._asdict(),
            shared_bytes=gpu_options.shared_bytes(options, dtype, head_dim, direction),
            tuned=best is not None,
        )

    return Gpu(
        device=device,
        name=name,
        capability="{}.{}".format(*limits.capability),
        shared_bytes=limits.shared_bytes,
        multiprocessors=limits.multiprocessors,
        tanh="approximate" if softcap_approx else "exact",
        kernels=[kernel(*row) for row in gpu_options.table(limits)],
    )
