"""Masks with holes: every engine, dtype and way to call, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, Sizes, expected, gradients, make_qkv, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softcap_runtime import AttentionConfig, Runtime, row_intervals

# Decoding of one row and of several, prefill, lengths that are no multiple of anything, groups of 1 to 4.
SIZES = (
    Sizes(3, 4, 2, 1, 130),
    Sizes(3, 4, 4, 2, 77),
    Sizes(2, 4, 1, 131, 131),
    Sizes(3, 2, 2, 45, 700),
    Sizes(1, 8, 2, 600, 600),
)


def holes(rows: int, keys: int) -> Tensor:
    kept = torch.rand(rows, keys) < 0.7
    kept[0, keys // 3 : keys // 3 + 70] = False  # whole blocks of keys
    kept[-1, :2] = False
    return kept


@pytest.mark.parametrize(
    ("engine", "dtype", "softcap"),
    [
        *(("blocked", dtype, cap) for dtype in FORWARD_TOLERANCE for cap in (30.0, None)),
        *((engine, torch.float32, 30.0) for engine in ("flex", "dense", "eager")),
    ],
)
def test_every_engine(
    runtimes: dict[str, Runtime], engine: str, dtype: torch.dtype, softcap: float | None, seed: int
) -> None:
    # A size of 1 is a compilation of its own to the dense engine, which gets gathered keys as the eager one does.
    for sizes in SIZES if engine != "dense" else (SIZES[1], SIZES[3]):
        config = AttentionConfig(softcap=softcap, scale=0.1, window=sizes.kv_len // 2)
        q, k, v = make_qkv(sizes, dtype)
        mask = holes(sizes.batch, sizes.kv_len)
        exact = expected(*(x.double() for x in (q, k, v)), config, attention_mask=mask)
        out = runtimes[engine].attention(q, k, v, config, mask)
        assert relative_error(out, exact) <= FORWARD_TOLERANCE[dtype]
        assert not out[exact.sum(-1) == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["blocked", "eager"])
@pytest.mark.parametrize("softcap", [30.0, None])
def test_gradients(
    runtimes: dict[str, Runtime], engine: str, dtype: torch.dtype, softcap: float | None, seed: int
) -> None:
    for sizes in SIZES:
        config = AttentionConfig(softcap=softcap, scale=0.1)
        inputs = make_qkv(sizes, dtype)
        mask = holes(1, sizes.kv_len)  # one row for the whole batch
        grad = torch.randn(inputs[0].shape).to(dtype)

        def run(*x: Tensor, config: Any = config, mask: Tensor = mask) -> Tensor:
            return runtimes[engine].attention(*x, config, mask)

        def want(*x: Tensor, config: Any = config, mask: Tensor = mask) -> Tensor:
            return expected(*x, config, attention_mask=mask)

        got = gradients(run, inputs, grad)[1]
        exact = gradients(want, tuple(x.double() for x in inputs), grad.double())[1]
        for mine, theirs in zip(got, exact, strict=True):
            assert relative_error(mine, theirs) <= GRADIENT_TOLERANCE[dtype]
        for grad_of_keys in got[1:]:
            assert not grad_of_keys[:, :, ~mask[0]].any()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("train", [False, True])
def test_in_a_graph(own_runtime: Runtime, backend: str, train: bool, seed: int) -> None:
    """One graph for masks with holes and without; the hidden keys play no part, whatever is in them."""
    config = AttentionConfig(softcap=30.0, scale=0.1)
    compiled = torch.compile(
        lambda q, k, v, mask: own_runtime.attention(q, k, v, config, mask), backend=backend, fullgraph=True
    )
    inputs = make_qkv(Sizes(2, 4, 2, 40, 40))
    leaves = [x.requires_grad_(train) for x in inputs]
    padded = torch.arange(40) < torch.tensor([[0], [25]])
    for mask in (holes(2, 40), torch.ones_like(padded), padded, holes(2, 40)):
        out = compiled(*leaves, mask)
        exact = [x.detach().double().requires_grad_(train) for x in inputs]
        want = expected(*exact, config, attention_mask=mask)
        assert relative_error(out, want) <= 2e-6
        if train:
            mine = torch.autograd.grad(out.square().sum(), leaves)
            theirs = torch.autograd.grad(want.square().sum(), exact)
            assert all(relative_error(a, b) <= 5e-6 for a, b in zip(mine, theirs, strict=True))


def test_checkpoint_export_and_vmap(own_runtime: Runtime, seed: int) -> None:
    config = AttentionConfig(softcap=30.0, scale=0.1)
    inputs = make_qkv(Sizes(2, 4, 2, 30, 30))
    mask = holes(2, 30)
    want = expected(*(x.double() for x in inputs), config, attention_mask=mask)

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return own_runtime.attention(q, k, v, config, mask)

    leaf = inputs[0].clone().requires_grad_()
    out = checkpoint(Layer(), leaf, *inputs[1:], mask, use_reentrant=False)
    assert relative_error(out, want) <= 2e-6
    assert relative_error(torch.autograd.grad(out.sum(), leaf)[0], _grad_q(inputs, config, mask)) <= 5e-6

    exported = torch.export.export(Layer(), (*inputs, mask)).module()
    assert relative_error(exported(*inputs, mask), want) <= 2e-6

    masks = torch.stack([mask, ~mask])
    got = torch.vmap(lambda m: own_runtime.attention(*inputs, config, m))(masks)
    for one, each in zip(got, masks, strict=True):
        assert relative_error(one, expected(*inputs, config, attention_mask=each)) <= 2e-6


def _grad_q(inputs: tuple[Tensor, ...], config: AttentionConfig, mask: Tensor) -> Tensor:
    q, k, v = (x.double() for x in inputs)
    q.requires_grad_()
    return torch.autograd.grad(expected(q, k, v, config, attention_mask=mask).sum(), q)[0]


def test_hidden_keys_may_hold_anything_in_prefill(runtimes: dict[str, Runtime], seed: int) -> None:
    """As padding does: the C++ kernel packs zeros in their place."""
    config = AttentionConfig(softcap=30.0, scale=0.1)
    q, k, v = make_qkv(Sizes(1, 4, 2, 90, 90))
    mask = holes(1, 90)
    want = expected(q, k, v, config, attention_mask=mask)
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    assert relative_error(runtimes["blocked"].attention(q, k, v, config, mask), want) <= 2e-6


def test_opcheck(own_runtime: Runtime, seed: int) -> None:
    inputs = [x.requires_grad_() for x in make_qkv(Sizes(2, 4, 2, 9, 9))]
    mask = row_intervals(9, 9, causal=True, window=None, attention_mask=holes(2, 9))
    arguments = (*inputs, mask.lo, mask.hi, 0, 0, 0.1, 30.0, "eager", True, own_runtime.number, mask.kept)
    torch.library.opcheck(torch.ops.softcap_runtime.attention.default, arguments)


def test_operator_refuses_kept_keys_of_a_band(own_runtime: Runtime) -> None:
    q = torch.zeros(1, 1, 4, 8)
    kept = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="kept: a tensor without lo and hi"):
        torch.ops.softcap_runtime.attention(q, q, q, None, None, -9, 1, 1.0, None, "eager", False, 0, kept)


def test_wrong_kept_keys_are_refused(own_runtime: Runtime) -> None:
    q = torch.zeros(1, 1, 4, 8)
    config = AttentionConfig(softcap=None, scale=1.0)
    mask = row_intervals(4, 4, causal=True, window=None, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    assert mask.kept is not None
    for kept in (mask.kept[:, :3], mask.kept.long(), mask.kept.expand(2, 4)):
        with pytest.raises(ValueError, match=r"mask.kept: .*, expected int32 \(1, 4\)"):
            own_runtime.attend(q, q, q, config, mask._replace(kept=kept))


def test_a_mask_without_holes_keeps_all_keys(seed: int) -> None:
    for mask in (torch.ones(2, 9), torch.ones(2, 9).tril(4), torch.zeros(1, 9)):
        assert row_intervals(9, 9, causal=True, window=None, attention_mask=mask.bool()).kept is None
