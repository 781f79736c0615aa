"""What ``softcap-runtime inspect`` tells of the GPUs: their limits, and the kernel options chosen for them."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

from softcap_runtime.kernels import gpu_options
from softcap_runtime.kernels.gpu_options import DeviceLimits
from softcap_runtime.kernels.key import dtype_name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuKernel(_Frozen):
    """One Triton kernel's options on a device; Triton compiles one kernel for each, they are part of its key.

    ``block_m`` query rows and ``block_n`` keys a block, ``shared_bytes`` of shared memory at most.
    """

    kernel: str
    dtype: str
    head_dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    shared_bytes: int


class Gpu(_Frozen):
    """A device: ``shared_bytes`` a block may have; ``tanh`` is ``approximate`` under ``SOFTCAP_APPROX``."""

    device: str
    name: str
    capability: str
    shared_bytes: int
    multiprocessors: int
    tanh: str
    kernels: list[GpuKernel]


def gpus(softcap_approx: bool) -> list[Gpu]:
    """The CUDA devices that this process sees."""
    return [
        describe(
            f"cuda:{index}",
            torch.cuda.get_device_name(index),
            gpu_options.device_limits(index),
            softcap_approx,
        )
        for index in range(torch.cuda.device_count())
    ]


def describe(device: str, name: str, limits: DeviceLimits, softcap_approx: bool) -> Gpu:
    """A device with ``limits``."""
    return Gpu(
        device=device,
        name=name,
        capability="{}.{}".format(*limits.capability),
        shared_bytes=limits.shared_bytes,
        multiprocessors=limits.multiprocessors,
        tanh="approximate" if softcap_approx else "exact",
        kernels=[
            GpuKernel(
                kernel=direction,
                dtype=dtype_name(dtype),
                head_dim=head_dim,
                **options._asdict(),
                shared_bytes=gpu_options.shared_bytes(options, dtype, head_dim, direction),
            )
            for dtype, head_dim, direction, options in gpu_options.table(limits)
        ],
    )
