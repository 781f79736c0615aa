"""Pictures of masks: in the terminal, and as PNG files.

Both show the elements in the blocks that a kernel works in: full blocks need no mask, partial ones compute all their
elements and hide some, skipped ones cost nothing. Not imported with the package, as it imports rich and, for PNG
files, matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor

from softcap_runtime.masks.blocks import BLOCK, block_tables, by_block, computed_blocks, count_blocks
from softcap_runtime.masks.intervals import RowIntervals, edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a cell of a picture shows.
SKIPPED, HIDDEN, PARTIAL, FULL = range(4)
_WORDS = {
    FULL: "full block: no mask needed",
    PARTIAL: "partial block: visible",
    HIDDEN: "partial block: computed, then hidden",
    SKIPPED: "skipped: never computed",
}
_COLORS = {FULL: "#1f4e79", PARTIAL: "#e58a1f", HIDDEN: "#fbe3c3", SKIPPED: "#eef1f4"}
# Distinct without colour too.
_SHADES = {
    FULL: ("██", "dodger_blue3"),
    PARTIAL: ("▓▓", "orange1"),
    HIDDEN: ("░░", "grey50"),
    SKIPPED: ("··", "grey30"),
}
_ASCII = {FULL: "##", PARTIAL: "++", HIDDEN: "--", SKIPPED: ".."}
_TEXT_SIDE, _PNG_SIDE, _MOST_LINES = 40, 1024, 64


def mask_text(intervals: RowIntervals, ascii_only: bool = False) -> Text:
    """The mask's first batch row for ``rich.print``: queries downwards, keys to the right, up to 40 cells a side.

    A cell stands for a power of two of rows and of keys. ``ascii_only``: for terminals that show nothing else.
    """
    one = _first_row(intervals)
    cells, scale = _cells(one, _TEXT_SIDE)
    shades = {kind: (_ASCII[kind], style) if ascii_only else (sign, style) for kind, (sign, style) in _SHADES.items()}
    text = Text(no_wrap=True)
    for row in cells.tolist():
        for cell in row:
            text.append(*shades[cell])
        text.append("\n")
    for kind in (FULL, PARTIAL, HIDDEN, SKIPPED):
        text.append(*shades[kind])
        text.append(f" {_WORDS[kind]}\n")
    size = "one element" if scale == 1 else f"{scale} x {scale} elements"
    text.append(f"{one.q_len} queries x {one.kv_len} keys, a cell is {size}\n{_summary(one)}\n")
    return text


def save_png(path: str | Path, masks: Mapping[str, RowIntervals]) -> None:
    """Write the first batch row of each mask, under its name, into a PNG file, two side by side.

    Blocks are outlined, and the share of skipped ones stands above. Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "matplotlib: not installed, needed for PNG files; run pip install 'softcap-runtime[plot]'"
        ) from None
    columns = min(len(masks), 2)
    rows = -(-len(masks) // columns)
    figure = Figure(figsize=(1 + 5.5 * columns, 1.5 + 5.5 * rows), facecolor="white", layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, intervals) in zip(places.flat, masks.items(), strict=False):
        _paint(axes, _first_row(intervals), name)
    _legend(figure, 2 * columns)
    figure.savefig(path, dpi=130)


def _first_row(intervals: RowIntervals) -> RowIntervals:
    lo, hi = edges(intervals, "cpu")
    return RowIntervals(intervals.q_len, intervals.kv_len, None, None, lo[:1], hi[:1])


def _summary(intervals: RowIntervals) -> str:
    skipped, partial, full = count_blocks(block_tables(intervals, "cpu"))
    total = skipped + partial + full
    return f"{skipped / total:.0%} of {total:,} blocks skipped ({full:,} full, {partial:,} partial)"


def _cells(intervals: RowIntervals, side: int) -> tuple[Tensor, int]:
    """The kinds of the cells ``[rows, cols]``, at most ``side`` each way, and the elements that each spans each way."""
    scale = 1
    while scale * side < max(intervals.q_len, intervals.kv_len):
        scale *= 2
    rows, cols = -(-intervals.q_len // scale), -(-intervals.kv_len // scale)
    lo, hi = (by_block(edge, scale)[0] for edge in edges(intervals, "cpu"))
    keys = torch.arange(cols) * scale
    seen = (keys < hi.amax(-1)[:, None]) & (keys + scale > lo.amin(-1)[:, None])

    computed, full = (blocks[0] for blocks in computed_blocks(intervals, "cpu"))
    some, every = _at_scale(computed, scale, any_of=True), _at_scale(full, scale, any_of=False)
    some, every = some[:rows, :cols], every[:rows, :cols]
    cells = torch.full((rows, cols), SKIPPED)
    return cells.masked_fill(some, HIDDEN).masked_fill(some & seen, PARTIAL).masked_fill(every, FULL), scale


def _at_scale(blocks: Tensor, scale: int, any_of: bool) -> Tensor:
    """Blocks as cells: repeated if a block spans many cells, joined if a cell spans many blocks."""
    if scale <= BLOCK:
        times = BLOCK // scale
        return blocks.repeat_interleave(times, 0).repeat_interleave(times, 1)
    times = scale // BLOCK
    rows, cols = blocks.shape
    # What lies beyond the edge is neutral.
    padded = torch.nn.functional.pad(blocks, (0, -cols % times, 0, -rows % times), value=not any_of)
    tiles = padded.view(padded.shape[0] // times, times, -1, times)
    return tiles.any(3).any(1) if any_of else tiles.all(3).all(1)


def _paint(axes: Axes, intervals: RowIntervals, name: str) -> None:
    from matplotlib.colors import ListedColormap

    cells, _ = _cells(intervals, _PNG_SIDE)
    q_len, kv_len = intervals[:2]
    colors = ListedColormap([_COLORS[kind] for kind in range(4)])
    extent = (0.0, float(kv_len), float(q_len), 0.0)
    axes.imshow(cells.numpy(), cmap=colors, vmin=0, vmax=3, extent=extent, interpolation="nearest")
    if max(q_len, kv_len) <= _MOST_LINES * BLOCK:
        axes.vlines(range(BLOCK, kv_len, BLOCK), 0, q_len, colors="white", linewidth=1.1)
        axes.hlines(range(BLOCK, q_len, BLOCK), 0, kv_len, colors="white", linewidth=1.1)
    axes.set_xlabel("key", color="#444444")
    axes.set_ylabel("query", color="#444444")
    axes.set_title(name, loc="left", fontsize=13, fontweight="bold", color="#222222", pad=24)
    axes.text(0, 1.018, _summary(intervals), transform=axes.transAxes, fontsize=10, color="#555555")
    axes.tick_params(length=0, labelsize=9, labelcolor="#777777")
    if max(q_len, kv_len) <= 8 * BLOCK:
        axes.set_xticks(range(0, kv_len + 1, BLOCK))
        axes.set_yticks(range(0, q_len + 1, BLOCK))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(figure: Figure, columns: int) -> None:
    from matplotlib.patches import Patch

    kinds = (FULL, PARTIAL, HIDDEN, SKIPPED)
    patches: list[Any] = [Patch(facecolor=_COLORS[kind], label=_WORDS[kind]) for kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, labelcolor="#333333")
