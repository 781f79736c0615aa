"""Decoding: one new token of every sequence against its key/value cache, as in generation.

Before each call other memory is read, so that keys come from memory: a model reads its weights between two tokens.
Where keys lie in memory moves times by a tenth, so they are laid out anew several times.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.report import Report, Timed, side_by_side
from softcap_runtime import AttentionConfig
from softcap_runtime.engines.spec import dtype_name

# Batch and keys in the cache; Hq8 Hkv4 D256.
SHAPES = ((1, 512), (1, 4096), (1, 32768), (8, 2048))
PAGE = 16
# More than a CPU's caches hold.
OTHER_BYTES = 256 << 20
LAYOUTS = 5


def measure(report: Report) -> None:
    """Time one step at a few caches in float32 and bfloat16."""
    rows: list[dict[str, Any]] = []
    other = torch.ones(OTHER_BYTES // 4)
    for batch, keys in SHAPES[:1] if report.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            rows += _rows(report, batch, keys, dtype, other)
    report.table("decode", rows, "ratio: of its time to softcap_runtime auto's; GB/s: of keys and values")


def _rows(report: Report, batch: int, keys: int, dtype: torch.dtype, other: Tensor) -> list[dict[str, Any]]:
    found: list[dict[str, float]] = []
    for _ in range(report.rounds(LAYOUTS)):
        q = torch.randn(batch, 8, 1, 256).to(dtype)
        k, v = (torch.randn(batch, 4, keys, 256).to(dtype) for _ in range(2))
        with torch.no_grad():
            found.append(side_by_side(_ways(q, k, v), report.rounds(7), before=other.sum))
    times = {who: statistics.median(each[who] for each in found) for who in found[0]}
    read = (k.numel() + v.numel()) * k.element_size()
    return [
        {
            "what": f"B{batch}, {keys} keys, {dtype_name(dtype)}",
            "who": who,
            "ms": seconds * 1e3,
            "ratio": seconds / times["softcap_runtime auto"],
            "GB/s": read / seconds / 1e9,
        }
        for who, seconds in times.items()
    ]


def _ways(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Timed]:
    by_rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    words = [x.view(torch.float32) for x in (k, v)]
    return {
        **peers.inference(q, k, v, torch.zeros(1, 1, 1, k.shape[2], dtype=q.dtype)),
        "softcap_runtime, keys [B, S, H, D]": lambda: peers.ours(q, *by_rows),
        f"softcap_runtime, pages of {PAGE}": _paged(q, k, v),
        "a sum of the same bytes": lambda: [x.sum() for x in words],
    }


def _paged(q: Tensor, k: Tensor, v: Tensor) -> Timed:
    """The same over the keys in pages that lie in any order."""
    batch, _, keys, head_dim = k.shape
    table = torch.randperm(batch * keys // PAGE).view(batch, -1)
    pages = []
    for x in (k, v):
        rows = x.transpose(1, 2).reshape(-1, PAGE, *x.shape[1::2])
        pages.append(torch.empty_like(rows).index_copy_(0, table.flatten(), rows))
    config = AttentionConfig(softcap=peers.SOFTCAP, scale=head_dim**-0.5)
    lengths = torch.full((batch,), keys)
    return lambda: peers.runtime().paged_attention(q, *pages, config, table, lengths)
