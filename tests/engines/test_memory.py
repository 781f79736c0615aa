"""The blocked engine holds blocks, never S x S of anything, forward and backward."""

from __future__ import annotations

import subprocess
import sys

import pytest

from softcap_runtime import Runtime

LENGTH = 8192
STEP = """
import sys, torch
from pathlib import Path
from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
torch.set_num_threads(2)
runtime = Runtime(RuntimeSettings(cache_dir=sys.argv[1], engine="blocked", jit="forbid"))
softcap, packed, length = float(sys.argv[2]) or None, sys.argv[3] == "packed", int(sys.argv[4])
config = AttentionConfig(softcap=softcap, scale=0.125)
def step(length):
    masks = {"document_ids": (torch.arange(length) // 3000)[None]} if packed else {}
    q, k, v = (torch.randn(1, heads, length, 64).bfloat16().requires_grad_() for heads in (2, 1, 1))
    grad = torch.randn(q.shape).bfloat16()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = status("VmRSS")
    runtime.attention(q, k, v, config, **masks).backward(grad)
    return status("VmHWM") - before
step(256)
print(step(length))
"""


@pytest.mark.parametrize("softcap", [50.0, 0.0])
@pytest.mark.parametrize("mask", ["causal", "packed"])
def test_a_step_holds_nothing_as_large_as_the_logits(runtime: Runtime, mask: str, softcap: float) -> None:
    """Output and gradients, 5 MB, included. The logits in bfloat16 are 268 MB."""
    words = [str(runtime.settings.cache_dir), str(softcap), mask, str(LENGTH)]
    done = subprocess.run([sys.executable, "-c", STEP, *words], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) <= 2 * 2 * LENGTH**2 / 8
