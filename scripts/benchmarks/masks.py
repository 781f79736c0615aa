"""Masks: closed form against create_block_mask, and what skipping blocks saves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.report import Report, side_by_side
from softcap_runtime import AttentionConfig
from softcap_runtime.masks import band, block_tables, count_blocks, row_intervals

LONG = 32768
PACKED = 8192
MEAN_DOCUMENT = 512


def measure(report: Report) -> None:
    """Building masks, running packed batches, and what the general masks cost the plain one."""
    _building(report)
    _against_stock(report)
    _packed_run(report)
    _kinds(report)


def documents(length: int, mean: int = MEAN_DOCUMENT) -> Tensor:
    """Random documents of exponential length: ids ``[1, S]``."""
    ids: list[int] = []
    number = 0
    while len(ids) < length:
        ids += [number] * (1 + int(random.expovariate(1 / mean)))
        number += 1
    return torch.tensor(ids[:length])[None]


def _building(report: Report) -> None:
    lengths = (4096,) if report.quick else (131072, 1048576)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for name, window in (("causal", None), ("window 4096", 4096)):
            make = _maker(length, window)
            seconds = side_by_side({"": make}, report.rounds(51))[""]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in make()}
            rows.append({"mask": name, "tokens": length, "ms": seconds * 1e3, "MB": sum(storages.values()) / 1e6})
    report.table("building band masks", rows, "to reach: under 1 ms and 2 MB")


def _maker(length: int, window: int | None) -> Callable[[], Any]:
    return lambda: block_tables(band(length, length, causal=True, window=window), "cpu")


def _against_stock(report: Report) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    length = 2048 if report.quick else LONG
    ids = documents(length)
    row = ids[0].contiguous()
    stock = torch.compile(create_block_mask)

    def plain(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def packed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (row[i] == row[j])

    def closed_form() -> Any:
        made = row_intervals(length, length, causal=True, window=None, document_ids=ids)
        return block_tables(made, "cpu")

    times = side_by_side(
        {
            "causal": _maker(length, None),
            "causal stock": lambda: stock(plain, None, None, length, length, device="cpu"),
            "packed": closed_form,
            "packed stock": lambda: stock(packed, None, None, length, length, device="cpu"),
        },
        report.rounds(5),
    )
    rows = [
        {
            "mask": f"{kind}, {length} tokens",
            "ours ms": times[kind] * 1e3,
            "create_block_mask ms": times[f"{kind} stock"] * 1e3,
            "ratio": times[f"{kind} stock"] / times[kind],
            "to reach": goal,
        }
        for kind, goal in (("causal", 1000), ("packed", 50))
    ]
    report.table("against create_block_mask, compiled and warm", rows)


def _without_and_with_ids(
    q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, ids: Tensor, rounds: int
) -> Iterator[tuple[str, float, float]]:
    """Of two engines the seconds of a call without document ids, and with these."""
    for engine in ("blocked", "flex"):
        runtime = peers.runtime(engine)
        calls = {
            "without": lambda runtime=runtime: runtime.attention(q, k, v, config),
            "with": lambda runtime=runtime: runtime.attention(q, k, v, config, document_ids=ids),
        }
        yield engine, *side_by_side(calls, rounds).values()


def _packed_run(report: Report) -> None:
    length = 1024 if report.quick else PACKED
    q, k, v = peers.inputs(1, 8, 4, length, 256, torch.float32)
    config = AttentionConfig(softcap=peers.SOFTCAP, scale=256**-0.5)
    ids = documents(length)
    rows = [
        {"engine": engine, "causal ms": causal * 1e3, "packed ms": packed * 1e3, "ratio": causal / packed}
        for engine, causal, packed in _without_and_with_ids(q, k, v, config, ids, report.rounds(5))
    ]
    tables = block_tables(row_intervals(length, length, causal=True, window=None, document_ids=ids), "cpu")
    skipped, partial, full = count_blocks(tables)
    done = len(peers.runtime("flex").supply.supplied) + len(peers.runtime("blocked").supply.supplied)
    for _ in range(report.rounds(200)):
        small = [x[:, :, :256] for x in (q, k, v)]
        for engine in ("blocked", "flex"):
            peers.runtime(engine).attention(*small, config, document_ids=documents(256, 32))
    after = len(peers.runtime("flex").supply.supplied) + len(peers.runtime("blocked").supply.supplied)
    note = (
        f"{length} tokens, documents of {MEAN_DOCUMENT} on average: {skipped} blocks of 128 x 128 skipped, "
        f"{partial} partial, {full} full. To reach: 5. {report.rounds(200)} random packings: "
        f"{after - done} kernels more"
    )
    report.table("a packed batch against plain causal", rows, note)


def _kinds(report: Report) -> None:
    length = 512 if report.quick else 2048
    q, k, v = peers.inputs(1, 8, 4, length, 256, torch.float32)
    config = AttentionConfig(softcap=peers.SOFTCAP, scale=256**-0.5)
    one = torch.zeros(1, length, dtype=torch.int64)
    rows = [
        {"engine": engine, "band ms": band * 1e3, "intervals ms": general * 1e3, "ratio": general / band}
        for engine, band, general in _without_and_with_ids(q, k, v, config, one, report.rounds(15))
    ]
    report.table("plain causal, as a band and as general intervals", rows, f"{length} tokens, float32. To reach: 1.03")
