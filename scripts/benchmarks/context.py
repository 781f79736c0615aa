"""Context: one sequence over several ranks, every way side by side; a process for each GPU, or two on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.report import Report


def measure(report: Report) -> None:
    """Launch the ranks, which measure, and show what they found."""
    cuda = report.device == "cuda"
    ranks = torch.cuda.device_count() if cuda else 2
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = Path(__file__).with_name("context_ranks.py")
        environment = {**os.environ} if cuda else {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(
            [*launch, str(script), report.device, "quick" if report.quick else "full", str(found)],
            env=environment,
            check=True,
        )
        rows = json.loads(found.read_text())
    report.about["ranks"] = f"{ranks} x {torch.cuda.get_device_name(0) if cuda else 'CPU, one thread each'}"
    report.table(
        "context",
        rows,
        "ms: the slowest rank's; forward and both: each call waited for; queued: calls in a row that are not; "
        "x: against its own computing, all keys there, in the same round; MB: received forward by the rank that "
        "receives most; pairs: visible pairs of the busiest rank over the mean; GB: peak beyond what is held before; "
        "error: of the output, relative, against one process",
    )
