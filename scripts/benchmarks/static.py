"""What dynamic sizes cost: the packages against the same graphs compiled just in time, once per shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.report import Report, side_by_side
from softcap_runtime.compat.torch_private import Runner
from softcap_runtime.engines.choose import engine_named
from softcap_runtime.engines.engine import Problem
from softcap_runtime.engines.graphs.flex import flex_forward
from softcap_runtime.engines.package import Package
from softcap_runtime.masks import MaskMemo, band

LENGTHS = (512, 1024, 2048, 4096)


class StaticKernels:
    """Kernels that ``torch.compile`` specializes on every shape that it meets."""

    def __init__(self) -> None:
        self.masks = MaskMemo(2**26)
        self.compiled: dict[Any, Any] = {}

    def get(self, spec: Package) -> Runner:
        """The graph of ``spec``, compiled at the first call of each shape."""

        def run(inputs: list[Tensor]) -> list[Tensor]:
            key = (spec, *((x.shape, x.stride()) for x in inputs))
            compiled = self.compiled.get(key)
            if compiled is None:
                compiled = torch.compile(flex_forward(spec).module, dynamic=False, fullgraph=True)
                self.compiled[key] = compiled
            out = compiled(*inputs)
            return [] if out is None else [out]

        return run


def measure(report: Report) -> None:
    """Inference at a few lengths, through the engines themselves, with packages and with static kernels."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 1000  # else the ninth shape is refused
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS[:1] if report.quick else LENGTHS:
            rows.append(_row(report, length, dtype, "flex"))
    report.table("dynamic packages against static kernels", rows, "Hq8 Hkv4 D256 causal. To reach: 1.03")


def _row(report: Report, length: int, dtype: torch.dtype, name: str) -> dict[str, Any]:
    q, k, v = peers.inputs(1, 8, 4, length, 256, dtype)
    mask = band(length, length, causal=True, window=None)
    problem = Problem(q.device, dtype, 1, 8, 4, 256, 256**-0.5, peers.SOFTCAP, mask, False)
    engine = engine_named(name, q.device)
    dynamic = engine.forward(problem, peers.runtime(name).supply.kernels(problem))
    static = engine.forward(problem, StaticKernels())
    with torch.no_grad():
        assert torch.allclose(dynamic(q, k, v)[0], static(q, k, v)[0], atol=1e-2)
        times = side_by_side(
            {"dynamic": lambda: dynamic(q, k, v), "static": lambda: static(q, k, v)}, report.rounds(15)
        )
    return {
        "tokens": length,
        "dtype": str(dtype).removeprefix("torch."),
        "engine": name,
        "package ms": times["dynamic"] * 1e3,
        "static ms": times["static"] * 1e3,
        "ratio": times["dynamic"] / times["static"],
    }
