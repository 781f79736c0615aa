"""The public doors on a CUDA device, through each of its engines, against the float64 specification."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from support.helpers import (
    Backend,
    Block,
    Case,
    Sizes,
    cases,
    expected,
    gradients,
    in_model_order,
    make_qkv,
    relative_error,
)

from softcap_runtime import (
    AttentionConfig,
    KernelNotPrewarmed,
    PrewarmRequest,
    Runtime,
    RuntimeSettings,
    create_flex_attention_causal_mask,
    create_flex_attention_sliding_window_mask,
    slow_attention_softcapping,
    slow_inference_attention_softcapping,
)
from softcap_runtime.cuda.options import device_limits, variants
from softcap_runtime.store import inspection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CONFIG = AttentionConfig(softcap=50.0, scale=0.125, window=100)
# Relative errors of outputs and gradients. float32: a product of three TF32 parts, 1e-6, and a few roundings.
# bf16: the weights' rounding, 2**-9, in outputs; twice in gradients.
TOLERANCE = {torch.float32: (4e-6, 6e-6), torch.bfloat16: (4e-3, 7e-3)}


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    """What the shared helpers make lies on the device."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def check(runtime: Runtime, case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    out, grads = gradients(lambda *x: runtime.attention(*x, case.config, **case.masks), inputs, grad_out)
    want, want_grads = gradients(case.expected, tuple(x.double() for x in inputs), grad_out)
    with torch.no_grad():
        again = runtime.attention(*inputs, case.config, **case.masks)
    # For training half precision divides by the sum of its rounded weights, which costs time: another rounding.
    assert torch.equal(again, out) if dtype == torch.float32 else relative_error(again, want) <= TOLERANCE[dtype][0]
    assert in_model_order(out)
    assert out.dtype == dtype
    assert relative_error(out, want) <= TOLERANCE[dtype][0]
    for mine, exact in zip(grads, want_grads, strict=True):
        # Where a gradient's terms cancel (one visible key) their rounding is left, of the size of the terms.
        left = (mine - exact).norm() / grad_out.norm()
        assert min(relative_error(mine, exact), float(left)) <= TOLERANCE[dtype][1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_any_mask_on_any_layout(runtimes: dict[str, Runtime], dtype: torch.dtype, case: Case) -> None:
    check(runtimes["auto"], case, dtype)


# Few and chosen, since flex compiles for each kind of mask, cap and ratio of heads.
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [50.0, None])
def test_flex(runtimes: dict[str, Runtime], dtype: torch.dtype, packed: bool, softcap: float | None, seed: int) -> None:
    config = AttentionConfig(softcap=softcap, scale=0.125, window=None if packed else 100)
    for q_len, kv_len in ((300, 300), (513, 513), (200, 333), (1, 700)):
        masks = {"document_ids": torch.arange(kv_len)[None].expand(2, -1) // 70} if packed else {}
        check(runtimes["flex"], Case(Sizes(2, 4, 2, q_len, kv_len), config, masks, "transposed", seed), dtype)


@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_flex_of_other_head_dims(runtimes: dict[str, Runtime], head_dim: int, seed: int) -> None:
    check(runtimes["flex"], Case(Sizes(1, 4, 1, 200, 200, head_dim), CONFIG, {}, "fused", seed), torch.bfloat16)


@pytest.mark.parametrize("engine", ["blocked", "flex"])
@pytest.mark.parametrize("train", [False, True])
def test_opcheck(runtimes: dict[str, Runtime], engine: str, train: bool, seed: int) -> None:
    q, k, v = (x.requires_grad_(train) for x in make_qkv(Sizes(2, 4, 2, 130, 130)))
    number = runtimes[engine].number
    out = runtimes[engine].attention(q, k, v, CONFIG)  # compiled here, not under the modes that look on
    if train:
        out.sum().backward()
    arguments = (q, k, v, None, None, -99, 1, 0.125, 50.0, engine, train, number)
    torch.library.opcheck(torch.ops.softcap_runtime.attention.default, arguments)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("engine", ["blocked", "flex"])
def test_inside_a_compiled_model(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    torch.set_default_device(None)  # dynamo can't trace unflatten under it (torch 2.13)
    runtime, backend = runtimes[engine], Backend()
    model = Block(lambda q, k, v: runtime.attention(q, k, v, CONFIG)).cuda()
    compiled = {
        "counted": torch.compile(model, fullgraph=True, dynamic=True, backend=backend),
        "inductor": torch.compile(model, fullgraph=True, dynamic=True),
    }
    for length in (130, 257, 300):
        x = torch.randn(2, length, 128, device="cuda", requires_grad=True)
        want = torch.autograd.grad(model(x).square().sum(), x)[0]
        for run in compiled.values():
            got = torch.autograd.grad(run(x).square().sum(), x)[0]
            assert relative_error(got, want) <= 1e-3  # the projections are TF32 or not as Inductor likes
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("window", [None, 70])
def test_the_documented_functions(own_runtime: Runtime, window: int | None, seed: int) -> None:
    layer = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=30.0, query_pre_attn_scalar=64))
    mask = (
        create_flex_attention_causal_mask(512)
        if window is None
        else create_flex_attention_sliding_window_mask(512, window)
    )
    config = AttentionConfig(softcap=30.0, scale=0.125, window=window)
    q, k, v = make_qkv(Sizes(2, 4, 2, 300, 300), torch.bfloat16)
    want = expected(q, k, v, config).transpose(1, 2).reshape(2, 300, -1)
    for function in (slow_attention_softcapping, slow_inference_attention_softcapping):
        assert relative_error(function(q, k, v, mask, layer, 2, 300), want) <= 5e-3


def test_autocast_and_mixed_inputs(own_runtime: Runtime, seed: int) -> None:
    q, k, v = make_qkv(Sizes(2, 4, 2, 130, 130))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = own_runtime.attention(q, k.bfloat16(), v, CONFIG)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected(q, k, v, CONFIG)) <= 1e-2


def test_inputs_of_one_layout_after_another(runtimes: dict[str, Runtime], seed: int) -> None:
    """A plan is bound to layouts as it meets them, aligned or not."""
    sizes = Sizes(2, 4, 2, 130, 130)
    for layout in ("transposed", "contiguous", "fused", "expanded", "strided", "transposed"):
        q, k, v = make_qkv(sizes, torch.bfloat16, layout)
        for x in (q, torch.randn(q.numel() + 1).bfloat16()[1:].view(q.shape)):
            out = runtimes["auto"].attention(x, k, v, CONFIG)
            assert relative_error(out, expected(x, k, v, CONFIG)) <= 4e-3


def test_stats_name_engines_and_reasons(runtimes: dict[str, Runtime], seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 4, 2, 20, 20))
    for name in ("auto", "flex"):
        runtimes[name].attention(q, k, v, CONFIG)
        assert all(row.reason for row in runtimes[name].stats().engines)


@pytest.mark.parametrize("engine", ["blocked", "flex"])
def test_two_runs_are_bit_equal(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    inputs, grad_out = (make_qkv(Sizes(2, 4, 2, 600, 600), torch.bfloat16), torch.randn(2, 4, 600, 64).bfloat16())

    def run() -> list[torch.Tensor]:
        out, grads = gradients(lambda *x: runtimes[engine].attention(*x, CONFIG), inputs, grad_out)
        return [out, *grads]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_after_prewarming_nothing_is_compiled(tmp_path: Path, seed: int) -> None:
    """By a runtime that must not, at lengths and batches that were not named, with fresh kernels and with kept ones."""
    request = PrewarmRequest(
        config=CONFIG, num_heads=4, num_kv_heads=2, head_dim=128, device="cuda", train=True, seq_lens=(300,)
    )
    for outcome in ("built", "loaded"):
        runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, jit="forbid"))
        rows = runtime.prewarm([request], progress=False)
        assert {row.outcome for row in rows} == {outcome}
        assert all(row.bytes > 1000 for row in rows)
        for batch, rows_, keys in ((1, 300, 300), (3, 77, 77), (2, 1, 5000), (40, 3, 99), (1, 9, 700), (8, 4096, 4096)):
            for window in (None, 100):
                config = CONFIG.model_copy(update={"window": window})
                q, k, v = (x.bfloat16().requires_grad_() for x in make_qkv(Sizes(batch, 4, 2, rows_, keys, 128)))
                ids = torch.arange(keys).expand(batch, -1) // 50
                for masks in ({}, {"document_ids": ids}, {"attention_mask": torch.ones(batch, keys).bool()}):
                    runtime.attention(q, k, v, config, **masks).sum().backward()
                    with torch.no_grad():
                        runtime.attention(q, k, v, config, **masks)
    with pytest.raises(KernelNotPrewarmed, match=r"--head-dim 64.* --device cuda$"):
        runtime.attention(*make_qkv(Sizes(1, 4, 2, 200, 200, 64)), CONFIG)


def test_tuning_measures_once_and_stays_right(tmp_path: Path, seed: int) -> None:
    request = PrewarmRequest(
        config=CONFIG, num_heads=4, num_kv_heads=2, head_dim=64, device="cuda", train=True, seq_lens=(1024,)
    )
    kinds = ["forward", "decode", "dq", "dkdv"]
    for outcome in ("built", "loaded"):
        runtime = Runtime(RuntimeSettings(cache_dir=tmp_path))
        rows = runtime.prewarm([request], progress=False, tune=True)
        assert [row.spec.op for row in rows[:4]] == [f"tuned {kind}" for kind in kinds]
        assert {row.outcome for row in rows} == {outcome}
        limits = device_limits(torch.cuda.current_device())
        for kind in kinds:
            chosen = runtime.supply.options(0, torch.bfloat16, 64, kind)  # type: ignore[arg-type]
            assert chosen in variants(limits, torch.bfloat16, 64, kind)  # type: ignore[arg-type]
        for q_len, kv_len in ((300, 300), (2, 700)):
            check(runtime, Case(Sizes(2, 4, 2, q_len, kv_len), CONFIG, {}, "transposed", seed), torch.bfloat16)
    tried = [entry for entry in inspection.entries(runtime.supply.store) if entry.fields["op"] == "tuned_options"]
    assert len(tried) == len(kinds)
    assert all(len(entry.provenance) > 1 for entry in tried)
