"""Forward: every engine and every peer, with the error against float64 beside each time."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import peers
from benchmarks.report import Report, side_by_side
from softcap_runtime.engines.spec import dtype_name

SHAPES = ((1, 8, 4, 512, 256), (1, 8, 4, 2048, 256), (2, 16, 8, 1024, 128))


def measure(report: Report) -> None:
    """Time inference at a few shapes in float32 and bfloat16."""
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[:1] if report.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            rows += _rows(report, shape, dtype)
    report.table("forward", rows, "ratio: of its time to softcap_runtime auto's; error: relative, against float64")


def _rows(report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    batch, heads, kv_heads, length, head_dim = shape
    q, k, v = peers.inputs(batch, heads, kv_heads, length, head_dim, dtype)
    true, mask = peers.exact(q, k, v), peers.additive(length, dtype)
    functions = {**peers.inference(q, k, v, mask), "the products alone": lambda: peers.products_alone(q, k, v)}
    with torch.no_grad():
        errors = {
            name: peers.error(functions[name](), true)
            for name in functions
            if name not in ("SDPA, no softcap", "the products alone")
        }
        times = side_by_side(functions, report.rounds(9))
    name = dtype_name(dtype)
    visible_flop = 2 * batch * heads * head_dim * length * (length + 1)
    return [
        {
            "what": f"B{batch} Hq{heads} Hkv{kv_heads} S{length} D{head_dim} {name}",
            "who": who,
            "ms": seconds * 1e3,
            "ratio": seconds / times["softcap_runtime auto"],
            "error": errors.get(who),
            "GEMM share": visible_flop / seconds / 1e9 / report.about["gemm_gflops"][name],
        }
        for who, seconds in times.items()
    ]
