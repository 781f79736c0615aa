"""A short run of scripts/stress.py; SOFTCAP_TEST_STRESS sets its seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "stress.py"


@pytest.mark.slow
def test_stress(base_seed: int, warm_cache: Path) -> None:
    seconds = os.environ.get("SOFTCAP_TEST_STRESS", "6")
    options = {"--seconds": seconds, "--seed": str(base_seed), "--kernels": str(warm_cache)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *(word for option in options.items() for word in option)],
        capture_output=True,
        text=True,
        check=False,
        timeout=float(seconds) + 120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for event in ("kill -9", "attention flex: right", "attention blocked: right", "kernel: loaded, disk"):
        assert event in done.stdout
