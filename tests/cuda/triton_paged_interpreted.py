"""As ``triton_interpreted``, for the kernel that reads a paged cache: a line of JSON a case."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton_interpreted import Kernels, poisoned

from softcap_runtime import reference
from softcap_runtime.cuda.paged import bind_paged


def error(case: dict[str, Any]) -> float:
    """Relative error of a batch of sequences, each against the reference over its own keys."""
    heads, kv_heads, dim, page_size, window = case["sizes"]
    lengths, counts, ragged = case["lengths"], case["counts"], case["ragged"]
    dtype = getattr(torch, case["dtype"])
    used = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(used) + 2, dtype=torch.int32).tolist()
    # Pages of no sequence hold NaN, and so do rows past a sequence's end: whatever is read of them shows.
    k, v = (torch.full((len(order), page_size, kv_heads, dim), torch.nan, dtype=dtype) for _ in "kv")
    table = torch.full((len(lengths), max(used) + 1), 2**30, dtype=torch.int32)
    own = []
    for row, (count, length) in enumerate(zip(used, lengths, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages)
        own.append([torch.randn(length, kv_heads, dim).to(dtype) for _ in "kv"])
        for x, values in zip((k, v), own[-1], strict=True):
            for place, page in enumerate(pages):
                part = values[place * page_size : (place + 1) * page_size]
                x[page, : len(part)] = part
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = sum(counts) + 2 if ragged else counts[0]  # two rows of no sequence
    q = torch.randn(1 if ragged else len(counts), heads, rows, dim).to(dtype)
    pages = k.transpose(1, 2), v.transpose(1, 2)
    how: dict[str, Any] = {"scale": dim**-0.5, "softcap": case["softcap"], "ragged": ragged}
    run = bind_paged(q, *pages, table, kernels=Kernels(), left=None if window is None else 1 - window, right=1, **how)
    empty, empty_strided = torch.empty, torch.empty_strided
    torch.empty, torch.empty_strided = poisoned(empty), poisoned(empty_strided)
    try:
        out = run(q, *pages, table, torch.tensor(lengths).int(), offsets if ragged else None)
        # The first sequence's last page is not there, the second one is longer than its table.
        table[0, used[0] - 1] = -1
        too_long = torch.tensor([lengths[0], table.shape[1] * page_size + 1, *lengths[2:]]).int()
        wrong = run(q, *pages, table, too_long, offsets if ragged else None)
    finally:
        torch.empty, torch.empty_strided = empty, empty_strided
    off = total = 0.0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        first = int(offsets[row])
        mine = out[:, :, first : first + count] if ragged else out[row : row + 1]
        asked = q[:, :, first : first + count] if ragged else q[row : row + 1]
        at, keys = (length - count + torch.arange(count))[:, None], torch.arange(length)
        seen = (keys <= at) & (at - keys < (window or length))
        mine_k, mine_v = (x.transpose(0, 1)[None].double() for x in own[row])
        want, _ = reference.attention(
            asked.double(), mine_k, mine_v, seen[None], scale=dim**-0.5, softcap=case["softcap"]
        )
        off += float((mine.double() - want).square().sum())
        total += float(want.square().sum())
        shown = wrong[:, :, first : first + count] if ragged else wrong[row : row + 1]
        # Several rows of a sequence: those before its last page may not see it.
        assert shown[:, :, -1:].isnan().all() if row < 2 else torch.equal(shown, mine)
    assert not ragged or not out[:, :, -2:].any()
    return (off / total) ** 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(int(sys.argv[2]))
    for case in json.loads(sys.argv[1]):
        print(json.dumps(error(case)), flush=True)
