"""What each process of a data-parallel training runs, on the CPU and on GPUs."""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
from support.helpers import Block, relative_error

WORLD = 2
CONFIG = AttentionConfig(softcap=50.0, scale=0.125, window=30)


def make(cache_dir: str, device: torch.device, seed: int) -> tuple[torch.nn.Module, Tensor]:
    """Two blocks and a batch with a row for each process, the same everywhere."""
    runtime = Runtime(RuntimeSettings(cache_dir=cache_dir, jit="forbid"))
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(Block(lambda q, k, v: runtime.attention(q, k, v, CONFIG)) for _ in range(2)))
    return model.to(device), torch.randn(WORLD, 70, 128).to(device)


def loss_of(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def train(rank: int, kinds: tuple[str, ...], device_type: str, store: str, cache_dir: str, seed: int) -> None:
    """The gradients of each of ``kinds``, ddp or fsdp, are those of the whole batch in this process."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    try:
        for kind in kinds:
            model, x = make(cache_dir, torch.device(device_type), seed)
            alone = copy.deepcopy(model).to(x.device)
            loss_of(alone, x).backward()
            if kind == "ddp":
                wrapped: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(model)
            else:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                mesh = init_device_mesh(device_type, (WORLD,))
                for block in model:
                    fully_shard(block, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            loss_of(wrapped, x[rank : rank + 1]).backward()
            for mine, want in zip(wrapped.parameters(), alone.parameters(), strict=True):
                grad = mine.grad.full_tensor() if kind == "fsdp" else mine.grad
                assert bool(want.grad.any()), kind
                # Sums over the batch in another order: some float32 roundings.
                assert relative_error(grad, want.grad) <= 1e-5, kind
    finally:
        dist.destroy_process_group()
