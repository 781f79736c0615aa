"""What each rank of ``context.py`` runs: context_ranks.py cpu|cuda quick|full OUT.json"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.peers import tanh_softcap
from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime
from softcap_runtime.distributed import ContextMask, SequenceLayout, context_mask
from softcap_runtime.distributed.ranges import keys_seen, renumbered
from softcap_runtime.masks import RowIntervals, row_intervals

DEVICE, QUICK, OUT = sys.argv[1], sys.argv[2] == "quick", Path(sys.argv[3])
WINDOW = 256 if DEVICE == "cpu" else 4096
# Gemma-2 9B's on a GPU.
SHAPE = (8, 4, 64) if DEVICE == "cpu" else (16, 8, 256)
# How often each length is measured, window layers on a GPU, which are short, twice as often; every way at the
# shortest, the others' most telling ones.
LENGTHS = {512: 2} if QUICK else {2048: 9} if DEVICE == "cpu" else {32_768: 7, 131_072: 3, 262_144: 1}
SHORTEST = min(LENGTHS)
# Calls in a row that are not waited for, as layers of a model (Gemma-2 9B has 21 with a window): a device hides all of
# the host's time but that of the first. Global layers take so long that it is not seen.
QUEUED = 20 if DEVICE == "cuda" else 5
QUEUED_GLOBAL = 5
# Expressions that names of cases, and of ways beside computing alone, must match.
WANTED_CASES, WANTED_WAYS = (re.compile(os.environ.get(f"CONTEXT_BENCHMARK_{name}", "")) for name in ("CASES", "WAYS"))
# Length, packed, window: the most telling first, as the time may not be enough for all.
CASES = [
    (length, packed, window)
    for length, packed in itertools.chain(
        [(SHORTEST, False)],
        *([(length, True), (length, False)] for length in sorted(LENGTHS)[1:2]),
        [(SHORTEST, True)],
        *([(length, True), (length, False)] for length in sorted(LENGTHS)[2:]),
    )
    for window in (WINDOW, None)
]
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
DOCUMENT = 2048 if DEVICE == "cuda" else 128
# No case is begun after so many seconds, so that the whole stays under five minutes.
ENOUGH_S = float(os.environ.get("CONTEXT_BENCHMARK_SECONDS", "240"))
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def largest(value: float) -> float:
    """Over all ranks."""
    x = torch.tensor(value, dtype=torch.float64, device=DEVICE)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def milliseconds(call: Callable[[], object]) -> float:
    """The slowest rank's time, all ranks starting together."""
    dist.barrier()
    sync()
    started = time.perf_counter()
    call()
    sync()
    return largest(time.perf_counter() - started) * 1e3


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each and how many times those of the first they are: medians over rounds, in which all have
    their turn, so that a noisy machine is noisy for all of them."""
    took = [[milliseconds(call) for call in calls.values()] for _ in range(rounds)]
    ratios = [[ms / row[0] for ms in row] for row in took]
    medians = (map(statistics.median, zip(*table, strict=True)) for table in (took, ratios))
    return dict(zip(calls, zip(*medians, strict=True), strict=True))


def in_a_row(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def both_ways(attend: Attend, inputs: list[Tensor], grad_out: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    attend(*leaves).backward(grad_out)


def in_model_order(x: Tensor) -> Tensor:
    """A copy laid out ``[B, S, H, D]``, as a projection leaves it."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def on_device(mask: RowIntervals) -> RowIntervals:
    return mask if mask.lo is None or mask.hi is None else mask._replace(lo=mask.lo.to(DEVICE), hi=mask.hi.to(DEVICE))


def torch_flex(config: AttentionConfig, ids: Tensor | None, seq_len: int, mesh: DeviceMesh) -> Attend:
    """torch's own context parallel for flex attention: it gathers k and v whole. Its default layout is zigzag."""
    from torch.distributed.tensor.experimental import _attention as torch_context
    from torch.distributed.tensor.experimental._context_parallel._attention import _create_cp_block_mask
    from torch.nn.attention.flex_attention import flex_attention

    documents = None if ids is None else ids[0].to(DEVICE)
    window = config.window

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j
        if window is not None:
            seen = seen & (i - j < window)
        return seen if documents is None else seen & (documents[i] == documents[j])

    mask = _create_cp_block_mask(mask_mod, 1, 1, seq_len, seq_len, mesh)
    style = torch_context._ContextParallel(2, torch_context._ContextParallel.AttentionType.FLEX)
    torch._dynamo.reset()  # beyond its limit of compilations torch would compute it unfused, in silence
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q, k, v), _ = style.flex_input_fn(None, (q, k, v), {}, mesh)
        out: Tensor = compiled(q, k, v, score_mod=tanh_softcap, block_mask=mask, scale=config.scale, enable_gqa=True)
        return out

    return attend


class Way:
    """One way to compute a case: its layout, what it is called with, what it moves."""

    def __init__(self, name: str, layout: SequenceLayout, attend: Attend, received: float, pairs: float) -> None:
        self.name, self.layout, self.attend = name, layout, attend
        self.received, self.pairs = received, pairs


def ways(
    config: AttentionConfig, ids: Tensor | None, seq_len: int, inputs: list[Tensor], mesh: DeviceMesh
) -> list[Way]:
    """Computing alone, then those that are wanted."""
    runtime, count = Runtime.get(), mesh.size()
    heads, kv_heads, head_dim = SHAPE
    masks = {} if ids is None else {"document_ids": ids}
    contiguous = SequenceLayout.contiguous(seq_len, count)
    keys_layout = SequenceLayout.zigzag(seq_len, count) if config.window is None else contiguous
    by_keys = context_mask(config, keys_layout, mesh, method="keys", **masks)
    by_heads = context_mask(config, contiguous, mesh, method="heads", **masks)
    floor = alone(config, ids, keys_layout, inputs, mesh)
    pairs = max(by_keys.pairs) / (sum(by_keys.pairs) / count)
    found = [Way("the computing of keys alone", keys_layout, floor, 0.0, pairs)]

    def add(name: str, context: ContextMask, attend: Attend, received: float | None = None) -> None:
        if not WANTED_WAYS.search(name):
            return
        moved = max(context.received_bytes(heads, kv_heads, head_dim, DTYPE)) if received is None else received
        found.append(Way(name, context.layout, attend, moved, max(context.pairs) / (sum(context.pairs) / count)))

    def ours(context: ContextMask, stages: int) -> Attend:
        return lambda q, k, v: runtime.context_attention(q, k, v, config, context, stages=stages)

    auto = by_heads if config.window is None else by_keys
    for method, context, most in (("keys", by_keys, kv_heads), ("heads", by_heads, kv_heads // count)):
        for stages in (1, 2, 4):
            telling = seq_len == SHORTEST or stages == 1 or (stages == 2 and context is auto)
            if stages <= most and telling:
                add(f"ours, {method}, stages {stages}", context, ours(context, stages))
    everything = row_intervals(seq_len, seq_len, causal=True, window=config.window, **masks)
    rank = mesh.get_local_rank()
    local = on_device(renumbered(everything, keys_layout.ranges[rank], ((0, seq_len),)))

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = keys_layout.unshard(k, 2, mesh), keys_layout.unshard(v, 2, mesh)
        return runtime.attend(q, k, v, config, local)

    rows = seq_len - contiguous.count(0)
    each = 2 * kv_heads * head_dim * DTYPE.itemsize
    add("gather k and v, our kernels", by_keys, gather, rows * each)
    if not WANTED_WAYS.search("flex") or (DEVICE == "cuda" and (ids is not None or seq_len > SHORTEST)):
        return found  # each mask and length is compiled anew: the rest would take longer than all else
    try:
        flex = torch_flex(config, ids, seq_len, mesh)
    except (ImportError, AttributeError, NotImplementedError) as error:
        say(f"torch's flex context parallel: {error}")
    else:
        zigzag = context_mask(config, SequenceLayout.zigzag(seq_len, count), mesh, method="keys", **masks)
        add("torch's flex context parallel", zigzag, flex, rows * each)
    return found


def alone(
    config: AttentionConfig, ids: Tensor | None, layout: SequenceLayout, inputs: list[Tensor], mesh: DeviceMesh
) -> Attend:
    """This rank's computing of its rows with all keys that they need there already."""
    masks = {} if ids is None else {"document_ids": ids}
    mask = row_intervals(inputs[0].shape[2], inputs[0].shape[2], causal=True, window=config.window, **masks)
    rank = mesh.get_local_rank()
    keys = keys_seen(mask, layout.ranges[rank])
    local = on_device(renumbered(mask, layout.ranges[rank], keys))
    k, v = (in_model_order(torch.cat([x[:, :, start:end] for start, end in keys], 2)) for x in inputs[1:])
    runtime = Runtime.get()

    def attend(q: Tensor, *_: Tensor) -> Tensor:
        keys, values = (x.detach().requires_grad_(q.requires_grad) for x in (k, v))
        return runtime.attend(q, keys, values, config, local)

    return attend


def name_of(config: AttentionConfig, ids: Tensor | None) -> str:
    window = "global" if config.window is None else f"window {config.window}"
    return f"{window} {'plain' if ids is None else 'packed'}"


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def measure_case(
    config: AttentionConfig, ids: Tensor | None, seq_len: int, rounds: int, mesh: DeviceMesh
) -> list[dict[str, Any]]:
    heads, kv_heads, head_dim = SHAPE
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = [
        torch.randn(1, seq_len, h, head_dim, generator=generator, device=DEVICE, dtype=DTYPE).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]
    whole_ids = {} if ids is None else {"document_ids": ids.to(DEVICE)}
    with torch.no_grad():
        want = Runtime.get().attention(*inputs, config, **whole_ids)
    made, rank = ways(config, ids, seq_len, inputs, mesh), mesh.get_local_rank()
    case = f"S{seq_len:,} {name_of(config, ids)}"
    queued = QUEUED_GLOBAL if config.window is None else QUEUED
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {}, "queued": {}, "both": {}, "queued both": {}
    }  # fmt: skip
    for way in made:
        mine = [in_model_order(way.layout.shard(x, 2, rank)) for x in inputs]
        forward = torch.no_grad()(functools.partial(way.attend, *mine))
        both = functools.partial(both_ways, way.attend, mine, torch.ones_like(mine[0]))
        part = way.layout.shard(want, 2, rank).float()
        error = float((forward().float() - part).norm() / part.norm())
        calls["forward"][way.name] = forward
        calls["queued"][way.name] = functools.partial(in_a_row, forward, queued)
        used = None
        if DEVICE == "cuda" or not way.name.startswith("torch"):  # flex has no backward on the CPU
            both()
            calls["both"][way.name] = both
            if config.window is not None:
                calls["queued both"][way.name] = functools.partial(in_a_row, both, queued)
            used = memory_of(both) if DEVICE == "cuda" else None
        rows[way.name] = {"MB": way.received / 1e6, "pairs": way.pairs, "GB": used, "error": largest(error)}
    found: list[dict[str, Any]] = []
    took = {kind: in_turn(named, rounds) for kind, named in calls.items() if named}
    for name, row in rows.items():
        figures = {}
        for kind, measured in took.items():
            ms, ratio = measured.get(name, (None, None))
            each = queued if kind.startswith("queued") else 1
            figures |= {f"{kind} ms": None if ms is None else ms / each, f"{kind} x": ratio}
        found.append({"case": case, "who": name, **figures, **row})
        say("  ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in found[-1].values()))
    return found


def memory_of(call: Callable[[], object]) -> float:
    """GB of the busiest rank at the peak, beyond what is held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return largest((torch.cuda.max_memory_allocated() - before) / 1e9)


def main() -> None:
    started = time.monotonic()
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # as the documentation advises
    else:
        torch.set_num_threads(1)
    heads, kv_heads, head_dim = SHAPE
    request = PrewarmRequest(
        config=AttentionConfig(softcap=50.0, scale=head_dim**-0.5),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype="float32" if DEVICE == "cpu" else "bfloat16",
        device=DEVICE,
        train=True,
    )
    Runtime.get().prewarm([request], progress=False)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=timedelta(seconds=120))
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    rows: list[dict[str, Any]] = []
    for seq_len, packed, window in CASES:
        if largest(time.monotonic() - started) > ENOUGH_S:
            say(f"stopped after {ENOUGH_S} s")
            break
        generator = torch.Generator().manual_seed(seq_len)
        ids = (torch.rand(1, seq_len, generator=generator) < 1 / DOCUMENT).cumsum(1) if packed else None
        config = AttentionConfig(softcap=50.0, scale=SHAPE[2] ** -0.5, window=window)
        if not WANTED_CASES.search(f"S{seq_len:,} {name_of(config, ids)}"):
            continue
        rounds = LENGTHS[seq_len] * (2 if DEVICE == "cuda" and window is not None else 1)
        rows += measure_case(config, ids, seq_len, rounds, mesh)
        if dist.get_rank() == 0:
            OUT.write_text(json.dumps(rows))  # after each case, so that what was measured stays
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
