"""Training: forward + backward against the peers, memory, windows, and what the softcap costs."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.report import Report, side_by_side

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 256
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(report: Report) -> None:
    """All the training figures."""
    _steps(report)
    _softcap_cost(report)
    _window(report)
    _memory(report)


def step(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward; the gradients."""
    return torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def implementations(length: int, dtype: torch.dtype) -> dict[str, Attention]:
    """Ours and the peers that have a backward on the CPU."""
    mask = peers.additive(length, dtype)
    dense = peers.compiled_dense()
    return {
        "softcap_runtime": peers.ours,
        "compiled dense": lambda q, k, v: dense(q, k, v, mask),
        "Hugging Face eager": lambda q, k, v: peers.eager(q, k, v, mask),
    }


def _steps(report: Report) -> None:
    rows: list[dict[str, Any]] = []
    for length in (256,) if report.quick else (256, 2048):
        for dtype in (torch.bfloat16, torch.float32):
            rows += _step_rows(report, length, dtype)
    note = "ratio: of its time to ours. To reach at 2,048: bf16 2.4 and 4.5, float32 2 and 2.8; at 256: 1"
    report.table("forward + backward", rows, note)


def _step_rows(report: Report, length: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    q, k, v = peers.inputs(1, HEADS, KV_HEADS, length, HEAD_DIM, dtype, grad=True)
    grad = torch.randn(1, length, HEADS, HEAD_DIM).to(dtype).transpose(1, 2)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    true = torch.autograd.grad(
        peers.reference.attention(*wide, peers.causal(length), scale=HEAD_DIM**-0.5, softcap=peers.SOFTCAP)[0],
        wide,
        grad.double(),
    )
    steps = {
        name: lambda attention=attention: step(attention, q, k, v, grad)
        for name, attention in implementations(length, dtype).items()
    }
    errors = {name: max(peers.error(a, b) for a, b in zip(run(), true, strict=True)) for name, run in steps.items()}
    times = side_by_side(steps, report.rounds(9 if length > 1000 else 31))
    return [
        {
            "what": f"S{length} {str(dtype).removeprefix('torch.')}",
            "who": who,
            "ms": seconds * 1e3,
            "ratio": seconds / times["softcap_runtime"],
            "gradient error": errors[who],
        }
        for who, seconds in times.items()
    ]


def _softcap_cost(report: Report) -> None:
    length = 256 if report.quick else 2048
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = peers.inputs(1, HEADS, KV_HEADS, length, HEAD_DIM, dtype)
        times = side_by_side(
            {
                "capped": lambda q=q, k=k, v=v: peers.ours(q, k, v, "blocked"),
                "uncapped": lambda q=q, k=k, v=v: peers.ours(q, k, v, "blocked", softcap=None),
            },
            report.rounds(15),
        )
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "capped ms": times["capped"] * 1e3,
                "uncapped ms": times["uncapped"] * 1e3,
                "ratio": times["capped"] / times["uncapped"],
            }
        )
    report.table("what the softcap costs the blocked engine, forward", rows, f"S{length}. To reach: 1.08")


def _window(report: Report) -> None:
    length, window = (1024, 128) if report.quick else (8192, 1024)
    q, k, v = peers.inputs(1, HEADS, KV_HEADS, length, HEAD_DIM, torch.bfloat16, grad=True)
    grad = torch.randn(1, length, HEADS, HEAD_DIM).bfloat16().transpose(1, 2)
    times = side_by_side(
        {
            "window": lambda: step(lambda *t: peers.ours(*t, window=window), q, k, v, grad),
            "global": lambda: step(peers.ours, q, k, v, grad),
        },
        report.rounds(3),
    )
    row = {name + " ms": seconds * 1e3 for name, seconds in times.items()}
    row["ratio"] = times["global"] / times["window"]
    report.table(f"S{length} bf16, window {window}, forward + backward", [row], "to reach: 3")


def _memory(report: Report) -> None:
    lengths = (512, 1024) if report.quick else (4096, 8192)
    rows: list[dict[str, Any]] = []
    for who in ("softcap_runtime", "compiled dense"):
        for length in lengths:
            done = subprocess.run(
                [sys.executable, "-c", _MEMORY, who, str(length)],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).resolve().parents[1],
            )
            rows.append({"who": who, "tokens": length, "peak MB": float(done.stdout.split()[-1])})
    by_row = {(row["who"], row["tokens"]): row["peak MB"] for row in rows}
    ours, dense = (by_row[who, lengths[1]] for who in ("softcap_runtime", "compiled dense"))
    growth = ours / max(by_row["softcap_runtime", lengths[0]], 1e-9)
    note = (
        f"ours / dense at {lengths[1]}: {ours / dense:.3f} (to reach: 0.125); "
        f"ours, doubled length: x {growth:.2f} (to reach: 2.2)"
    )
    report.table("peak memory of forward + backward, bf16, beyond inputs, output and gradients", rows, note)


_MEMORY = "import sys; from benchmarks.train import peak; print(peak(sys.argv[1], int(sys.argv[2])))"


def peak(who: str, length: int) -> float:
    """Peak of resident memory over one warm step, less output and gradients, in MB; for a process of its own."""
    dtype = torch.bfloat16
    attention = implementations(length, dtype)[who]
    warm = peers.inputs(1, HEADS, KV_HEADS, 256, HEAD_DIM, dtype, grad=True)
    step(implementations(256, dtype)[who], *warm, torch.randn(1, HEADS, 256, HEAD_DIM, dtype=dtype))
    q, k, v = peers.inputs(1, HEADS, KV_HEADS, length, HEAD_DIM, dtype, grad=True)
    grad = torch.randn(1, HEADS, length, HEAD_DIM, dtype=dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = _status("VmRSS")
    grads = step(attention, q, k, v, grad)
    kept = sum(x.numel() * x.element_size() for x in grads) + q.numel() * q.element_size()
    return (_status("VmHWM") - before - kept) / 1e6


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"field: {field!r} is not in /proc/self/status")
