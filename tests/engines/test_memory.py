"""The blocked engine holds blocks, never S x S of anything, forward and backward."""

from __future__ import annotations

import subprocess
import sys

from softcap_runtime import Runtime

LENGTH = 8192
STEP = """
import os, sys, torch
from pathlib import Path
from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
torch.set_num_threads(2)
runtime = Runtime(RuntimeSettings(cache_dir=sys.argv[1], engine="blocked", jit="forbid"))
def step(softcap, packed, length):
    config = AttentionConfig(softcap=softcap, scale=0.125)
    masks = {"document_ids": (torch.arange(length) // 3000)[None]} if packed else {}
    q, k, v = (torch.randn(1, heads, length, 64).bfloat16().requires_grad_() for heads in (2, 1, 1))
    grad = torch.randn(q.shape).bfloat16()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = status("VmRSS")
    runtime.attention(q, k, v, config, **masks).backward(grad)
    return status("VmHWM") - before
for softcap in (50.0, None):
    for packed in (False, True):
        if os.fork() == 0:  # with no memory that another step has left
            step(softcap, packed, 256)
            print(softcap, packed, step(softcap, packed, int(sys.argv[2])), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


def test_a_step_holds_nothing_as_large_as_the_logits(runtime: Runtime) -> None:
    """Output and gradients, 5 MB, included. The logits in bfloat16 are 268 MB."""
    words = [str(runtime.settings.cache_dir), str(LENGTH)]
    done = subprocess.run([sys.executable, "-c", STEP, *words], capture_output=True, text=True, check=True, timeout=300)
    steps = [line.split() for line in done.stdout.splitlines()]
    assert [step[:2] for step in steps] == [[cap, packed] for cap in ("50.0", "None") for packed in ("False", "True")]
    assert all(int(most) <= 2 * 2 * LENGTH**2 / 8 for *_, most in steps), steps
