"""The picture of a benchmark: a panel for each shape, a bar for each implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, PEER = "#2a6f97", "#b8c4cc"
COLUMNS = 3


def draw(tables: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write a picture of every table that has milliseconds by shape (``what``) and implementation (``who``).

    Raises ValueError when there is none, ImportError without matplotlib (extra ``plot``).
    """
    panels = _panels(tables)
    if not panels:
        raise ValueError(f"tables: {sorted(tables)}, expected forward or train among them: only these are drawn")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.7 + 0.26 * max(map(len, panels.values()))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, bars) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, bars)
    figure.savefig(path, dpi=110)


def _panels(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    panels: dict[str, dict[str, float]] = {}
    for name, rows in tables.items():
        for row in rows:
            if "ms" in row and "who" in row:
                panels.setdefault(f"{name}, {row['what']}", {})[row["who"]] = row["ms"]
    return panels


def _panel(axis: Any, title: str, bars: Mapping[str, float]) -> None:
    colours = [OURS if who.startswith("softcap_runtime") else PEER for who in bars]
    drawn = axis.barh(list(bars), list(bars.values()), color=colours, height=0.7)
    axis.bar_label(
        drawn, [f"{ms:.3g} ms" if ms < 1000 else f"{ms:,.0f} ms" for ms in bars.values()], fontsize=7, padding=3
    )
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_title(title, loc="left", fontsize=8)
    axis.tick_params(labelsize=7, length=0)
    axis.xaxis.set_visible(False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
