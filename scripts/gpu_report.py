"""The whole table of GPU figures in one command: ``python scripts/gpu_report.py --out report``.

Writes ``<out>.json`` and ``<out>.md``, anew after each part, so a run that is stopped leaves what it has; on an H200
all parts take some four minutes, and six where FlashAttention-4 is installed. What is compared is timed in turns.
``--smoke`` runs tiny shapes on the CPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import gpu_peers
from benchmarks.peers import SOFTCAP, sdpa
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings, reference
from softcap_runtime.masks import band, dense

LEGEND = """# GPU report

Written by `python scripts/gpu_report.py --out report`. B2 Hq16 Hkv8 D256 S8192 w4096: batch, query heads, key heads,
head_dim, tokens, window (None: none). GEMM share: of the rate of a bf16 product of torch. error: relative, to float64.
"""
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_report"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    device = "cpu" if arguments.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; use --smoke to see that the script works")
    settings = RuntimeSettings(engine="eager" if arguments.smoke else "auto")
    report = Report(device, arguments.smoke, Runtime(settings))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        started = time.perf_counter()
        part(report)
        print(report.tables[-1], f"({time.perf_counter() - started:.0f} s)", flush=True)
        report.write(arguments.out)


class Report:
    """Device, ceilings, and the rows measured so far."""

    def __init__(self, device: str, smoke: bool, runtime: Runtime) -> None:
        self.device, self.smoke, self.runtime = device, smoke, runtime
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.tables: list[str] = []
        size = 256 if smoke else 8192
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.empty(2**20 if smoke else 2**31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.copying = partial(target.copy_, source)
        self.copy = 2 * source.numel() / self.seconds(self.copying)
        self.gemm = 2 * size**3 / self.seconds(lambda: a @ b)
        self.environment = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (smoke)",
            "torch": torch.__version__,
            "bf16 GEMM": f"{self.gemm / 1e12:.0f} TFLOP/s",
            "copy": f"{self.copy / 1e12:.2f} TB/s",
        }
        print(self.environment)

    def seconds(self, call: Call, rounds: int = 15) -> float:
        """Median seconds of a call, by device events on a GPU; a copy of 1 ms before it lets the host get ahead."""
        for _ in range(1 if self.smoke else 3):
            call()
        taken = []
        for _ in range(2 if self.smoke else rounds):
            if self.device == "cpu":
                started = time.perf_counter()
                call()
                taken.append(time.perf_counter() - started)
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.copying()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        return sorted(taken)[len(taken) // 2]

    def in_turns(self, calls: dict[str, Call], rounds: int = 3) -> dict[str, float]:
        """Median seconds of each call, a few of each in turn: a card that gets hot slows all of them."""
        taken: dict[str, list[float]] = {who: [] for who in calls}
        for _ in range(1 if self.smoke else rounds):
            for who, call in calls.items():
                taken[who].append(self.seconds(call, 7))
        return {who: statistics.median(each) for who, each in taken.items()}

    def write(self, out: Path) -> None:
        """What was measured so far."""
        document = {"environment": self.environment, "rows": self.rows}
        out.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        lines = [LEGEND, *(f"- {name}: {value}" for name, value in self.environment.items())]
        out.with_suffix(".md").write_text("\n".join([*lines, "", *self.tables]) + "\n", encoding="utf-8")

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keep rows, and a Markdown table of them."""
        self.rows[name] = rows
        head = list(rows[0])
        body = [[_shown(row[column]) for column in head] for row in rows]
        lines = [" | ".join(line) for line in (head, ["---"] * len(head), *body)]
        self.tables.append(f"### {name}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n")

    def inputs(self, batch: int, heads: int, kv_heads: int, length: int, head_dim: int) -> list[Tensor]:
        """Fresh random bf16 q, k, v with gradients, laid out as projections make them."""
        made = []
        for count in (heads, kv_heads, kv_heads):
            x = torch.randn(batch, length, count, head_dim, device=self.device).bfloat16()
            made.append(x.transpose(1, 2).detach().requires_grad_())
        return made


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def step(call: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> Call:
    """Forward and backward as one call."""
    return lambda: torch.autograd.grad(call(*tensors), tensors, grad)


def error(report: Report, tensors: list[Tensor], out: Tensor, window: int | None) -> float:
    """Relative error of the first kv head's group against float64."""
    q, k, v = tensors
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    rows = slice(max(0, length - 1024), length)
    lo_hi = band(length, length, causal=True, window=window)
    mask = dense(lo_hi, report.device)[:, rows] if length <= 16384 else None
    wide = [q[:1, :groups, rows].double(), k[:1, :1].double(), v[:1, :1].double()]
    true, _ = reference.attention(*wide, mask, scale=q.shape[3] ** -0.5, softcap=SOFTCAP)
    return float((out[:1, :groups, rows].double() - true).norm() / true.norm())


def approximate(report: Report) -> Runtime:
    """A runtime whose tanh is the device's instruction."""
    return Runtime(RuntimeSettings(engine="eager" if report.smoke else "auto", softcap_approx=True))


def installed_peers(
    report: Report, head_dim: int, length: int, window: int | None, tensors: list[Tensor], grad: Tensor
) -> dict[str, Callable[..., Tensor]]:
    """The peers of a training shape that work here; flex, which is compiled anew for each, for some."""
    scale = head_dim**-0.5
    found: dict[str, Callable[..., Tensor] | None] = {}
    if report.device == "cuda" and head_dim > 64:  # flex has no backward on the CPU
        found["FlashAttention-4"] = gpu_peers.flash4(window, scale)
        if length > 1024:
            flex = partial(gpu_peers.flex, length, window, scale, report.device)
            found["stock flex"] = flex()
            if window is None:
                found["flex, sigmoid"] = flex(gpu_peers.sigmoid_cap)
                found["SDPA by cuDNN, no softcap"] = gpu_peers.cudnn_sdpa
            if head_dim == 128 and gpu_peers.flash4(window, scale):
                found["flex, FLASH"] = flex(backend="FLASH")
    return {
        who: call
        for who, call in found.items()
        if call is not None and gpu_peers.usable(who, step(call, tensors, grad))
    }


def training_shapes(report: Report) -> None:
    """Gemma-2 9B and 27B, global and windowed layers, and short inputs; forward and forward + backward."""
    shapes = [
        (2, 16, 8, 8192, 256, None),
        (2, 16, 8, 8192, 256, 4096),
        (2, 32, 16, 8192, 128, None),
        (2, 32, 16, 8192, 128, 4096),
        (2, 32, 16, 8192, 64, None),
        (8, 8, 4, 1024, 256, None),
        (32, 8, 4, 256, 256, None),
        (1, 8, 4, 512, 256, None),
    ]
    if report.smoke:
        shapes = [(1, 2, 1, 64, 64, None), (1, 2, 1, 64, 64, 32)]
    rows = []
    for batch, heads, kv_heads, length, head_dim, window in shapes:
        tensors = report.inputs(batch, heads, kv_heads, length, head_dim)
        grad = torch.randn_like(tensors[0])
        config = AttentionConfig(softcap=SOFTCAP, scale=head_dim**-0.5, window=window)
        approx = approximate(report)
        peers: dict[str, Callable[..., Tensor]] = {
            "softcap_runtime": lambda *qkv, config=config: report.runtime.attention(*qkv, config),
            "SOFTCAP_APPROX=1": lambda *qkv, config=config, approx=approx: approx.attention(*qkv, config),
        }
        peers |= installed_peers(report, head_dim, length, window, tensors, grad)
        if window is None:
            peers["SDPA, no softcap"] = sdpa
        pairs = length * (length + 1) / 2 - (0 if window is None else (length - window) ** 2 / 2)
        flop = 4 * batch * heads * head_dim * pairs
        with torch.no_grad():
            wrong = {
                who: None if "no softcap" in who else error(report, tensors, call(*tensors), window)
                for who, call in peers.items()
            }
            forward = report.in_turns({who: partial(call, *tensors) for who, call in peers.items()})
        both = report.in_turns({who: step(call, tensors, grad) for who, call in peers.items()})
        shape = f"B{batch} Hq{heads} Hkv{kv_heads} D{head_dim} S{length} w{window}"
        for who in peers:
            rows.append(
                {
                    "shape": shape,
                    "who": who,
                    "forward ms": forward[who] * 1e3,
                    "GEMM share": flop / forward[who] / report.gemm,
                    "fwd + bwd ms": both[who] * 1e3,
                    "GEMM share, both": 3.5 * flop / both[who] / report.gemm,
                    "error": wrong[who],
                }
            )
    report.table("training shapes, bf16, causal", rows)


def saturated(report: Report) -> None:
    """Errors of outputs and gradients against float64 where the logits meet the cap; beside eager's in bf16."""
    rows = []
    for head_dim in (64,) if report.smoke else (128, 256):
        for spread in (1, 3, 10, 30):
            length = 64 if report.smoke else 1024
            tensors = [(x.detach() * spread).requires_grad_() for x in report.inputs(1, 4, 2, length, head_dim)]
            grad = torch.randn_like(tensors[0])
            mask = dense(band(length, length, causal=True, window=None), report.device)

            def attend(*qkv: Tensor, mask: Tensor = mask) -> Tensor:
                return reference.attention(*qkv, mask, scale=qkv[0].shape[3] ** -0.5, softcap=SOFTCAP)[0]

            wide = [x.detach().double().requires_grad_() for x in tensors]
            true = [attend(*wide), *step(attend, wide, grad.double())()]
            config = AttentionConfig(softcap=SOFTCAP, scale=head_dim**-0.5)
            for who, call in (
                ("softcap_runtime", lambda *qkv, config=config: report.runtime.attention(*qkv, config)),
                ("eager", attend),
            ):
                found = [call(*tensors), *step(call, tensors, grad)()]
                errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, true, strict=True)]
                names = ("out", "dq", "dk", "dv")
                rows.append({"D": head_dim, "inputs x": spread, "who": who, **dict(zip(names, errors, strict=True))})
    report.table("errors at saturated logits, bf16", rows)


def packed(report: Report) -> None:
    """A packed batch, mask building included."""
    length, mean = (256, 32) if report.smoke else (32768, 1024)
    tensors = report.inputs(1, 16, 8, length, 64 if report.smoke else 256)
    grad = torch.randn_like(tensors[0])
    ends = torch.sort(torch.randint(1, length, (length // mean,), device=report.device)).values
    ids = torch.bucketize(torch.arange(length, device=report.device), ends, right=True)[None]
    scale = tensors[0].shape[3] ** -0.5
    config = AttentionConfig(softcap=SOFTCAP, scale=scale)
    calls: dict[str, Callable[..., Tensor]] = {
        "softcap_runtime": lambda *t: report.runtime.attention(*t, config, document_ids=ids)
    }
    if report.device == "cuda":
        calls["stock flex + create_block_mask"] = gpu_peers.packed_flex(ids[0], scale)
        flash4 = gpu_peers.packed_flash4(ids[0], scale)
        if flash4 is not None and gpu_peers.usable("FlashAttention-4", step(flash4, tensors, grad)):
            calls["FlashAttention-4, bounds given"] = flash4
    with torch.no_grad():
        forward = report.in_turns({who: partial(call, *tensors) for who, call in calls.items()})
    both = report.in_turns({who: step(call, tensors, grad) for who, call in calls.items()})
    rows = [{"who": who, "forward ms": forward[who] * 1e3, "fwd + bwd ms": both[who] * 1e3} for who in calls]
    report.table(f"packed, documents of {mean} on average, S={length}, mask included", rows)


def masked(report: Report) -> None:
    """What an ``attention_mask`` costs, the making of its intervals included: times of the same calls without one.

    Training at one head_dim only: that of others is several kernels more to compile.
    """
    rows: list[dict[str, Any]] = []
    for heads, head_dim in ((2, 64),) if report.smoke else ((16, 256), (32, 128), (32, 64)):
        config = AttentionConfig(softcap=SOFTCAP, scale=head_dim**-0.5)
        for batch, length in ((2, 64),) if report.smoke else ((16, 512), (4, 2048), (2, 8192)):
            tensors = report.inputs(batch, heads, heads // 2, length, head_dim)
            grad = torch.randn_like(tensors[0])
            calls = {
                name: partial(report.runtime.attention, config=config, attention_mask=mask)
                for name, mask in {"none": None, **masks_of(batch, length, report.device)}.items()
            }
            with torch.no_grad():
                forward = report.in_turns({name: partial(call, *tensors) for name, call in calls.items()})
            both = {}
            if head_dim == 256 or report.smoke:
                both = report.in_turns({name: step(call, tensors, grad) for name, call in calls.items()})
            shape = f"B{batch} Hq{heads} Hkv{heads // 2} D{head_dim} S{length}"
            for name in list(calls)[1:]:
                steps = both[name] / both["none"] if both else None
                rows.append(
                    {"shape": shape, "mask": name, "forward": forward[name] / forward["none"], "fwd + bwd": steps}
                )
    report.table("attention_mask, times of the same call without one", rows)


def masks_of(batch: int, length: int, device: str) -> dict[str, Tensor]:
    """Masks of tokens ``[batch, length]``: 1 is shown, 0 hidden."""
    ones = torch.ones(batch, length, dtype=torch.int64, device=device)
    one_hole = ones.clone()
    one_hole[:, length // 3] = 0
    holes = (torch.rand(batch, length, device=device) >= 0.1).long()
    starts = torch.linspace(0, length // 2, batch, device=device).long()[:, None]
    padded = (torch.arange(length, device=device) >= starts).long()
    return {"of ones": ones, "one hole": one_hole, "a tenth hidden": holes, "left padding of 0 to half": padded}


def decoding(report: Report) -> None:
    """One new token against a long cache, as a share of the copy bandwidth."""
    batch, length, head_dim = (2, 64, 64) if report.smoke else (32, 8192, 256)
    q = torch.randn(batch, 16, 1, head_dim, device=report.device).bfloat16()
    k, v = (torch.randn(batch, 8, length, head_dim, device=report.device).bfloat16() for _ in range(2))
    config = AttentionConfig(softcap=SOFTCAP, scale=head_dim**-0.5)
    with torch.no_grad():
        seconds = report.seconds(lambda: report.runtime.attention(q, k, v, config))
    rate = 2 * k.numel() * k.element_size() / seconds
    row = {"ms": seconds * 1e3, "TB/s": rate / 1e12, "share of copy": rate / report.copy}
    report.table(f"decoding, B{batch}, {length} keys", [row])


def paged(report: Report) -> None:
    """The same keys in pages that lie in any order, one new row and several, beside keys that lie together."""
    batch, length = (2, 64) if report.smoke else (32, 8192)
    dims = (64,) if report.smoke else (256, 128)
    found = [row for head_dim in dims for row in pages_of(report, batch, length, head_dim)]
    report.table(f"decoding from pages, B{batch}, {length} keys", found)


def pages_of(report: Report, batch: int, length: int, head_dim: int) -> list[dict[str, Any]]:
    """Rows of ``paged`` for a head_dim."""
    config = AttentionConfig(softcap=SOFTCAP, scale=head_dim**-0.5)
    k, v = (torch.randn(batch, 8, length, head_dim, device=report.device).bfloat16() for _ in range(2))
    lengths = torch.full((batch,), length, device=report.device)
    sizes = (16,) if report.smoke else (16, 64, 256)
    calls: dict[str, Call] = {}
    for rows in (1, 4, 8):
        q = torch.randn(batch, 16, rows, head_dim, device=report.device).bfloat16()
        calls[f"together, {rows} rows"] = lambda q=q: report.runtime.attention(q, k, v, config)
        for size in sizes if rows == 1 else sizes[:1]:
            pages = [x.view(-1, size, 8, head_dim) for x in (k, v)]  # random, whichever way it is read
            table = torch.randperm(batch * length // size, device=report.device).int().view(batch, -1)
            ours = partial(report.runtime.paged_attention, q, *pages, config, table, lengths)
            calls[f"pages of {size}, {rows} rows"] = ours
            if rows == 1 and report.device == "cuda":
                peers = flashinfer_calls(q, pages, table, ours)
                calls |= {f"pages of {size}, {rows} rows, {who}": call for who, call in peers.items()}
    with torch.no_grad():
        seconds = report.in_turns(calls)
    moved = 2 * k.numel() * k.element_size()
    found = []
    for who, each in seconds.items():
        shares = {"x together, 1 row": each / seconds["together, 1 rows"], "share of copy": moved / each / report.copy}
        found.append({"D": head_dim, "keys": who, "ms": each * 1e3, **shares})
    return found


def flashinfer_calls(q: Tensor, pages: list[Tensor], table: Tensor, ours: Call) -> dict[str, Call]:
    """FlashInfer's two kernels, planned beforehand, where it is installed and they give what ours do."""
    found: dict[str, Call] = {}
    for who, cores in (("FlashInfer", False), ("FlashInfer by tensor cores", True)):

        def add(who: str = who, cores: bool = cores) -> None:
            attend = gpu_peers.flashinfer(q, *pages, table, cores=cores)
            if attend is not None:
                torch.testing.assert_close(attend(q, *pages), ours(), rtol=2e-2, atol=1e-3)
                found[who] = partial(attend, q, *pages)

        gpu_peers.usable(who, add)
    return found


def memory(report: Report) -> None:
    """Peak memory of forward + backward beyond inputs, output and gradients."""
    rows = []
    for length in (128, 256) if report.smoke else (16384, 32768):
        tensors = report.inputs(1, 16, 8, length, 64 if report.smoke else 256)
        grad = torch.randn_like(tensors[0])
        config = AttentionConfig(softcap=SOFTCAP, scale=0.0625)
        run = step(lambda *t, config=config: report.runtime.attention(*t, config), tensors, grad)
        run()
        if report.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            grads = run()
            kept = sum(x.numel() * x.element_size() for x in (*grads, tensors[0]))
            rows.append({"S": length, "MB": (torch.cuda.max_memory_allocated() - before - kept) / 1e6})
        else:
            rows.append({"S": length, "MB": None})
    report.table("memory of forward + backward beyond inputs, output and gradients", rows)


def overhead(report: Report) -> None:
    """Host time of an eager call and of a training step, tiny inputs, nothing waited for."""
    q = torch.randn(1, 16, 128, 64, device=report.device).bfloat16()
    leaf, grad = q.clone().requires_grad_(), torch.randn_like(q)
    config = AttentionConfig(softcap=SOFTCAP, scale=0.125)

    def ours(*qkv: Tensor) -> Tensor:
        return report.runtime.attention(*qkv, config)

    calls: dict[str, Callable[..., Tensor]] = {"softcap_runtime": ours, "SDPA, no softcap": sdpa}
    if report.device == "cuda":
        calls["stock flex"] = gpu_peers.flex(128, None, 0.125, report.device)
    rows = []
    with torch.no_grad():
        plain = host_seconds(report, {who: partial(call, q, q, q) for who, call in calls.items()})
    trained = {who: step(lambda x, call=call: call(x, x, x), [leaf], grad) for who, call in calls.items()}
    steps = host_seconds(report, trained)
    for who in calls:
        rows.append({"who": who, "us a call, host": plain[who] * 1e6, "us a step, host": steps[who] * 1e6})
    report.table("call overhead", rows)


def host_seconds(report: Report, calls: dict[str, Call]) -> dict[str, float]:
    """Median seconds of calls on the host, in turn: a slow minute of the host is one for all."""
    taken: dict[str, list[float]] = {who: [] for who in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    for index in range(20 if report.smoke else 1000):
        if report.device == "cuda" and index % 50 == 0:
            torch.cuda.synchronize()  # or the launches of what is ahead fill the device's queue
        for who, call in calls.items():
            started = time.perf_counter()
            call()
            taken[who].append(time.perf_counter() - started)
    return {who: statistics.median(each) for who, each in taken.items()}


FRESH = """
import sys, time, torch
device, train = sys.argv[1], sys.argv[2] == "train"
x = torch.ones(64, 64, device=device)
(x @ x).sum().item()
q, k, v = (torch.randn(1, h, 2048, 256, device=device).bfloat16().requires_grad_(train) for h in (8, 4, 4))
started = time.perf_counter()
"""
OURS = """
from softcap_runtime import AttentionConfig, Runtime
imported = time.perf_counter()
out = Runtime.get().attention(q, k, v, AttentionConfig(softcap=50.0, scale=0.0625))
"""
STOCK = """
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
imported = time.perf_counter()
mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 2048, 2048, device=device)
cap = lambda score, b, h, i, j: 50.0 * torch.tanh(score / 50.0)
compiled = torch.compile(flex_attention, fullgraph=True)
out = compiled(q, k, v, score_mod=cap, block_mask=mask, scale=0.0625, enable_gqa=True)
"""
END = """
if train:
    out.sum().backward()
out[0, 0, 0, 0].item()
print(imported - started, time.perf_counter() - imported)
"""


def fresh_process(report: Report) -> None:
    """From after ``import torch`` and the device's start to the first result, caches warm; our medians are of five."""
    rows = []
    # Byte code is one of the caches: an installation has it, and where a container forbids it, compiling 31 modules
    # takes three quarters of the time to the first result.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    for who, code in (("softcap_runtime", OURS), ("stock flex", STOCK)):
        if who == "stock flex" and report.smoke:
            continue
        row: dict[str, Any] = {"who": who}
        for what in ("inference", "train"):
            command = [sys.executable, "-c", FRESH + code + END, report.device, what]
            runs = 6 if who == "softcap_runtime" else 2  # flex takes 8 s
            done = [
                subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                for _ in range(runs)
            ]
            lines = [one.stdout.splitlines()[-1].split() for one in done[1:]]  # the first fills the caches
            row[f"import, {what}, ms"], row[f"first result, {what}, ms"] = (
                statistics.median(map(float, column)) * 1e3 for column in zip(*lines, strict=True)
            )
        rows.append(row)
    report.table("a fresh process, caches warm", rows)


PARTS = (training_shapes, saturated, packed, masked, decoding, paged, memory, overhead, fresh_process)

if __name__ == "__main__":
    main()
