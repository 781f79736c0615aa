"""Several processes: the gradients of one in training, and kernels that are built once before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.data_parallel import CONFIG, WORLD, train
from support.helpers import package_of

from softcap_runtime import Runtime, RuntimeSettings
from softcap_runtime.cpu.library import library

RANKS = 4


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_gradients_are_those_of_one_process(warm_cache: Path, tmp_path: Path, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=warm_cache))
    qkv = [y.requires_grad_() for y in torch.randn(3, 1, 2, 8, 64)]
    runtime.attention(*qkv, CONFIG)  # its kernels are there before jit="forbid" asks for them
    mp.spawn(train, (("ddp", "fsdp"), "cpu", str(tmp_path / "store"), str(warm_cache), seed), nprocs=WORLD)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_ranks_prewarm_each_kernel_once(runtime: Runtime, tmp_path: Path) -> None:
    """Under torchrun: one rank of a host builds, no other is kept waiting for it once one stands in the barrier.

    Hosts with a cache folder each, of three ranks and of one, build for themselves; on a folder that they share they
    are as one host.
    """
    (tmp_path / "attention").write_bytes(package_of(runtime, library()))
    script = Path(__file__).with_name("torchrun_prewarm.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    for host, size in ((0, RANKS - 1), (1, 1)):
        own = [rank for rank in ranks if rank["host"] == host]
        assert len(own) == size
        assert [op for rank in own for op in rank["builds"]] == ["attention"]
        outcomes = Counter((op, outcome) for rank in own for op, outcome in rank["outcomes"].items())
        assert outcomes == {("attention", how): n for how, n in (("built", 1), ("loaded", len(own) - 1)) if n}
    assert all(rank["same"] for rank in ranks)
    first_at_barrier = min(rank["at barrier"] for rank in ranks)
    # Ranks start seconds apart on a busy machine: only who asked before the end of a build waited at all.
    assert all(end <= max(first_at_barrier, start) + 1.0 for rank in ranks for start, end in rank["waits"])
