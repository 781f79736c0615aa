"""Trains a small Gemma-2 on packed real text twice: with Hugging Face's eager attention, and with softcap_runtime.

Both runs have the same weights, the same text in the same order, and nothing random in between, so their losses
should agree. Writes a picture of both curves. The text is the language reference that Python itself ships.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime
from softcap_runtime.integrations.transformers import register

LENGTH = 1024  # tokens of a packed row: bytes
LONGEST = 400  # a paragraph longer than this is cut
# Faster, training amplifies rounding: at 1e-3 two runs of one implementation whose initial weights differ in the
# last bit end 1e-1 apart, as the two implementations do. At this rate both stay within 1e-5 or so.
LEARNING_RATE = 2e-4
WARMUP = 20  # steps
TOLERANCE = 1e-3


class Batch(NamedTuple):
    """One packed row: ``[1, LENGTH]`` each; positions restart at 0 with every document."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


class Curve(NamedTuple):
    """Losses, one a step, and how fast they came."""

    losses: list[float]
    steps_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("train_demo.png"), help="where the picture goes")
    parser.add_argument("--seed", type=int, help="random and printed when not given")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps}, expected at least 1")
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    console = Console(highlight=False)

    batches = list(islice(packed_rows(seed), arguments.steps))
    documents = sum(int((batch.position_ids == 0).sum()) for batch in batches)
    console.print(
        f"[bold]seed {seed}[/bold]; {len(batches)} rows of {LENGTH} bytes, {documents:,} paragraphs packed in them"
    )
    prewarm(console)
    curves = train_both(seed, batches)
    difference = show(console, curves)
    draw(curves, arguments.out)
    console.print(f"picture: {arguments.out}")
    if difference > TOLERANCE:
        raise SystemExit(f"the curves differ by {difference:.1e}, expected at most {TOLERANCE}")


def small_gemma(seed: int, attention: str) -> Gemma2ForCausalLM:
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
        attn_logit_softcapping=50.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return Gemma2ForCausalLM(config).train()


def packed_rows(seed: int) -> Iterator[Batch]:
    """Rows full of whole paragraphs in a random order, without end."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [part.strip().encode() for part in text.split("\n\n") if len(part.strip()) > 1]
    order = random.Random(seed)
    row: list[bytes] = []
    while True:
        for paragraph in order.sample(paragraphs, len(paragraphs)):
            room = LENGTH - sum(map(len, row))
            row.append(paragraph[: min(room, LONGEST)])
            if room <= LONGEST and len(row[-1]) == room:
                yield packed(row)
                row = []


def packed(row: list[bytes]) -> Batch:
    """The first byte of a document has nothing to be predicted from, so it is no label."""
    ids = torch.tensor(list(b"".join(row)))
    positions = torch.cat([torch.arange(len(document)) for document in row])
    labels = ids.masked_fill(positions == 0, -100)
    return Batch(ids[None], positions[None], labels[None])


def prewarm(console: Console) -> None:
    """Have the kernels ready, so that the first step isn't the one that builds them."""
    runtime = Runtime.get()
    register(runtime)
    config = small_gemma(0, "eager").config
    request = PrewarmRequest(
        config=AttentionConfig.from_hf(config),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype="float32",
        train=True,
    )
    results = runtime.prewarm([request], progress=True)
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        raise SystemExit(f"prewarm failed: {failed[0].error}")
    built = sum(result.outcome == "built" for result in results)
    console.print(f"{len(results)} kernels ready, {built} of them built now")


def train_both(seed: int, batches: list[Batch]) -> dict[str, Curve]:
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    curves = {}
    with Progress(*columns) as progress:
        for name in ("eager", "softcap"):
            task = progress.add_task(name, total=len(batches), loss=float("nan"))
            curves[name] = train(
                small_gemma(seed, name),
                batches,
                lambda loss, task=task: progress.update(task, advance=1, loss=loss),
            )
    return curves


def train(model: Gemma2ForCausalLM, batches: list[Batch], report: Callable[[float], None]) -> Curve:
    """AdamW with a warm-up; one row a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    losses, started = [], time.perf_counter()
    for batch in batches:
        # Transformers looks for packed sequences only where there is no cache.
        loss = model(**batch._asdict(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        report(losses[-1])
    return Curve(losses, len(batches) / (time.perf_counter() - started))


def differences(curves: dict[str, Curve]) -> list[float]:
    return [abs(a - b) for a, b in zip(curves["eager"].losses, curves["softcap"].losses, strict=True)]


def show(console: Console, curves: dict[str, Curve]) -> float:
    """A table of both runs; returns their largest difference."""
    gaps = differences(curves)
    steps = sorted({*range(0, len(gaps), max(1, len(gaps) // 8)), len(gaps) - 1})
    table = Table("step", "eager", "softcap", "difference")
    for step in steps:
        losses = [curves[name].losses[step] for name in ("eager", "softcap")]
        table.add_row(str(step + 1), *(f"{loss:.4f}" for loss in losses), f"{gaps[step]:.1e}")
    console.print(table)
    eager, ours = (curves[name].steps_per_second for name in ("eager", "softcap"))
    console.print(f"steps/s: eager {eager:.2f}, softcap {ours:.2f} ({ours / eager:.1f} times as fast)")
    console.print(f"largest difference of the losses: [bold]{max(gaps):.1e}[/bold]")
    return max(gaps)


def draw(curves: dict[str, Curve], out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the picture needs matplotlib; run: pip install 'softcap-runtime[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    labels = {"eager": "Hugging Face eager", "softcap": "softcap_runtime"}
    for (name, label), style in zip(labels.items(), ("-", "--"), strict=True):
        curve = curves[name]
        above.plot(curve.losses, style, label=f"{label}, {curve.steps_per_second:.1f} steps/s")
    above.set_ylabel("loss (nats per byte)")
    above.legend()
    below.plot(differences(curves))
    below.axhline(TOLERANCE, color="grey", linestyle=":")
    below.set_yscale("log")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
