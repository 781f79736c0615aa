"""Trains a small Gemma-2 on packed real text twice: with Hugging Face's eager attention, and with softcap_runtime.

Both runs have the same weights, the same text in the same order, and nothing random in between, so their losses
should agree. Writes a picture of both curves. The text is the language reference that Python itself ships.

With ``--context-parallel N``, under ``torchrun --nproc-per-node N``, the two runs are softcap_runtime in one process
and the tokens of every row spread over N ranks: global layers by heads, window layers by keys.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import Gemma2Config, Gemma2ForCausalLM

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime, document_ids_from_position_ids
from softcap_runtime.integrations.transformers import register

if TYPE_CHECKING:
    from softcap_runtime.distributed import ContextMask

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
    parser.add_argument(
        "--context-parallel",
        type=int,
        metavar="N",
        help="spread each row over N ranks, under torchrun --nproc-per-node N; needs --seed",
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps}, expected at least 1")
    ranks = arguments.context_parallel
    if ranks is not None and str(ranks) != os.environ.get("WORLD_SIZE"):
        parser.error(f"--context-parallel: {ranks}, expected under torchrun --nproc-per-node {ranks}")
    if ranks is not None and arguments.seed is None:
        parser.error("--seed: none, expected one with --context-parallel, the same on all ranks")
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    rank = 0 if ranks is None else start_ranks()
    console = Console(highlight=False, quiet=rank > 0)

    batches = list(islice(packed_rows(seed), arguments.steps))
    documents = sum(int((batch.position_ids == 0).sum()) for batch in batches)
    console.print(
        f"[bold]seed {seed}[/bold]; {len(batches)} rows of {LENGTH} bytes, {documents:,} paragraphs packed in them"
    )
    # Curves are compared on one device: with a GPU each rank trains on its own.
    device = torch.device("cuda", torch.cuda.current_device()) if ranks and torch.cuda.is_available() else "cpu"
    prewarm(console, str(device))
    names = ("eager", "softcap") if ranks is None else ("one process", f"{ranks} ranks")
    curves = train_both(seed, batches, names, console, rank, device)
    if rank:
        return
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


def prewarm(console: Console, device: str) -> None:
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
        device=device,
    )
    results = runtime.prewarm([request], progress=True)
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        raise SystemExit(f"prewarm failed: {failed[0].error}")
    built = sum(result.outcome == "built" for result in results)
    console.print(f"{len(results)} kernels ready, {built} of them built now")


def start_ranks() -> int:
    """Meet the other ranks of torchrun; returns the own one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The first rank trains alone before, and the others wait for it.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank()


def train_both(
    seed: int, batches: list[Batch], names: tuple[str, str], console: Console, rank: int, device: torch.device | str
) -> dict[str, Curve]:
    columns = (
        TextColumn("{task.description:11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    curves = {}
    with Progress(*columns, console=console) as progress:
        for name in names:
            if rank and name == names[0]:
                continue  # in one process
            task = progress.add_task(name, total=len(batches), loss=float("nan"))
            model = small_gemma(seed, "eager" if name == "eager" else "softcap").to(device)
            step = whole_step if name in ("eager", "softcap", "one process") else RanksStep(model)
            report = lambda loss, task=task: progress.update(task, advance=1, loss=loss)  # noqa: E731
            curves[name] = train(model, batches, step, report)
    return curves


def whole_step(model: Gemma2ForCausalLM, batch: Batch) -> float:
    """Loss and gradients of one row in this process."""
    # Transformers looks for packed sequences only where there is no cache.
    given = {name: x.to(model.device) for name, x in batch._asdict().items()}
    loss = model(**given, use_cache=False).loss
    loss.backward()
    return loss.item()


class RanksStep:
    """Loss and gradients of one row whose tokens are spread over all ranks, the same on each."""

    def __init__(self, model: Gemma2ForCausalLM) -> None:
        from softcap_runtime.distributed import SequenceLayout

        self.mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
        self.layout = SequenceLayout.contiguous(LENGTH, self.mesh.size())
        kinds = enumerate(model.config.layer_types)
        self.configs = {kind: AttentionConfig.from_hf(model.config, layer_idx=at) for at, kind in kinds}
        self.contexts: dict[str, ContextMask] = {}
        register(Runtime.get(), "softcap", self.contexts)

    def __call__(self, model: Gemma2ForCausalLM, batch: Batch) -> float:
        """The loss, after gradients of all ranks are added up."""
        from softcap_runtime.distributed import context_mask

        ids = document_ids_from_position_ids(batch.position_ids)
        for kind, config in self.configs.items():
            self.contexts[kind] = context_mask(config, self.layout, self.mesh, document_ids=ids)
        # Each token's label is the next one, which may lie on the next rank: shifted while all is in one place.
        labels = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
        tokens, positions, mine = (
            self.layout.shard(x, 1, dist.get_rank()).to(model.device)
            for x in (batch.input_ids, batch.position_ids, labels)
        )
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), mine.flatten(), reduction="sum")
        loss = total / (labels != -100).sum()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        whole = loss.detach()
        dist.all_reduce(whole)
        return whole.item()


def train(
    model: Gemma2ForCausalLM,
    batches: list[Batch],
    step: Callable[[Gemma2ForCausalLM, Batch], float],
    report: Callable[[float], None],
) -> Curve:
    """AdamW with a warm-up; one row a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    losses, started = [], time.perf_counter()
    for batch in batches:
        losses.append(step(model, batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        report(losses[-1])
    return Curve(losses, len(batches) / (time.perf_counter() - started))


def differences(curves: dict[str, Curve]) -> list[float]:
    first, second = curves.values()
    return [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]


def show(console: Console, curves: dict[str, Curve]) -> float:
    """A table of both runs; returns their largest difference."""
    gaps = differences(curves)
    steps = sorted({*range(0, len(gaps), max(1, len(gaps) // 8)), len(gaps) - 1})
    table = Table("step", *curves, "difference")
    for step in steps:
        losses = [curve.losses[step] for curve in curves.values()]
        table.add_row(str(step + 1), *(f"{loss:.4f}" for loss in losses), f"{gaps[step]:.1e}")
    console.print(table)
    first, second = curves
    before, now = (curve.steps_per_second for curve in curves.values())
    console.print(f"steps/s: {first} {before:.2f}, {second} {now:.2f} ({now / before:.1f} times as fast)")
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
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        label = labels.get(name, name)
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
