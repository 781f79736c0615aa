"""A small Gemma-2 over this project's own text, with Hugging Face's eager attention and with softcap_runtime.

Prewarms the kernel cache, compares logits and times, and shows the cache. The second run finds it all warm.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime
from softcap_runtime.cli import main as cli
from softcap_runtime.cli.app import counted
from softcap_runtime.integrations.transformers import register
from softcap_runtime.prewarm.rows import PrewarmResult

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1024, 768, 512, 256)
PAD = 256  # the token after the 256 bytes
RUNS = 3
TOLERANCE = 1e-4


class Comparison(NamedTuple):
    """Medians in seconds, and the largest difference of the logits of real tokens."""

    eager: float
    ours: float
    difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="of the weights; random and printed when not given")
    seed = parser.parse_args().seed
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    console = Console(highlight=False)

    console.rule("Model")
    model = small_gemma(seed)
    ids, mask, names = batch_of_texts()
    described(console, model, seed, mask, names)

    console.rule("Prewarm")
    runtime = Runtime.get()
    register(runtime)
    started = time.perf_counter()
    results = runtime.prewarm(requests_of(model, ids.shape[1]), progress=True)
    say_how_warm(console, results, time.perf_counter() - started)

    console.rule("Eager attention and ours, the same weights and text")
    result = compare(console, model, ids, mask)
    show(console, result)

    console.rule("Cache: softcap-runtime inspect")
    runtime.supply.store.flush()  # this process's hits, which are counted on disk from time to time
    cli.run(["inspect"])
    if result.difference >= TOLERANCE:
        raise SystemExit(f"the logits differ by {result.difference:.1e}, expected less than {TOLERANCE}")


def small_gemma(seed: int) -> Gemma2ForCausalLM:
    """Two sliding and two global layers, softcap 50, four query heads to two key heads, bytes for tokens."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=PAD + 1,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=256,
        attn_logit_softcapping=50.0,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        # Larger weights than training starts from: attention then has something to decide.
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


def batch_of_texts() -> tuple[Tensor, Tensor, list[str]]:
    """The README and the largest sources as bytes, padded on the right: ids and mask ``[B, S]``, and names."""
    sources = sorted((ROOT / "softcap_runtime").rglob("*.py"), key=lambda path: -path.stat().st_size)
    paths = [ROOT / "README.md", *sources][: len(LENGTHS)]
    texts = [path.read_bytes()[:length] for path, length in zip(paths, LENGTHS, strict=True)]
    ids = torch.full((len(texts), max(map(len, texts))), PAD)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text))
    return ids, (ids != PAD).long(), [str(path.relative_to(ROOT)) for path in paths]


def described(console: Console, model: Gemma2ForCausalLM, seed: int, mask: Tensor, names: Sequence[str]) -> None:
    config = model.config
    console.print(
        f"Gemma2ForCausalLM, {sum(weight.numel() for weight in model.parameters()):,} random weights, "
        f"[bold]seed {seed}[/bold]\n"
        f"layers {', '.join(kind.removesuffix('_attention') for kind in config.layer_types)}; "
        f"{config.num_attention_heads} heads over {config.num_key_value_heads} key heads of {config.head_dim}, "
        f"window {config.sliding_window}, softcap {config.attn_logit_softcapping}, {model.dtype}, "
        f"{torch.get_num_threads()} threads"
    )
    lengths = mask.sum(1).tolist()
    console.print("batch: " + ", ".join(f"{name} {count}" for name, count in zip(names, lengths, strict=True)))


def requests_of(model: Gemma2ForCausalLM, length: int) -> list[PrewarmRequest]:
    """One request per distinct kind of layer."""
    config = model.config
    kinds = dict.fromkeys(AttentionConfig.from_hf(config, layer_idx=layer) for layer in range(config.num_hidden_layers))
    return [
        PrewarmRequest(
            config=kind,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            seq_lens=(length,),
            dtype="float32",
        )
        for kind in kinds
    ]


def say_how_warm(console: Console, results: Sequence[PrewarmResult], seconds: float) -> None:
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        raise SystemExit(f"prewarm failed: {failed[0].error}")
    built = sum(result.outcome == "built" for result in results)
    if built:
        console.print(
            f"built {built} of {counted(len(results), 'kernel')} in {seconds:.1f} s; the next run finds them warm"
        )
    else:
        console.print(
            f"[green]everything is warm[/green]: {counted(len(results), 'kernel')} loaded in {seconds * 1000:.0f} ms, "
            "nothing compiled"
        )


def compare(console: Console, model: Gemma2ForCausalLM, ids: Tensor, mask: Tensor) -> Comparison:
    """Both implementations in turn, after one run of each that doesn't count."""
    seconds: dict[str, list[float]] = {"eager": [], "softcap": []}
    logits: dict[str, Tensor] = {}
    with torch.inference_mode(), console.status("running") as status:
        for run in range(RUNS + 1):
            for name in seconds:
                status.update(f"run {run} of {RUNS}: {name}")
                model.set_attn_implementation(name)
                started = time.perf_counter()
                logits[name] = model(ids, attention_mask=mask).logits
                seconds[name].append(time.perf_counter() - started)
    difference = (logits["eager"] - logits["softcap"])[mask.bool()].abs().max().item()
    return Comparison(median(seconds["eager"][1:]), median(seconds["softcap"][1:]), difference)


def show(console: Console, result: Comparison) -> None:
    table = Table("", f"forward pass, median of {RUNS}", "largest difference of the logits")
    table.add_row("Hugging Face eager", f"{result.eager * 1000:.0f} ms", "")
    times = f"{result.ours * 1000:.0f} ms ({result.eager / result.ours:.1f} times as fast)"
    table.add_row("softcap_runtime", times, f"{result.difference:.1e}")
    console.print(table)


if __name__ == "__main__":
    main()
