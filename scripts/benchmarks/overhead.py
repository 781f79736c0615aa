"""What a warm call costs beside the work: tiny inputs, one thread."""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.report import Report, side_by_side
from softcap_runtime import AttentionConfig


def measure(report: Report) -> None:
    """Time one query against one key, eager inference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k, v = peers.inputs(1, 8, 4, 1, 64, torch.float32)
        config = AttentionConfig(softcap=peers.SOFTCAP, scale=64**-0.5)
        runtime = peers.runtime()
        runtime.attention(q, k, v, config)
        (plan,) = [plan for key, plan in runtime.plans.items() if key.q_shape == q.shape and not key.train]
        # Four sequences of 20 keys in pages.
        new_rows, pages = torch.randn(4, 8, 1, 64), torch.randn(2, 8, 16, 4, 64)
        table, lengths = torch.arange(8).view(4, 2), torch.full((4,), 20)
        with torch.no_grad():
            times = side_by_side(
                {
                    "softcap_runtime": lambda: runtime.attention(q, k, v, config),
                    "softcap_runtime, paged": lambda: runtime.paged_attention(new_rows, *pages, config, table, lengths),
                    "the same kernel alone": lambda: plan.forward(q, k, v),
                    "stock compiled flex": lambda: peers.stock_flex(q, k, v),
                },
                report.rounds(5000),
            )
    finally:
        torch.set_num_threads(threads)
    kernel = times["the same kernel alone"]
    rows = [{"who": who, "us a call": s * 1e6, "over the kernel": (s - kernel) * 1e6} for who, s in times.items()]
    report.table("overhead", rows, "microseconds, median; to reach: 12 a call, 10 over the kernel, half of stock")
