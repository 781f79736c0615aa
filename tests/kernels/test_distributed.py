"""Training in two processes: the same gradients as in one."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import Block, relative_error
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings

WORLD = 2


def make(cache_dir: str, seed: int) -> tuple[torch.nn.Module, Tensor]:
    """Two blocks and a batch with a row for each process, the same everywhere."""
    runtime = Runtime(RuntimeSettings(cache_dir=cache_dir, jit="forbid"))
    config = AttentionConfig(softcap=50.0, scale=0.125, window=30)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        *(Block(lambda q, k, v: runtime.attention(q, k, v, config)) for _ in range(2))
    )
    return model, torch.randn(WORLD, 70, 128)


def loss_of(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def train(rank: int, kind: str, store: str, cache_dir: str, seed: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    try:
        model, x = make(cache_dir, seed)
        alone = copy.deepcopy(model)
        loss_of(alone, x).backward()
        if kind == "ddp":
            wrapped: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (WORLD,))
            for block in model:
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        loss_of(wrapped, x[rank : rank + 1]).backward()
        for mine, want in zip(wrapped.parameters(), alone.parameters(), strict=True):
            grad = mine.grad.full_tensor() if kind == "fsdp" else mine.grad
            assert bool(want.grad.any())
            # Sums over the batch in another order: some float32 roundings.
            assert relative_error(grad, want.grad) <= 1e-5
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(warm_cache: Path, tmp_path: Path, kind: str, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=warm_cache))
    config = AttentionConfig(softcap=50.0, scale=0.125)
    qkv = [y.requires_grad_() for y in torch.randn(3, 1, 2, 8, 64)]
    runtime.attention(*qkv, config)  # its kernels are there before jit="forbid" asks for them
    mp.spawn(train, (kind, str(tmp_path / "store"), str(warm_cache), seed), nprocs=WORLD)
