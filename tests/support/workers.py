"""Processes of a test. Without torch: a spawned one imports this anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def results_of(workers: Sequence[BaseProcess], results: Any, timeout: float = 120) -> list[Any]:
    """Start all, take what each puts on the queue ``results``, and see that each ends well."""
    for worker in workers:
        worker.start()
    found = [results.get(timeout=timeout) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return found


def launch(ranks: int, script: Path, *arguments: str, cache: Path, device: str = "cpu") -> str:
    """What ``script`` prints on all ranks of one host under torchrun, each of which must end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "SOFTCAP_CACHE_DIR": str(cache),
        "SOFTCAP_TEST_DEVICE": device,
    }
    done = subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout
