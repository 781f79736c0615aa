"""Pictures of masks: what they show is the mask."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from softcap_runtime.masks import RowIntervals, band, dense, draw, row_intervals

from .oracle import blocks_of


def shown(intervals: RowIntervals, side: int) -> tuple[torch.Tensor, int]:
    return draw._cells(draw._first_row(intervals), side)


def packed(length: int) -> RowIntervals:
    ids = (torch.rand(1, length) < 0.01).cumsum(1)
    return row_intervals(length, length, causal=True, window=None, document_ids=ids)


def test_elements_at_full_size(seed: int) -> None:
    intervals = packed(random.randint(300, 900))
    cells, scale = shown(intervals, 1024)
    assert scale == 1
    mask = dense(intervals, "cpu")
    assert torch.equal(cells >= draw.PARTIAL, mask[0])
    partial, full = blocks_of(mask)
    for kind, blocks in ((draw.FULL, full), (draw.SKIPPED, ~(partial | full))):
        wide = blocks[0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(cells == kind, wide[: cells.shape[0], : cells.shape[1]])


@pytest.mark.parametrize("side", [4, 7, 40, 100])
def test_cells_join_their_elements(side: int, seed: int) -> None:
    intervals = packed(random.randint(500, 1500))
    fine, _ = shown(intervals, 4096)
    cells, scale = shown(intervals, side)
    assert max(cells.shape) <= side
    length = fine.shape[0]
    for r, c in ((random.randrange(cells.shape[0]), random.randrange(cells.shape[1])) for _ in range(50)):
        part = fine[r * scale : min((r + 1) * scale, length), c * scale : min((c + 1) * scale, length)]
        if bool((part >= draw.PARTIAL).any()):
            expected = draw.FULL if bool((part == draw.FULL).all()) else draw.PARTIAL
        else:
            expected = draw.HIDDEN if bool((part == draw.HIDDEN).any()) else draw.SKIPPED
        assert int(cells[r, c]) == expected, (r, c, scale)


def test_text_is_plain_without_colour() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(draw.mask_text(band(512, 512, causal=True, window=None)))
    lines = out.getvalue().splitlines()
    assert lines[8] == "████████████████▓▓░░░░░░░░░░░░░░································"
    assert lines[-3:-1] == [
        "512 queries x 512 keys, a cell is 16 x 16 elements",
        "38% of 16 blocks skipped (6 full, 4 partial)",
    ]


def kinds(length: int) -> dict[str, RowIntervals]:
    """What the picture in docs/reference/masks.md shows."""
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([310, 90, 404, 220]))[None]
    spans = {"prefix_lengths": torch.tensor([280]), "spans": torch.tensor([[[560, 800]]])}
    return {
        "Causal": band(length, length, causal=True, window=None),
        "Sliding window, 300 keys": band(length, length, causal=True, window=300),
        "Packed documents, 310 + 90 + 404 + 220": row_intervals(
            length, length, causal=True, window=None, document_ids=documents
        ),
        "Prefix of 280, image at 560 to 800": row_intervals(length, length, causal=True, window=None, **spans),
    }


def test_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw.save_png(tmp_path / "one.png", {"Decoding": band(1, 40_000, causal=True, window=4096)})
    draw.save_png(tmp_path / "four.png", kinds(1024))
    for name in ("one.png", "four.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^matplotlib: not installed, .*softcap-runtime\[plot\]"):
        draw.save_png(tmp_path / "one.png", {"Causal": band(4, 4, causal=True, window=None)})
