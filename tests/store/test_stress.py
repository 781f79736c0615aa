"""A short run of the folder stress beside it; SOFTCAP_TEST_STRESS sets its seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import HEAD_DIM, NEEDS_FLEX

from softcap_runtime import Runtime
from softcap_runtime.engines.package import Package

STRESS = Path(__file__).with_name("stress")


@NEEDS_FLEX
@pytest.mark.slow
def test_stress(base_seed: int, warm_cache: Path, runtimes: dict[str, Runtime]) -> None:
    runtimes["flex"].supply.get(Package("flex_forward", "cpu", "float32", HEAD_DIM, True))
    seconds = os.environ.get("SOFTCAP_TEST_STRESS", "6")
    options = {"--seconds": seconds, "--seed": str(base_seed), "--kernels": str(warm_cache)}
    done = subprocess.run(
        [sys.executable, str(STRESS), *(word for option in options.items() for word in option)],
        capture_output=True,
        text=True,
        check=False,
        timeout=float(seconds) + 120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for event in ("kill -9", "attention flex: right", "attention blocked: right", "kernel: loaded, disk"):
        assert event in done.stdout
