"""What only the data of a mask on a GPU say: holes are served, wrong values refused, and nothing waits for either."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.helpers import Sizes, expected, gradients, make_qkv, relative_error
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, row_intervals
from softcap_runtime.cuda.intervals import bind_intervals
from softcap_runtime.engines.blocked_cuda import GpuKernelsOf
from softcap_runtime.masks import deferred_checks
from softcap_runtime.masks.intervals import with_kept

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CONFIG = AttentionConfig(softcap=50.0, scale=0.125)
# As in test_public_doors: float32 by three TF32 products, bf16's rounding of weights.
TOLERANCE = {torch.float32: (4e-6, 6e-6), torch.bfloat16: (4e-3, 7e-3)}
SIZES = (Sizes(3, 4, 2, 1, 900), Sizes(3, 4, 2, 2, 300), Sizes(2, 8, 4, 300, 300), Sizes(1, 4, 2, 70, 1100))


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def holes(rows: int, keys: int) -> Tensor:
    kept = torch.rand(rows, keys) < 0.7
    kept[0, keys // 3 : keys // 3 + 150] = False
    return kept


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_holes(runtimes: dict[str, Runtime], dtype: torch.dtype, seed: int) -> None:
    for sizes in SIZES:
        for rows in {1, sizes.batch}:
            inputs, mask = make_qkv(sizes, dtype), holes(rows, sizes.kv_len)
            grad = torch.randn(inputs[0].shape)

            def run(*x: Tensor, mask: Tensor = mask) -> Tensor:
                return runtimes["blocked"].attention(*x, CONFIG, mask)

            def exact(*x: Tensor, mask: Tensor = mask) -> Tensor:
                return expected(*x, CONFIG, attention_mask=mask)

            with torch.no_grad():
                decoded = run(*inputs)
            out, grads = gradients(run, inputs, grad.to(dtype))
            want, want_grads = gradients(exact, tuple(x.double() for x in inputs), grad.to(dtype).double())
            for got in (out, decoded):
                assert relative_error(got, want) <= TOLERANCE[dtype][0]
            for mine, theirs in zip(grads, want_grads, strict=True):
                assert relative_error(mine, theirs) <= TOLERANCE[dtype][1]


def test_holes_in_graphs(own_runtime: Runtime, seed: int) -> None:
    compiled = torch.compile(
        lambda q, k, v, mask: own_runtime.attention(q, k, v, CONFIG, mask), backend="aot_eager", fullgraph=True
    )
    for sizes in SIZES:
        inputs, mask = make_qkv(sizes, torch.bfloat16), holes(sizes.batch, sizes.kv_len)
        want = expected(*inputs, CONFIG, attention_mask=mask)
        assert relative_error(compiled(*inputs, mask), want) <= 4e-3
    captured = torch.cuda.CUDAGraph()
    own_runtime.attention(*inputs, CONFIG, mask)
    with torch.cuda.graph(captured):
        out = own_runtime.attention(*inputs, CONFIG, mask)
    mask.logical_not_()
    captured.replay()
    assert relative_error(out, expected(*inputs, CONFIG, attention_mask=mask)) <= 4e-3


def test_holes_in_a_compiled_model(runtime: Runtime, seed: int) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from softcap_runtime.integrations.transformers import register

    register(runtime)
    fields = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 24}
    config = transformers.Gemma2Config(**fields, **heads, pad_token_id=0, attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(config).eval()
    ids, mask = torch.randint(1, 97, (2, 60)), torch.ones(2, 60, dtype=torch.int64)
    mask[0, 20:31], mask[1, :9], mask[1, 40:44] = 0, 0, 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("softcap")
        compiled = torch.compile(model, backend="aot_eager")
        for run in (model, compiled):
            assert relative_error(run(ids, attention_mask=mask).logits[mask.bool()], want) <= 1e-4


def good() -> dict[str, Tensor]:
    """Mask arguments for 64 rows over 64 keys, two batch rows."""
    return {
        "attention_mask": torch.ones(2, 64, dtype=torch.int64),
        "document_ids": torch.arange(64).expand(2, -1) // 20,
        "prefix_lengths": torch.tensor([3, 64]),
        "spans": torch.tensor([[[5, 10], [10, 20]], [[0, 0], [7, 64]]]),
        "cache_lengths": torch.tensor([64, 64]),
        "query_positions": torch.arange(64),
    }


def test_nothing_waits_for_a_mask(own_runtime: Runtime, seed: int) -> None:
    inputs = make_qkv(Sizes(2, 4, 2, 64, 64), torch.bfloat16)
    own_runtime.attention(*inputs, CONFIG, **good())
    for name, value in good().items():
        for _ in range(2):  # the second call takes the short way, where there is one
            own_runtime.attention(*inputs, CONFIG, **{name: value})
        value = value.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            own_runtime.attention(*inputs, CONFIG, **{name: value})
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_spans_are_checked_once_until_they_change(
    own_runtime: Runtime, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(deferred_checks, "assert_on_device", lambda condition, message: asked.append(message))
    inputs, spans = make_qkv(Sizes(2, 4, 2, 64, 64), torch.bfloat16), good()["spans"].clone()
    for _ in range(3):
        own_runtime.attention(*inputs, CONFIG, spans=spans)
    assert len(asked) == 1
    spans += 0
    own_runtime.attention(*inputs, CONFIG, spans=spans)
    assert len(asked) == 2
    row_intervals(64, 64, causal=True, window=None, spans=spans)  # checks nothing
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["attention_mask", "document_ids"])
def test_a_mask_is_read_anew_at_each_call(own_runtime: Runtime, name: str, seed: int) -> None:
    """Whoever wrote to it: kernels of others, CUDA graphs and collectives leave its version as it was."""
    inputs, value = make_qkv(Sizes(2, 4, 2, 64, 64), torch.bfloat16), good()[name].clone()
    for other in (value.clone(), holes(2, 64).to(value.dtype) if name == "attention_mask" else value // 2):
        version = value._version
        value.data.copy_(other)
        assert value._version == version
        for _ in range(2):
            out = own_runtime.attention(*inputs, CONFIG, **{name: value})
            assert relative_error(out, expected(*inputs, CONFIG, **{name: other})) <= 4e-3


def supply(runtime: Runtime) -> Any:
    """Where a call finds its kernels."""
    runtime.attention(*make_qkv(Sizes(1, 2, 2, 64, 64), torch.bfloat16), CONFIG)
    return runtime.supply.kernels(next(runtime.plans.items())[1].problem)


def intervals(given: dict[str, Tensor], q_len: int, causal: bool, window: int | None) -> tuple[Tensor, ...]:
    made = row_intervals(q_len, 9000, causal=causal, window=window, **given)
    if "attention_mask" in given and made.kept is None:
        made = with_kept(made, given["attention_mask"])
    return made.vectors


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 700])
def test_warm_intervals_are_those_of_the_specification(
    own_runtime: Runtime, causal: bool, window: int | None, seed: int
) -> None:
    """Of several programs a row, for every dtype, a part of longer rows and one row for all."""
    find = bind_intervals(torch.device("cuda", 0), GpuKernelsOf(supply(own_runtime), 0))
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    for mask_dtype, id_dtype in zip((torch.bool, *integers), (*integers, torch.int64), strict=True):
        mask = (torch.rand(2, 9003) < 0.999).to(mask_dtype)[:, :9000]
        ids = (torch.rand(1, 9003) < 1e-3).cumsum(1).to(id_dtype)[:, :9000]
        for q_len in (9000, 5, 4097):
            for given in (
                {"attention_mask": mask},
                {"document_ids": ids},
                {"attention_mask": mask, "document_ids": ids},
            ):
                pair = (given.get("attention_mask"), given.get("document_ids"))
                found = find(2, q_len, 9000, causal, window, *pair)
                want = intervals(given, q_len, causal, window)
                assert found is not None
                assert len(found) == len(want)
                assert all(torch.equal(mine, other) for mine, other in zip(found, want, strict=True))


WRONG: dict[str, Any] = {
    "attention_mask": "[1] * 63 + [2]",
    "document_ids": "[5] * 32 + [4] * 32",
    "prefix_lengths": "65",
    "spans": "[[5, 10], [8, 20]]",
    "cache_lengths": "65",
    "cu_seqlens": "[0, 40, 30, 64]",
}
CHILD = """
import sys, torch
from softcap_runtime import AttentionConfig, Runtime, document_ids_from_cu_seqlens
name, value, how = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
runtime, config = Runtime.get(), AttentionConfig(softcap=50.0, scale=0.125)
q, k, v = torch.randn(3, 1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
made = torch.tensor(value if name == "cu_seqlens" else [value], device="cuda")

def attend(made):
    masks = {"document_ids": document_ids_from_cu_seqlens(made, 64)} if name == "cu_seqlens" else {name: made}
    return runtime.attention(q, k, v, config, **masks)

if how == "warm":
    attend(made * 0)
try:  # as with any error of a GPU, whichever call next asks for it raises
    out = (torch.compile(attend, backend="aot_eager") if how == "traced" else attend)(made)
    print("seen", out.sum().item())
except RuntimeError as error:
    print("refused:", "device-side assert" in str(error))
"""


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in WRONG for how in ("cold", "traced")),
        *((name, "warm") for name in ("attention_mask", "document_ids")),
    ],
)
def test_wrong_values_are_refused_before_a_result_is_read(
    name: str, how: str, cache_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTCAP_CACHE_DIR", str(cache_dir))
    run = subprocess.run(
        [sys.executable, "-c", CHILD, name, WRONG[name], how], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.splitlines() == ["refused: True"], (run.stdout, run.stderr[-2000:])
    assert f"{name}: " in run.stderr


def test_wrong_pages_give_nan_in_their_sequence(own_runtime: Runtime, seed: int) -> None:
    k, v = torch.randn(2, 12, 16, 2, 64, dtype=torch.bfloat16)
    q = torch.randn(3, 4, 1, 64, dtype=torch.bfloat16)
    table, lengths = torch.arange(12, dtype=torch.int32).view(3, 4), torch.tensor([64, 50, 7])
    want = own_runtime.paged_attention(q, k, v, CONFIG, table, lengths)
    table[0, 2] = 12
    lengths[1] = 65
    out = own_runtime.paged_attention(q, k, v, CONFIG, table, lengths)
    assert out[:2].isnan().all()
    assert torch.equal(out[2], want[2])
