"""One sequence over two GPUs by NCCL: the cases of ``tests/distributed/ranks.py``, and what only ranks of devices show.

SOFTCAP_TEST_SEVERAL=cpu runs them over two CPU ranks by gloo instead, to try the tests themselves.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.workers import launch

DEVICE = os.environ.get("SOFTCAP_TEST_SEVERAL", "cuda")
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.slow,
]
HERE = Path(__file__).parent
RANKS = HERE.parent / "distributed" / "ranks.py"
CASES = [
    "on_gpus_as_on_one",
    "every_combination",
    "heads_without_repetition_are_bit_equal",
    "stages_and_half_precision",
    "inner_rows_between_outer_ones",
    "bytes_on_the_wire",
    "whole_again",
    "under_compile_checkpoint_and_autocast",
    "ranks_that_disagree_are_told",
    "a_missing_kernel_raises_before_anything_is_sent",
    "a_hugging_face_model",
    "fully_sharded_parameters_beside_the_context",
    "dtensors",
    "context_parallel_of_torch_is_refused",
    "prewarming_builds_each_kernel_once",
    pytest.param(
        "the_host_never_waits_inside_a_layer",
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has nothing to wait for"),
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, cache_dir: Path) -> None:
    assert f"{case}: passed" in launch(2, RANKS, case, cache=cache_dir, device=DEVICE)


def test_a_killed_rank_ends_the_other(cache_dir: Path) -> None:
    """Without torchrun, which ends the others itself. The error is gloo's, NCCL's, or that of torch's watchdog."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "SOFTCAP_CACHE_DIR": str(cache_dir),
        "SOFTCAP_TEST_DEVICE": DEVICE,
        "SOFTCAP_TEST_COLLECTIVE_SECONDS": "20",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # the process ends where a collective failed, and cleans nothing up
        # Else torch waits another minute after the timeout, for what it writes of the collectives before.
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), "a_rank_is_killed"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].wait(timeout=200) == -9, ranks[1].communicate()[0][-5000:]
        said = ranks[0].communicate(timeout=45)[0]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode not in (0, -9), said[-5000:]
    words = ("closed by peer", "reset by peer", "remote process exited", "collective operation timeout")
    assert any(text in said for text in words), said[-5000:]


def test_training_over_two_gpus_is_that_of_one(cache_dir: Path, tmp_path: Path) -> None:
    """The demo itself raises where the two loss curves part by 1e-3."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    script = HERE.parents[1] / "scripts" / "train_demo.py"
    how = ("--context-parallel", "2", "--steps", "20", "--seed", "3", "--out", str(tmp_path / "curves.png"))
    assert "largest difference" in launch(2, script, *how, cache=cache_dir, device=DEVICE)
