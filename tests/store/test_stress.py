"""A short run of scripts/stress.py; SOFTCAP_TEST_STRESS sets its seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "stress.py"


@pytest.mark.slow
def test_stress(base_seed: int) -> None:
    seconds = os.environ.get("SOFTCAP_TEST_STRESS", "8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seconds", seconds, "--seed", str(base_seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=float(seconds) + 120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9" in done.stdout
