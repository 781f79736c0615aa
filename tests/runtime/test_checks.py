"""Bad input of every kind: one line that names the argument and its value, before any kernel runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import Sizes, make_qkv
from torch import Tensor

from softcap_runtime import AttentionConfig, EngineUnavailable, Runtime, RuntimeSettings
from softcap_runtime.checks import Cap

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.fixture
def unused(tmp_path: Path) -> Any:
    """A runtime that came by no kernel when the test is over, and made no plan."""
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path))
    yield runtime
    assert not runtime.supply.supplied
    assert not list(runtime.plans.items())


def refused(runtime: Runtime, error: type[Exception], words: list[str], *args: Any, **more: Any) -> None:
    for grad in (False, True):
        if grad and isinstance(args[0], Tensor) and args[0].is_floating_point():
            args = (args[0].clone().requires_grad_(), *args[1:])
        with pytest.raises(error) as raised:
            runtime.attention(*args, **more)
        text = str(raised.value)
        assert "\n" not in text
        for word in words:
            assert word in text


@pytest.mark.parametrize(
    ("q", "k", "v", "error", "words"),
    [
        (zeros(4, 8, 64), zeros(1, 2, 8, 64), zeros(1, 2, 8, 64), ValueError, ["q: shape (4, 8, 64)", "4 dimensions"]),
        (zeros(1, 4, 8, 64), zeros(2, 8, 64), zeros(2, 8, 64), ValueError, ["k: shape (2, 8, 64)"]),
        (zeros(1, 4, 8, 64), zeros(1, 2, 8, 64), zeros(1, 1, 2, 8, 64), ValueError, ["v: shape (1, 1, 2, 8, 64)"]),
        (zeros(1, 4, 8, 64), zeros(1, 3, 8, 64), zeros(1, 3, 8, 64), ValueError, ["q: 4 heads", "3 key heads"]),
        (zeros(1, 4, 8, 64), zeros(1, 2, 8, 32), zeros(1, 2, 8, 32), ValueError, ["k: head_dim 32", "64"]),
        (zeros(1, 4, 8, 64), zeros(1, 2, 8, 64), zeros(1, 2, 8, 32), ValueError, ["v: head_dim 32", "64"]),
        (zeros(1, 4, 8, 64), zeros(2, 2, 8, 64), zeros(2, 2, 8, 64), ValueError, ["k: batch 2"]),
        (zeros(1, 4, 8, 64), zeros(1, 2, 8, 64), zeros(1, 2, 9, 64), ValueError, ["v: shape (1, 2, 9, 64)"]),
        (zeros(1, 4, 8, 64), zeros(1, 2, 8, 64), zeros(1, 4, 8, 64), ValueError, ["v: shape (1, 4, 8, 64)"]),
        (
            zeros(1, 4, 8, 64),
            zeros(1, 2, 8, 64, dtype=torch.bfloat16),
            zeros(1, 2, 8, 64),
            ValueError,
            ["k.dtype: torch.bfloat16", "torch.float32"],
        ),
        (zeros(1, 4, 8, 64), zeros(1, 2, 8, 64), zeros(1, 2, 8, 64, dtype=torch.float64), ValueError, ["v.dtype"]),
        (zeros(1, 4, 8, 64), zeros(1, 2, 8, 64).to("meta"), zeros(1, 2, 8, 64), ValueError, ["k: on meta", "cpu"]),
        (*[zeros(1, 2, 8, 64, dtype=torch.int32)] * 3, TypeError, ["q: torch.int32"]),
        (*[zeros(1, 2, 8, 64, dtype=torch.bool)] * 3, TypeError, ["q: torch.bool"]),
        (*[zeros(1, 2, 8, 64, dtype=torch.complex64)] * 3, TypeError, ["q: torch.complex64"]),
        (*[zeros(1, 2, 8, 64).to(torch.float8_e4m3fn)] * 3, TypeError, ["q: torch.float8_e4m3fn"]),
        (*[zeros(1, 2, 8, 0)] * 3, ValueError, ["q: shape (1, 2, 8, 0)", "head_dim of at least 1"]),
        (zeros(1, 4, 8, 64), *[zeros(1, 0, 8, 64)] * 2, ValueError, ["k: shape (1, 0, 8, 64)", "at least one head"]),
        (zeros(1, 4, 8, 64), *[zeros(1, 2, 0, 64)] * 2, ValueError, ["q: 8 rows over 0 keys"]),
        (zeros(1, 1, 4, 64), *[zeros(1, 8, 2, 64)] * 2, ValueError, ["q: 1 heads", "laid out [B, S, H, D], pass"]),
        (zeros(1, 8, 4, 64), *[zeros(1, 8, 2, 64)] * 2, ValueError, ["q: 4 rows", "laid out [B, S, H, D], pass"]),
        (zeros(0, 4, 8, 64), *[zeros(1, 2, 8, 64)] * 2, ValueError, ["k: batch 1, expected q's 0"]),
        (zeros(1, 4, 9, 64), *[zeros(1, 2, 8, 64)] * 2, ValueError, ["q: 9 rows over 8 keys"]),
        ([[1.0]], zeros(1, 2, 8, 64), zeros(1, 2, 8, 64), TypeError, ["q: list"]),
        (zeros(1, 4, 8, 64), None, zeros(1, 2, 8, 64), TypeError, ["k: NoneType"]),
        (*[zeros(1, 2, 8, 64).to_sparse()] * 3, TypeError, ["q: torch.sparse_coo", "dense"]),
        (*[torch.nested.nested_tensor([zeros(2, 8, 64)])] * 3, TypeError, ["q: nested", "dense"]),
    ],
)
def test_bad_tensors(unused: Runtime, q: Any, k: Any, v: Any, error: type[Exception], words: list[str]) -> None:
    refused(unused, error, words, q, k, v, CONFIG)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("attention_mask", torch.ones(2, 7), TypeError, ["torch.float32"]),
        ("attention_mask", torch.ones(2, 7, dtype=torch.int64), ValueError, ["shape (2, 7)", "(2, 8)"]),
        ("attention_mask", torch.ones(3, 8, dtype=torch.int64), ValueError, ["shape (3, 8)"]),
        ("attention_mask", torch.ones(2, 1, 8, 8, dtype=torch.bool), ValueError, ["shape (2, 1, 8, 8)"]),
        ("attention_mask", torch.full((2, 8), 2), ValueError, ["2, expected 0"]),
        ("attention_mask", [[1] * 8] * 2, TypeError, ["list"]),
        ("document_ids", torch.zeros(2, 7, dtype=torch.int64), ValueError, ["shape (2, 7)"]),
        ("document_ids", torch.zeros(2, 8), TypeError, ["torch.float32"]),
        ("document_ids", torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0]] * 2), ValueError, ["0 after 1 at position 4"]),
        ("document_ids", torch.zeros(2, 8, dtype=torch.int64, device="meta"), ValueError, ["on meta"]),
        ("prefix_lengths", torch.tensor([3, 9]), ValueError, ["9 in batch row 1"]),
        ("prefix_lengths", torch.tensor([-1, 2]), ValueError, ["-1 in batch row 0"]),
        ("prefix_lengths", torch.tensor([1, 2, 3]), ValueError, ["shape (3,)"]),
        ("spans", torch.tensor([[[0, 4], [3, 6]]]), ValueError, ["[3, 6)", "overlaps"]),
        ("spans", torch.tensor([[[5, 9]]]), ValueError, ["[5, 9)", "<= 8"]),
        ("spans", torch.tensor([[5, 8]]), ValueError, ["shape (1, 2)"]),
        ("cache_lengths", torch.tensor([8, 9]), ValueError, ["9 in batch row 1"]),
        ("cache_lengths", torch.tensor([3, 8]), ValueError, ["3 in batch row 0"]),
    ],
)
def test_bad_masks(unused: Runtime, name: str, value: Any, error: type[Exception], words: list[str]) -> None:
    q, k, v = make_qkv(Sizes(2, 4, 2, 4, 8))
    refused(unused, error, [f"{name}: ", *words], q, k, v, CONFIG, **{name: value})


@pytest.mark.parametrize(
    "config", [None, CONFIG.model_dump(), SimpleNamespace(**CONFIG.model_dump()), Cap(50.0, 0.125)]
)
def test_a_config_of_another_type(unused: Runtime, config: Any) -> None:
    inputs = make_qkv(Sizes(1, 2, 1, 4, 4))
    words = [f"config: {type(config).__name__}, expected an AttentionConfig"]
    refused(unused, TypeError, words, *inputs, config)
    refused(unused, TypeError, words, *inputs, config, attention_mask=torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("engine", ["flex", "blocked", "dense"])
def test_float64_with_a_compiled_engine(tmp_path: Path, engine: Any) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine=engine))
    inputs = make_qkv(Sizes(1, 2, 1, 4, 4), torch.float64)
    refused(runtime, EngineUnavailable, [f"engine: '{engine}'", "torch.float64"], *inputs, CONFIG)
    assert not runtime.supply.supplied


def test_flex_does_not_train_on_the_cpu(tmp_path: Path) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="flex"))
    inputs = [x.requires_grad_() for x in make_qkv(Sizes(1, 2, 1, 4, 4))]
    with pytest.raises(EngineUnavailable, match="no backward on the CPU"):
        runtime.attention(*inputs, CONFIG)


def test_a_refused_call_does_not_spoil_the_next(runtimes: dict[str, Runtime], seed: int) -> None:
    # Shortcuts are keyed by what a call looks like: a bad call must not be found where a good one was.
    runtime = Runtime(runtimes["eager"].settings)
    q, k, v = make_qkv(Sizes(1, 4, 2, 8, 8))
    want = runtime.attention(q, k, v, CONFIG)
    assert torch.equal(runtime.attention(q, k, v, CONFIG), want)
    assert torch.equal(runtime.attention(q, k, v, CONFIG), want)
    for bad in ((q, k, v[:, :1]), (q, k[..., :32], v), (q[0], k, v), (q, k, v.double()), (q, k, v.to("meta"))):
        with pytest.raises(ValueError, match=r"^[qkv]"):
            runtime.attention(*bad, CONFIG)
    assert torch.equal(runtime.attention(q, k, v, CONFIG), want)


def test_wrong_interval_vectors_never_reach_a_kernel(runtimes: dict[str, Runtime], seed: int) -> None:
    """The operator's own door: kernels read the vectors without looking at their sizes."""
    q, k, v = make_qkv(Sizes(2, 4, 2, 8, 8))
    rows = torch.zeros(2, 8, dtype=torch.int32)
    for lo in (rows[:, :7], rows.expand(3, 2, 8)[:, 0], rows.long(), rows[0]):
        for engine in ("flex", "blocked", "eager"):
            with pytest.raises(ValueError, match=r"mask\.lo"):
                torch.ops.softcap_runtime.attention(
                    q, k, v, lo, lo + 1, 0, 0, 0.125, 50.0, engine, False, runtimes[engine].number
                )
