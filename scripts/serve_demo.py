"""Serves forty requests by a small Gemma-2 through continuous batching, and shows them while they run.

The model has random weights from a printed seed; the prompts are pieces of the language reference that Python ships,
in bytes. Everything is prewarmed first and served under ``jit="forbid"``: a kernel that had to be compiled on the way
would end the demo. Beside it the same requests one by one through ``generate``, and in padded batches; all three must
give the same tokens. At the end the runtime's Prometheus endpoint is scraped once.
"""

from __future__ import annotations

import argparse
import inspect
import random
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pydoc_data.topics import topics
from typing import Any

import torch
from prometheus_client import CollectorRegistry, start_http_server
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import ContinuousBatchingConfig, Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime, RuntimeSettings
from softcap_runtime.integrations.prometheus import RuntimeCollector
from softcap_runtime.integrations.transformers import register

LENGTHS = (16, 400)  # tokens of the shortest and the longest prompt
BATCH = 8  # requests of a padded batch
PAGE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=32, help="of each request")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    console = Console()
    console.print(f"seed {arguments.seed}, {arguments.device}, {torch.get_num_threads()} threads")

    model = small_gemma(arguments.seed).to(arguments.device)
    prompts = pieces(arguments.seed, arguments.requests)
    # No token ends a generation before its time, so that all three ways do the same work.
    greedy = GenerationConfig(max_new_tokens=arguments.new_tokens, do_sample=False, pad_token_id=0)
    prewarm(model)
    runtime = Runtime(RuntimeSettings(jit="forbid"))
    register(runtime)
    registry = CollectorRegistry()
    registry.register(RuntimeCollector(runtime))
    server, _ = start_http_server(0, "127.0.0.1", registry)

    ways = {
        "generate, one by one": one_by_one(model, prompts, greedy),
        f"generate, padded batches of {BATCH}": padded(model, prompts, greedy),
        "continuous batching": continuous(model, prompts, greedy, console),
    }
    tokens, rates = {}, {}
    for name, way in ways.items():
        begin = time.perf_counter()
        tokens[name] = list(way)
        rates[name] = sum(map(len, tokens[name])) / (time.perf_counter() - begin)
    show(console, rates)
    wanted, *others = tokens.values()
    differing = sum(mine != theirs for other in others for mine, theirs in zip(wanted, other, strict=True))
    console.print(f"requests whose tokens differ from those of generate, one by one: {differing}")
    port = server.server_address[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = [line for line in page.read().decode().splitlines() if not line.startswith("#")]
    console.print(f"http://127.0.0.1:{port}/metrics:", *lines, sep="\n  ")
    server.shutdown()
    if differing:
        raise SystemExit(1)


def small_gemma(seed: int) -> Gemma2ForCausalLM:
    """Bytes in, bytes out; window and global layers in turn."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
        attn_logit_softcapping=50.0,
        initializer_range=0.08,  # so that no two tokens are nearly as likely
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Gemma2ForCausalLM(config).eval()


def pieces(seed: int, count: int) -> list[list[int]]:
    """Prompts of different lengths, from real text."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    choice = random.Random(seed)
    lengths = [choice.randint(*LENGTHS) for _ in range(count)]
    starts = [choice.randrange(len(text) - length) for length in lengths]
    return [list(text[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def prewarm(model: Gemma2ForCausalLM) -> None:
    """Have the kernels of both kinds of layer built before anything is served."""
    config = model.config
    Runtime.get().prewarm(
        [
            PrewarmRequest(
                config=AttentionConfig.from_hf(config, layer),
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                dtype=model.dtype,
                device=str(model.device),
                paged=True,
            )
            for layer in (0, 1)
        ]
    )


def one_by_one(model: Gemma2ForCausalLM, prompts: list[list[int]], greedy: GenerationConfig) -> Iterator[list[int]]:
    model.set_attn_implementation("softcap")
    for prompt in prompts:
        given = torch.tensor([prompt], device=model.device)
        yield model.generate(given, generation_config=greedy)[0, len(prompt) :].tolist()


def padded(model: Gemma2ForCausalLM, prompts: list[list[int]], greedy: GenerationConfig) -> Iterator[list[int]]:
    """In the order in which they came, padded on the left to the longest of their batch."""
    model.set_attn_implementation("softcap")
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch], device=model.device)
        keep = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]).to(ids)
        yield from model.generate(ids, attention_mask=keep, generation_config=greedy)[:, longest:].tolist()


def continuous(
    model: Gemma2ForCausalLM, prompts: list[list[int]], greedy: GenerationConfig, console: Console
) -> Iterator[list[int]]:
    """All at once, with a table that lives while they run."""
    model.set_attn_implementation("softcap_flash")
    pages = sum(-(-(len(prompt) + greedy.max_new_tokens) // PAGE) for prompt in prompts)
    config = ContinuousBatchingConfig(**page_size(), num_blocks=pages, max_batch_tokens=512, max_blocks_per_request=0)
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
    manager.start()
    begin = time.perf_counter()
    done: dict[str, list[int]] = {}
    names = manager.add_requests(prompts, max_new_tokens=greedy.max_new_tokens)
    with Live(console=console, refresh_per_second=4) as live:
        while len(done) < len(names):
            result = manager.get_result(timeout=0.25)
            if result is not None:
                if result.error:
                    raise SystemExit(f"request {result.request_id}: {result.error}")
                done[result.request_id] = result.generated_tokens
            live.update(state(manager, done.values(), len(names), time.perf_counter() - begin))
    manager.stop(block=True)
    yield from (done[name] for name in names)


def page_size() -> dict[str, int]:
    """The argument for ``PAGE``, which transformers 5.17 calls a block."""
    known = inspect.signature(ContinuousBatchingConfig).parameters
    return {"page_size" if "page_size" in known else "block_size": PAGE}


def pages_in_use(cache: Any) -> str:
    """In the units of transformers: blocks of 5.17, sectors later."""
    if hasattr(cache, "num_sectors"):
        free, count = cache.pool.num_free_sectors, cache.num_sectors
    else:
        free, count = cache.get_num_free_blocks(), cache.num_blocks
    return f"{count - free} of {count}"


def state(manager: Any, done: Iterable[list[int]], requests: int, seconds: float) -> Table:
    finished = list(done)
    tokens = sum(map(len, finished))
    table = Table("requests done", "tokens of these", "tokens a second", "cache pages in use")
    processor = manager.batch_processor
    used = "-" if processor is None else pages_in_use(processor.cache)
    table.add_row(f"{len(finished)} of {requests}", str(tokens), f"{tokens / seconds:.0f}", used)
    return table


def show(console: Console, rates: dict[str, float]) -> None:
    table = Table("", "tokens a second", "beside one by one")
    slowest = next(iter(rates.values()))
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.0f}", f"{rate / slowest:.1f} x")
    console.print(table)


if __name__ == "__main__":
    main()
