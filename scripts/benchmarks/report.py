"""Timing side by side, and the tables and JSON of what was measured."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Timed = Callable[[], Any]


# A function that has taken this many seconds is not called again. It stops what no rounds are needed to tell: on CPUs
# with AVX2 alone torch multiplies bf16 a hundred times slower than float32, and an eager step takes a minute.
ENOUGH_SECONDS = 20.0


def side_by_side(functions: Mapping[str, Timed], rounds: int, before: Timed | None = None) -> dict[str, float]:
    """Median seconds of each function, called in turn so that a noisy machine is noisy for all of them.

    ``before`` runs ahead of each call and is not timed.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if sum(times[name]) < ENOUGH_SECONDS:
                if before is not None:
                    before()
                started = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


class Report:
    """What is measured in one run, on ``device``. ``quick``: small shapes, to see that everything runs."""

    def __init__(self, quick: bool, device: str = "cpu") -> None:
        self.quick, self.device = quick, device
        self.console = Console(width=150 if not Console().is_terminal else None)
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.about: dict[str, Any] = {}

    def rounds(self, wanted: int) -> int:
        """How often to repeat."""
        return 2 if self.quick else wanted

    def environment(self) -> None:
        """Print and keep what the figures depend on."""
        self.about = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": _cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
            "gemm_gflops": {str(dtype).removeprefix("torch."): round(gemm_rate(dtype)) for dtype in _GEMM},
        }
        self.console.print({**self.about})

    def table(self, name: str, rows: list[dict[str, Any]], note: str = "") -> None:
        """Print rows as a table and keep them for the JSON file."""
        table = Table(title=name, caption=note or None, title_justify="left", caption_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*(_shown(value) for value in row.values()))
        self.console.print(table)
        self.tables[name] = rows

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"environment": self.about, "tables": self.tables}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return f"{len(names) or os.cpu_count()} x {names[0] if names else platform.processor()}"


_GEMM = (torch.float32, torch.bfloat16)


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of one large matrix product ``a @ b^T``, the ceiling of everything here; median of 9."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    seconds = side_by_side({"gemm": lambda: a @ b.mT}, 9)["gemm"]
    return 2 * size**3 / seconds / 1e9
