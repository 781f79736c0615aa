"""How long a fresh process takes to its first result, everything warm on disk."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import peers
from benchmarks.report import Report
from softcap_runtime import AttentionConfig, PrewarmRequest

OURS = """
import time, torch
q = torch.randn(1, 8, 256, 64); k = torch.randn(1, 4, 256, 64); v = torch.randn(1, 4, 256, 64)
a = time.perf_counter()
from softcap_runtime import AttentionConfig, Runtime
b = time.perf_counter()
Runtime.get().attention(q, k, v, AttentionConfig(softcap=50.0, scale=0.125))
c = time.perf_counter()
import sys
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
print(b - a, c - b)
"""
STOCK = """
import time, torch
q = torch.randn(1, 8, 256, 64); k = torch.randn(1, 4, 256, 64); v = torch.randn(1, 4, 256, 64)
a = time.perf_counter()
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
b = time.perf_counter()
mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu")
def cap(score, b, h, i, j): return 50.0 * torch.tanh(score / 50.0)
with torch.no_grad():
    torch.compile(flex_attention)(q, k, v, score_mod=cap, block_mask=mask, scale=0.125, enable_gqa=True)
c = time.perf_counter()
print(b - a, c - b)
"""
TORCH = "import time; a = time.perf_counter(); import torch; print(time.perf_counter() - a, 0)"


def measure(report: Report) -> None:
    """Alternate fresh processes of ours and of stock compiled flex with a warm Inductor cache."""
    config = AttentionConfig(softcap=50.0, scale=0.125)
    request = PrewarmRequest(config=config, num_heads=8, num_kv_heads=4, head_dim=64, dtype="float32")
    peers.runtime().prewarm([request], progress=False)
    with TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "SOFTCAP_CACHE_DIR": str(peers.runtime().settings.cache_dir),
        }
        programs = {"softcap_runtime": OURS, "stock compiled flex": STOCK, "import torch": TORCH}
        for program in programs.values():
            _run(program, environment)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(report.rounds(7)):
            for name, program in programs.items():
                taken[name].append(_run(program, environment))
    medians = {
        name: (statistics.median(a for a, _ in runs), statistics.median(b for _, b in runs))
        for name, runs in taken.items()
    }
    ours, stock = medians["softcap_runtime"], medians["stock compiled flex"]
    bare = medians["import torch"][0]
    rows = [
        {"what": "import (after import torch)", "ours ms": ours[0] * 1e3, "stock ms": stock[0] * 1e3},
        {"what": "to the first result", "ours ms": ours[1] * 1e3, "stock ms": stock[1] * 1e3},
        {"what": "both", "ours ms": sum(ours) * 1e3, "stock ms": sum(stock) * 1e3},
    ]
    for row in rows:
        row["stock / ours"] = row["stock ms"] / row["ours ms"]  # type: ignore[operator]
    note = f"import torch itself: {bare * 1e3:.0f} ms; ours adds {ours[0] / bare:.0%} to it. To reach: first result "
    report.table("startup", rows, note + "50 ms and stock / 40, both 150 ms, import 25 %")


def _run(program: str, environment: dict[str, str]) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)
