"""Measures this package against its peers, side by side in one run: ``python scripts/benchmark.py --help``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks import context, decode, forward, masks, overhead, startup, static, train
from benchmarks.picture import draw
from benchmarks.report import Report

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
PARTS = {
    "context": context.measure,
    "decode": decode.measure,
    "forward": forward.measure,
    "masks": masks.measure,
    "overhead": overhead.measure,
    "startup": startup.measure,
    "static": static.measure,
    "train": train.measure,
}


@app.command()
def main(
    parts: Annotated[list[str], typer.Argument(help=f"Any of: {', '.join(PARTS)}, all.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Plot the forward and train figures.")] = None,
    device: Annotated[str, typer.Option(help="Of context alone: cpu, or cuda for a rank on each GPU.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Small shapes and few rounds: does it run at all?")] = False,
) -> None:
    """Measure the parts named and print a table of each."""
    unknown = [part for part in parts if part not in (*PARTS, "all")]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}, expected one of {', '.join(PARTS)}, all")
    if device not in ("cpu", "cuda") or (device == "cuda" and [*parts] != ["context"]):
        raise typer.BadParameter(f"--device: {device!r}, expected cpu, or cuda for context alone")
    # Told before the measuring, which takes long.
    if png is not None and not {"forward", "train", "all"} & {*parts}:
        raise typer.BadParameter("--png: plots forward and train, expected one of them or all among the parts")
    for option, path in (("--json", json_file), ("--png", png)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise typer.BadParameter(f"{option}: {str(path)!r}, expected a file in a folder that is there")
    report = Report(quick, device)
    report.environment()
    for name in PARTS if "all" in parts else parts:
        torch.compiler.reset()  # the compiled peers of a part count no shapes of another against dynamo's limit
        PARTS[name](report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.document(), indent=2) + "\n", encoding="utf-8")
    if png is not None:
        draw(report.tables, png)


if __name__ == "__main__":
    app()
