"""On a GPU: no synchronisation in the build, and flex's kernels accept the overlapping views, both ways."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from softcap_runtime.masks import (
    RowIntervals,
    band,
    block_mask,
    dense,
    document_ids_from_cu_seqlens,
    document_ids_from_position_ids,
    row_intervals,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def kinds(length: int) -> list[RowIntervals]:
    """Every kind at once, and the bands, on the GPU; drawn before, so that only the masks are built here."""
    ends = sorted(random.sample(range(1, length), 5))
    cu_seqlens = torch.tensor([0, *ends, length], dtype=torch.int32).cuda()
    lengths = torch.tensor([length, length // 2]).cuda()
    spans = torch.tensor([[[3, 40], [200, 500]], [[0, 0], [64, 300]]]).cuda()
    mask = (torch.arange(length) < torch.tensor([[length], [length - 77]])).cuda()
    positions = torch.arange(length).expand(2, -1).contiguous().cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = document_ids_from_cu_seqlens(cu_seqlens, length)
        made = [
            band(length, length, causal=True, window=None),
            band(length, length, causal=True, window=333),
            band(length // 2, length, causal=False, window=200),
            row_intervals(length, length, causal=True, window=None, document_ids=ids),
            row_intervals(length, length, causal=True, window=400, document_ids=ids, attention_mask=mask, spans=spans),
            row_intervals(length, length, causal=True, window=None, prefix_lengths=lengths),
            row_intervals(7, length, causal=True, window=None, cache_lengths=lengths),
            row_intervals(
                length, length, causal=False, window=None, document_ids=document_ids_from_position_ids(positions)
            ),
        ]
        for intervals in made:
            block_mask(intervals, "cuda")
        return made
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("length", [1024, 1000])
def test_flex_forward_and_backward(length: int, seed: int) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    for intervals in kinds(length):
        torch._dynamo.reset()
        shape = (2, 2, intervals.q_len, 64), (2, 2, length, 64)
        q, k, v = (torch.randn(s, device="cuda", requires_grad=True) for s in (shape[0], shape[1], shape[1]))
        weight = torch.randn_like(q)
        mask = dense(intervals, "cuda")[:, None]

        def gradients(out: Tensor, inputs: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
            return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]

        ours = gradients(compiled(q, k, v, block_mask=block_mask(intervals, "cuda")), (q, k, v), weight)
        exact = tuple(t.detach().double().requires_grad_() for t in (q, k, v))
        logits = (exact[0] @ exact[1].mT * 64**-0.5).masked_fill(~mask, -torch.inf)
        blind = ~mask.any(-1, keepdim=True)
        weights = torch.softmax(logits.masked_fill(blind, 0), -1).masked_fill(blind, 0)
        truth = gradients(weights @ exact[2], exact, weight)
        for mine, true in zip(ours, truth, strict=True):
            assert float((mine - true).norm() / true.norm()) < 3e-3
