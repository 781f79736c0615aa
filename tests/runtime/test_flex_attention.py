"""The documented functions: their signatures, every kind of mask they take, and their results."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, LAYOUTS, Sizes, expected, gradients, make_qkv, relative_error, visible
from torch import Tensor

import softcap_runtime
from softcap_runtime import AttentionConfig, EngineUnavailable, KernelNotPrewarmed, Runtime, RuntimeSettings
from softcap_runtime import flex_attention as documented
from softcap_runtime.compat import torch_features
from softcap_runtime.cpu.library import library
from softcap_runtime.flex_attention import (
    create_flex_attention_causal_mask,
    create_flex_attention_sliding_window_mask,
    slow_attention_softcapping,
    slow_inference_attention_softcapping,
)

FUNCTIONS = [slow_attention_softcapping, slow_inference_attention_softcapping]
SCALAR = 50  # query_pre_attn_scalar: not the head_dim, to tell them apart
LAYER = SimpleNamespace(
    config=SimpleNamespace(attn_logit_softcapping=30.0, query_pre_attn_scalar=SCALAR, num_attention_heads=4)
)

pytestmark = pytest.mark.usefixtures("own_runtime")


def wanted(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, causal: bool = True, **more: Any) -> Tensor:
    config = AttentionConfig(softcap=30.0, scale=SCALAR**-0.5, window=window, causal=causal)
    out = expected(q, k, v, config, **more)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def test_signatures() -> None:
    names = ["Q", "K", "V", "causal_mask", "self", "bsz", "q_len"]
    for function in FUNCTIONS:
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names
        assert all(one.default is one.empty for one in parameters.values())
        assert all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters.values())
    for function, defaults in (
        (create_flex_attention_causal_mask, {"max_seq_length": 8192}),
        (create_flex_attention_sliding_window_mask, {"max_seq_length": 8192, "sliding_window": 4096}),
    ):
        parameters = inspect.signature(function).parameters
        assert {name: one.default for name, one in parameters.items()} == defaults
    assert softcap_runtime.HAS_FLEX_ATTENTION is (torch.__version__ >= "2.5")
    for name in ("slow_attention_softcapping", "create_flex_attention_causal_mask"):
        assert getattr(softcap_runtime, name) is getattr(documented, name)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("length", [1, 100, 300])
def test_masks_of_the_create_functions(function: Any, length: int, seed: int) -> None:
    q, k, v = make_qkv(Sizes(2, 4, 2, length, length))
    for made_for in (length, length + 1, 4 * length, 8192):
        out = function(q, k, v, create_flex_attention_causal_mask(made_for), LAYER, 2, length)
        assert out.shape == (2, length, 4 * HEAD_DIM)
        assert relative_error(out, wanted(q, k, v)) <= 2e-6
        for window in (1, 17, 4096):
            mask = create_flex_attention_sliding_window_mask(made_for, window)
            out = function(q, k, v, mask, LAYER, 2, length)
            assert relative_error(out, wanted(q, k, v, window)) <= 2e-6


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_other_kind_of_mask(function: Any, layout: str, seed: int) -> None:
    batch, length = 2, 140
    q, k, v = make_qkv(Sizes(batch, 4, 2, length, length), layout=layout)
    padding = torch.ones(batch, length, dtype=torch.int64)
    padding[0, :31] = 0
    plain = visible(length, length, causal=True, window=20)
    padded = visible(length, length, causal=True, window=20, attention_mask=padding)
    holes = padded & (torch.rand(batch, length, length) < 0.8)
    lowest = torch.finfo(torch.float32).min

    def additive(mask: Tensor, hidden: float) -> Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, hidden)

    for mask, want in (
        (None, wanted(q, k, v)),
        (plain[0], wanted(q, k, v, 20)),
        (additive(plain[0], lowest), wanted(q, k, v, 20)),
        (additive(plain[0], -torch.inf), wanted(q, k, v, 20)),
        (padded, wanted(q, k, v, 20, attention_mask=padding)),
        (padded[:, None], wanted(q, k, v, 20, attention_mask=padding)),
        (additive(padded[:, None], lowest), wanted(q, k, v, 20, attention_mask=padding)),
        (holes[:, None], by_elements(q, k, v, holes[:, None])),
        (additive(holes[:, None], lowest), by_elements(q, k, v, holes[:, None])),
    ):
        out = function(q, k, v, mask, LAYER, batch, length)
        assert relative_error(out, want) <= 2e-6
    # A bias on visible keys, and another mask for each head: no row intervals.
    bias = torch.randn(length, length).masked_fill(~plain[0], lowest)
    heads = holes[:, None] & (torch.rand(batch, 4, length, length) < 0.9)
    windows = torch.cat([visible(length, length, causal=True, window=w)[None] for w in (3, 20, 50, None)], 1)
    for mask in (bias, heads, windows):
        out = function(q, k, v, mask, LAYER, batch, length)
        assert relative_error(out, by_elements(q, k, v, mask)) <= 2e-6


def by_elements(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Any mask, straight from the formula in float64."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    logits = 30.0 * torch.tanh(q @ k.mT * SCALAR**-0.5 / 30.0)
    seen = mask if mask.dtype == torch.bool else mask > -1e30
    logits = (logits if mask.dtype == torch.bool else logits + mask.double()).masked_fill(~seen, -torch.inf)
    out = torch.softmax(logits, -1).nan_to_num() @ v  # a row of -inf gives NaN, here 0
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def test_masks_that_were_made_for_longer_sequences(seed: int) -> None:
    """Dense masks are cut: the rows that end at the last key, the first keys."""
    q, k, v = make_qkv(Sizes(1, 4, 2, 1, 40))
    for function in FUNCTIONS:
        for window in (None, 9):
            mask = visible(64, 64, causal=True, window=window)[0]
            assert relative_error(function(q, k, v, mask, LAYER, 1, 1), wanted(q, k, v, window)) <= 2e-6


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_number_of_keys_in_place_of_the_rows(function: Any, seed: int) -> None:
    """As unsloth's layer calls: the seventh argument counts keys, with every kind of mask that it has."""
    longest, lowest = 96, torch.finfo(torch.float32).min
    for q_len, kv_len in ((50, 50), (1, 50), (7, 50), (1, 1)):
        q, k, v = make_qkv(Sizes(2, 4, 2, q_len, kv_len))
        for window in (None, 16):
            seen = visible(longest, longest, causal=True, window=window)[0]
            static = torch.zeros(longest, longest).masked_fill(~seen, lowest)
            for mask in (
                static,
                seen,
                static[kv_len - q_len : kv_len, :kv_len].expand(2, 1, -1, -1),
                documented._create(longest, window),
            ):
                out = function(q, k, v, mask, LAYER, 2, kv_len)
                assert out.shape == (2, q_len, 4 * HEAD_DIM)
                assert relative_error(out, wanted(q, k, v, window)) <= 2e-6
    q, k, v = make_qkv(Sizes(2, 4, 2, 7, 50))
    with pytest.raises(ValueError, match="q_len: 49, expected Q's 7 rows or K's 50 keys"):
        function(q, k, v, None, LAYER, 2, 49)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_rank_of_tensor_parallelism_counts_its_own_heads(function: Any, seed: int) -> None:
    """The config counts the heads of all ranks; the tensors say how many are here."""
    q, k, v = make_qkv(Sizes(2, 2, 1, 9, 30))
    out = function(q, k, v, create_flex_attention_causal_mask(64), LAYER, 2, 30)
    assert out.shape == (2, 9, 2 * HEAD_DIM)
    assert relative_error(out, wanted(q, k, v)) <= 2e-6


@pytest.mark.parametrize("function", FUNCTIONS)
def test_decoding(function: Any, seed: int) -> None:
    for q_len, kv_len in ((1, 1), (1, 300), (3, 130)):
        q, k, v = make_qkv(Sizes(2, 4, 2, q_len, kv_len))
        for window in (None, 50):
            mask = (
                create_flex_attention_causal_mask(512)
                if window is None
                else create_flex_attention_sliding_window_mask(512, window)
            )
            out = function(q, k, v, mask, LAYER, 2, q_len)
            assert out.shape == (2, q_len, 4 * HEAD_DIM)
            assert relative_error(out, wanted(q, k, v, window)) <= 2e-6


def test_a_block_mask_of_the_callers_own(seed: int) -> None:
    create_block_mask = pytest.importorskip("torch.nn.attention.flex_attention").create_block_mask

    length = 130
    q, k, v = make_qkv(Sizes(1, 4, 2, length, length))

    def checkered(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((i + j) % 3 != 1)

    mask = create_block_mask(checkered, None, None, length, length, device="cpu")
    rows = torch.arange(length)
    want = by_elements(q, k, v, checkered(0, 0, rows[:, None], rows[None]))
    for function in FUNCTIONS:
        assert relative_error(function(q, k, v, mask, LAYER, 1, length), want) <= 2e-6
    with pytest.raises(ValueError, match=r"causal_mask: a BlockMask for \(130, 130\)"):
        slow_attention_softcapping(q[:, :, :99], k, v, mask, LAYER, 1, 99)
    with pytest.raises(EngineUnavailable, match="dense mask to train"):
        slow_attention_softcapping(q.requires_grad_(), k, v, mask, LAYER, 1, length)


def test_a_block_mask_of_the_callers_own_needs_a_compiler(warm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_block_mask = pytest.importorskip("torch.nn.attention.flex_attention").create_block_mask

    mask = create_block_mask(lambda b, h, i, j: (i + j) % 2 == 0, None, None, 40, 40, device="cpu")
    forbids = Runtime(RuntimeSettings(cache_dir=warm_cache, jit="forbid"))
    monkeypatch.setattr(Runtime, "_own", forbids)
    q, k, v = make_qkv(Sizes(1, 4, 2, 40, 40))
    with pytest.raises(KernelNotPrewarmed, match="causal_mask"):
        slow_attention_softcapping(q, k, v, mask, LAYER, 1, 40)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients(function: Any, seed: int) -> None:
    inputs = make_qkv(Sizes(2, 4, 2, 150, 150), layout="fused")
    grad_out = torch.randn(2, 150, 4 * HEAD_DIM)
    holes = visible(150, 150, causal=True, window=None) & (torch.rand(2, 150, 150) < 0.8)
    for mask, want in (
        (create_flex_attention_causal_mask(), wanted),
        (create_flex_attention_sliding_window_mask(1024, 33), lambda *x: wanted(*x, 33)),
        (None, wanted),
        (holes, lambda *x: by_elements(*x, holes[:, None])),
    ):
        out, got = gradients(lambda *x, m=mask: function(*x, m, LAYER, 2, 150), inputs, grad_out)
        want_out, exact = gradients(want, inputs, grad_out)
        assert relative_error(out, want_out) <= 2e-6
        for mine, theirs in zip(got, exact, strict=True):
            assert relative_error(mine, theirs) <= 3e-6


def test_any_object_with_the_fields_is_a_layer(seed: int) -> None:
    class Config:
        attn_logit_softcapping = None

    class Layer(torch.nn.Module):
        config = Config()

    q, k, v = make_qkv(Sizes(1, 4, 2, 30, 30))
    config = AttentionConfig(scale=HEAD_DIM**-0.5)  # no query_pre_attn_scalar: head_dim ** -0.5
    want = expected(q, k, v, config).transpose(1, 2).reshape(1, 30, -1)
    for function in FUNCTIONS:
        assert relative_error(function(q, k, v, None, Layer(), 1, 30), want) <= 2e-6


def test_a_layer_whose_config_changes(seed: int) -> None:
    layer = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=30.0, query_pre_attn_scalar=SCALAR))
    q, k, v = make_qkv(Sizes(1, 4, 2, 30, 30))
    first = slow_attention_softcapping(q, k, v, None, layer, 1, 30)
    layer.config.attn_logit_softcapping = 0.5
    second = slow_attention_softcapping(q, k, v, None, layer, 1, 30)
    assert relative_error(first, second.double()) > 1e-3
    want = expected(q, k, v, AttentionConfig(softcap=0.5, scale=SCALAR**-0.5))
    assert relative_error(second, want.transpose(1, 2).reshape(1, 30, -1)) <= 2e-6


def test_both_doors_give_the_same(own_runtime: Runtime, seed: int) -> None:
    q, k, v = make_qkv(Sizes(2, 4, 2, 200, 200))
    config = AttentionConfig(softcap=30.0, scale=SCALAR**-0.5, window=64)
    mask = create_flex_attention_sliding_window_mask(8192, 64)
    one = slow_attention_softcapping(q, k, v, mask, LAYER, 2, 200)
    assert torch.equal(one, own_runtime.attention(q, k, v, config).transpose(1, 2).reshape(2, 200, -1))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bsz": 3}, ValueError, "bsz: 3, expected Q's batch of 2"),
        ({"q_len": 41}, ValueError, "q_len: 41, expected Q's 40 rows or K's 40 keys"),
        ({"Q": torch.zeros(4, 40, HEAD_DIM)}, ValueError, "q: shape"),
        ({"K": torch.zeros(2, 3, 40, HEAD_DIM), "V": torch.zeros(2, 3, 40, HEAD_DIM)}, ValueError, "4 heads"),
        ({"causal_mask": "causal"}, TypeError, "causal_mask: str"),
        ({"causal_mask": torch.zeros(40, 40, dtype=torch.int64)}, TypeError, "causal_mask: torch.int64"),
        ({"causal_mask": torch.zeros(40)}, ValueError, r"causal_mask: shape \(40,\)"),
        ({"causal_mask": torch.zeros(39, 39)}, ValueError, "causal_mask: 39 rows"),
        ({"causal_mask": torch.zeros(39, 40)}, ValueError, "causal_mask: 39 rows and 40 keys"),
        ({"causal_mask": torch.zeros(40, 39)}, ValueError, "causal_mask: 40 rows and 39 keys"),
        ({"causal_mask": torch.zeros(3, 1, 40, 40)}, ValueError, "causal_mask: "),
        ({"causal_mask": torch.zeros(1, 3, 40, 40)}, ValueError, "causal_mask: "),
        ({"self": object()}, ValueError, "self: object has no config"),
        (
            {"self": SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=-1.0))},
            ValueError,
            "attn_logit_softcapping: -1.0",
        ),
        (
            {"self": SimpleNamespace(config=SimpleNamespace(query_pre_attn_scalar=0))},
            ValueError,
            "query_pre_attn_scalar: 0",
        ),
        (
            {"self": SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping="50"))},
            TypeError,
            r"self\.config\.attn_logit_softcapping: '50', expected a number",
        ),
        (
            {"self": SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=1e39))},
            ValueError,
            r"self\.config\.attn_logit_softcapping: 1e\+39",
        ),
        (
            {"self": SimpleNamespace(config={"attn_logit_softcapping": 50.0})},
            TypeError,
            r"self\.config: dict, expected an object",
        ),
    ],
)
def test_bad_input(function: Any, change: dict[str, Any], error: type[Exception], words: str) -> None:
    q, k, v = make_qkv(Sizes(2, 4, 2, 40, 40))
    arguments = {"Q": q, "K": k, "V": v, "causal_mask": None, "self": LAYER, "bsz": 2, "q_len": 40, **change}
    with pytest.raises(error, match=words) as raised:
        function(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "8"])
def test_bad_lengths_of_masks(value: Any) -> None:
    with pytest.raises(ValueError, match=f"max_seq_length: {value!r}"):
        create_flex_attention_causal_mask(value)
    with pytest.raises(ValueError, match=f"sliding_window: {value!r}"):
        create_flex_attention_sliding_window_mask(64, value)


def test_lengths_of_any_integer_type(seed: int) -> None:
    length, window = (torch.tensor(number) for number in (64, 9))  # as NumPy's integers, with __index__
    mask = create_flex_attention_sliding_window_mask(length, window)  # type: ignore[arg-type]
    assert mask.shape[-2:] == (64, 64)
    q, k, v = make_qkv(Sizes(1, 4, 2, 40, 40))
    for batch, rows in ((1, 40), (torch.tensor(1), torch.tensor(40)), (True, 40.0)):
        out = slow_attention_softcapping(q, k, v, mask, LAYER, batch, rows)  # type: ignore[arg-type]
        assert out.shape == (1, 40, 4 * HEAD_DIM)


def test_a_torch_without_flex(runtimes: dict[str, Runtime], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The create functions give dense masks, the others take them, and no engine is flex."""
    monkeypatch.setattr(documented, "HAS_FLEX_ATTENTION", False)
    monkeypatch.setattr(torch_features, "FLEX_ATTENTION", False)
    runtime = Runtime(runtimes["auto"].settings)
    monkeypatch.setattr(Runtime, "_own", runtime)
    q, k, v = make_qkv(Sizes(1, 4, 2, 100, 100))
    for mask, window in (
        (create_flex_attention_causal_mask(128), None),
        (create_flex_attention_sliding_window_mask(100, 9), 9),
    ):
        assert isinstance(mask, Tensor)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, visible(*mask.shape, causal=True, window=window)[0])
        for function in FUNCTIONS:
            assert relative_error(function(q, k, v, mask, LAYER, 1, 100), wanted(q, k, v, window)) <= 2e-6
        grads = gradients(
            lambda *x, m=mask: slow_attention_softcapping(*x, m, LAYER, 1, 100), (q, k, v), torch.ones(1, 100, 256)
        )[1]
        exact = gradients(lambda *x, w=window: wanted(*x, w), (q, k, v), torch.ones(1, 100, 256))[1]
        for mine, theirs in zip(grads, exact, strict=True):
            assert relative_error(mine, theirs) <= 3e-6
    config = AttentionConfig(softcap=30.0, scale=SCALAR**-0.5)
    out = runtime.attention(q, k, v, config)
    assert relative_error(out, expected(q, k, v, config)) <= 2e-6
    assert list(runtime.supply.supplied) == [library()]
    with pytest.raises(EngineUnavailable, match="has no flex_attention"):
        runtimes["flex"].attention(q, k, v, AttentionConfig(softcap=31.0, scale=0.1))


def test_inference_never_compiles(tmp_path: Path) -> None:
    code = """
import sys, torch
from types import SimpleNamespace
before = set(sys.modules)  # torch 2.5 imports its compiler itself
import softcap_runtime as s
layer = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=50.0, query_pre_attn_scalar=64))
q, k = torch.randn(1, 4, 33, 64), torch.randn(1, 2, 33, 64)
for x in (q, q.clone().requires_grad_()):
    for mask in (None, torch.randn(33, 33), torch.rand(33, 33) < 0.5, torch.ones(33, 33).tril() > 0):
        out = s.slow_inference_attention_softcapping(x, k, k, mask, layer, 1, 33)
        if x.requires_grad: out.sum().backward()
loaded = [name for name in ("torch._dynamo", "torch._inductor") if name in set(sys.modules) - before]
assert not loaded, loaded
assert not s.Runtime.get().supply.supplied
"""
    environment = {"SOFTCAP_CACHE_DIR": str(tmp_path), "PATH": "/nowhere", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["none", "causal", "window", "tril", "holes", "bias"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_mixed_inputs_under_autocast(function: Any, kind: str, seed: int) -> None:
    """Rotary embeddings leave q and k in float32 where v comes from a bf16 product; all kinds of mask alike."""
    q, k, v = make_qkv(Sizes(2, 4, 2, 60, 60))
    tril = torch.ones(60, 60, dtype=torch.bool).tril()
    holes = tril & ((torch.rand(60, 60) > 0.5) | torch.eye(60, dtype=torch.bool))
    bias = torch.randn(60, 60)
    mask = {
        "none": None,
        "causal": create_flex_attention_causal_mask(60),
        "window": create_flex_attention_sliding_window_mask(60, 9),
        "tril": tril,
        "holes": holes,
        "bias": bias.masked_fill(~tril, -torch.inf),
    }[kind]
    with torch.autocast("cpu", torch.bfloat16):
        out = function(q, k, v.bfloat16(), mask, LAYER, 2, 60)
    assert out.dtype == torch.bfloat16
    rounded = [x.bfloat16() for x in (q, k, v)]
    want = function(*(x.double() for x in rounded), mask, LAYER, 2, 60)
    if kind in ("none", "causal", "tril"):
        assert relative_error(want, wanted(*rounded)) <= 1e-12
    assert relative_error(out, want) <= 4e-3  # bf16


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_block_mask_for_other_rows_or_heads(function: Any, seed: int) -> None:
    create_block_mask = pytest.importorskip("torch.nn.attention.flex_attention").create_block_mask

    q, k, v = make_qkv(Sizes(2, 4, 2, 40, 40))
    for batch, heads, words in ((3, None, "3 batch rows, expected 1 or Q's 2"), (None, 3, "3 heads, expected 1")):
        mask = create_block_mask(lambda b, h, i, j: i >= j, batch, heads, 40, 40, device="cpu")
        with pytest.raises(ValueError, match=f"^causal_mask: {words}"):
            function(q, k, v, mask, LAYER, 2, 40)


@pytest.mark.parametrize("function", [slow_attention_softcapping, slow_inference_attention_softcapping])
def test_nan_in_a_mask_comes_out(own_runtime: Runtime, function: Any, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 4, 2, 30, 30))
    mask = torch.full((30, 30), -torch.inf).triu(1)
    mask[7, 3] = torch.nan
    out = function(q, k, v, mask, LAYER, 1, 30)
    assert bool(out[:, 7].isnan().all())
    assert bool(out[:, :7].isfinite().all() and out[:, 8:].isfinite().all())


@pytest.mark.parametrize("train", [False, True])
def test_a_dense_mask_of_row_intervals_runs_on_the_kernels(
    own_runtime: Runtime, monkeypatch: pytest.MonkeyPatch, train: bool
) -> None:
    monkeypatch.setattr(documented, "attend_elements", pytest.fail)
    q, k, v = (x.requires_grad_(train) for x in make_qkv(Sizes(2, 4, 2, 60, 60)))
    seen = visible(60, 60, causal=True, window=20)
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
        assert slow_attention_softcapping(q, k, v, mask, LAYER, 2, 60).requires_grad is train


def test_a_learned_bias_that_is_all_zero(own_runtime: Runtime, seed: int) -> None:
    """Its elements look like a mask's, but it is to be trained."""
    q, k, v = make_qkv(Sizes(1, 4, 2, 30, 30))
    bias = torch.zeros(30, 30, requires_grad=True)
    out = slow_attention_softcapping(q, k, v, bias, LAYER, 1, 30)
    (grad,) = torch.autograd.grad(out.sum(), bias)
    assert grad.abs().max() > 0
    with torch.no_grad():
        assert torch.allclose(slow_attention_softcapping(q, k, v, bias, LAYER, 1, 30), out, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mask_of_a_transform_or_a_trace(function: Any, additive: bool, seed: int) -> None:
    """Nobody may look at its elements: there are many of each under vmap, and a trace is for other ones too."""
    inputs = make_qkv(Sizes(2, 4, 2, 30, 30))
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    windowed = causal & ~causal.tril(-7)
    masks = torch.stack([causal, windowed])
    if additive:
        masks = torch.zeros(masks.shape).masked_fill(~masks, -torch.inf)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return function(q, k, v, mask, LAYER, 2, 30)

    want = torch.stack([wanted(*inputs), wanted(*inputs, window=7)])
    got = torch.func.vmap(attend, (None, None, None, 0))(*inputs, masks)
    assert relative_error(got, want) <= 2e-6
    traced = torch.jit.trace(attend, (*inputs, masks[0]), check_trace=False)
    assert relative_error(traced(*inputs, masks[1]), want[1]) <= 2e-6


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("batch", "rows"), [(0, 8), (2, 0)])
def test_empty_tensors(function: Any, batch: int, rows: int) -> None:
    for mask in (None, create_flex_attention_sliding_window_mask(16, 4), torch.ones(8, 8, dtype=torch.bool).tril()):
        q, k, v = torch.randn(batch, 4, rows, 16), torch.randn(batch, 2, 8, 16), torch.randn(batch, 2, 8, 16)
        if isinstance(mask, torch.Tensor):
            mask = mask[:rows]
        assert function(q, k, v, mask, LAYER, batch, rows).shape == (batch, rows, 64)
