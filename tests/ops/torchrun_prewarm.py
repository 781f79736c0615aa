"""What each rank of ``test_ranks_prewarm_each_kernel_once`` runs: prewarm, meet in a barrier, train a step.

    torchrun ... torchrun_prewarm.py FOLDER

``FOLDER`` holds the packages that builds give, and takes in what each rank saw. All ranks but the last share a cache
folder, as ranks of one host do.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime, RuntimeSettings
from softcap_runtime.cpu.library import CpuLibrary
from softcap_runtime.store import locks

FOLDER = Path(sys.argv[1])
RANK = os.environ["RANK"]
HOST = int(int(RANK) == int(os.environ["WORLD_SIZE"]) - 1)
BUILD_S = 1.5
builds: list[str] = []
waits: list[tuple[float, float]] = []
own_hold = locks.hold


def build(artifact: CpuLibrary) -> bytes:
    builds.append(artifact.describe().op)
    time.sleep(BUILD_S)
    return (FOLDER / builds[-1]).read_bytes()


@contextlib.contextmanager
def hold(folder: Path, name: str, *longest: float) -> Iterator[float]:
    started = time.time()
    with own_hold(folder, name, *longest) as waited:
        waits.append((started, time.time()))
        yield waited


def main() -> None:
    torch.set_num_threads(1)
    CpuLibrary.build = build  # type: ignore[method-assign]
    locks.hold = hold
    config = AttentionConfig(softcap=50.0, scale=0.125)
    request = PrewarmRequest(config=config, num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32", train=True)
    runtime = Runtime(RuntimeSettings(cache_dir=FOLDER / f"cache{HOST}", engine="blocked", jit="forbid"))
    started = time.time()
    rows = runtime.prewarm([request], progress=False)
    at_barrier = time.time()
    dist.init_process_group("gloo")
    dist.barrier()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 30, 64, requires_grad=True) for heads in (4, 2, 2))
    runtime.attention(q, k, v, config).sum().backward()
    mean = q.grad.clone()
    dist.all_reduce(mean)
    seen = {
        "host": HOST,
        "started": started,
        "at barrier": at_barrier,
        "builds": builds,
        "waits": waits,
        "outcomes": {row.spec.op: row.outcome for row in rows},
        "same": torch.allclose(mean / dist.get_world_size(), q.grad),
    }
    (FOLDER / f"rank{RANK}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


main()
