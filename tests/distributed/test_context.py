"""One sequence over 2 and 4 processes: every case of ``ranks.py`` in one launch each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist


def launch(ranks: int, script: str, *arguments: str, cache: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), *arguments],
        env={
            **os.environ,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "SOFTCAP_CACHE_DIR": str(cache),
        },
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_case(ranks: int, warm_cache: Path) -> None:
    assert "passed" in launch(ranks, "ranks.py", cache=warm_cache)
