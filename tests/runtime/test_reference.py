"""The specification against the formula, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import Sizes, make_qkv

from softcap_runtime import reference


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.builds(
        lambda batch, kv_heads, groups, q_len, kv_len: Sizes(batch, kv_heads * groups, kv_heads, q_len, kv_len, 3),
        *[st.integers(1, 2)] * 3,
        st.integers(1, 4),
        st.integers(1, 5),
    ),
    softcap=st.none() | st.floats(0.1, 100.0),
    scale=st.floats(0.01, 3.0),
    seed=st.integers(0, 2**31),
)
def test_number_by_number(sizes: Sizes, softcap: float | None, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = make_qkv(sizes, torch.float64)
    mask = torch.rand(sizes.batch, sizes.q_len, sizes.kv_len) < 0.6
    out, lse = reference.attention(q, k, v, mask, scale=scale, softcap=softcap)
    groups = sizes.heads // sizes.kv_heads
    for b in range(sizes.batch):
        for h in range(sizes.heads):
            for i in range(sizes.q_len):
                row = [0.0] * 3
                total = 0.0
                for j in range(sizes.kv_len):
                    if not mask[b, i, j]:
                        continue
                    logit = scale * sum(
                        float(x) * float(y) for x, y in zip(q[b, h, i], k[b, h // groups, j], strict=True)
                    )
                    if softcap is not None:
                        logit = softcap * math.tanh(logit / softcap)
                    weight = math.exp(logit)
                    total += weight
                    row = [x + weight * float(y) for x, y in zip(row, v[b, h // groups, j], strict=True)]
                # Sums of five float64 numbers: 1e-12 leaves room for their cancellation.
                assert out[b, h, i].tolist() == pytest.approx([x / total if total else 0.0 for x in row], abs=1e-12)
                assert float(lse[b, h, i]) == pytest.approx(math.log(total) if total else -math.inf, abs=1e-12)


def test_without_a_mask_every_key_is_visible(seed: int) -> None:
    q, k, v = make_qkv(Sizes(2, 4, 2, 5, 7, 8), torch.float64)
    for softcap in (None, 2.0):
        out, lse = reference.attention(q, k, v, None, scale=0.3, softcap=softcap)
        masked = reference.attention(q, k, v, torch.ones(1, 5, 7, dtype=torch.bool), scale=0.3, softcap=softcap)
        assert torch.equal(out, masked[0])
        assert torch.equal(lse, masked[1])
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    plain = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=0.3)
    torch.testing.assert_close(reference.attention(q, k, v, None, scale=0.3, softcap=None)[0], plain)


def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    mask = torch.rand(1, 3, 4) < 0.6
    mask[0, 1] = False  # a row that sees nothing
    inputs = [x.requires_grad_() for x in make_qkv(Sizes(1, 2, 1, 3, 4, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: reference.attention(*x, mask, scale=0.7, softcap=1.5)[0], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 2, 1, 6, 6), dtype)
    out, lse = reference.attention(q, k, v, None, scale=0.125, softcap=5.0)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    want, _ = reference.attention(q.double(), k.double(), v.double(), None, scale=0.125, softcap=5.0)
    # Weights and results are rounded to the dtype: a few of its ulps.
    assert float((out - want).norm() / want.norm()) < 4 * torch.finfo(dtype).eps


def test_visible() -> None:
    lo, hi = torch.tensor([[0, 1, 3]]), torch.tensor([[1, 3, 0]])
    assert reference.visible(lo, hi, 3).int().tolist() == [[[1, 0, 0], [0, 1, 1], [0, 0, 0]]]
