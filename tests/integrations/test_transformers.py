"""Gemma-2 through ``attn_implementation="softcap"``, against eager attention on the same weights and inputs."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.helpers import relative_error
from transformers.cache_utils import DynamicCache, StaticCache

from softcap_runtime import AttentionConfig, Runtime
from softcap_runtime.cpu.library import library
from softcap_runtime.integrations import hf_checks
from softcap_runtime.integrations import transformers as integration
from softcap_runtime.masks.documents import document_ids_from_position_ids
from softcap_runtime.reference import attention as reference

from .conftest import NAME, NEEDS_TRANSFORMERS_5, WINDOW, both, gemma, padded_run, registered, tokens

pytestmark = pytest.mark.usefixtures("runtime")


def padded(side: str, length: int, real: list[int]) -> torch.Tensor:
    mask = torch.zeros(len(real), length, dtype=torch.int64)
    for row, count in enumerate(real):
        mask[row, length - count if side == "left" else 0 :][:count] = 1
    return mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side: str, seed: int) -> None:
    model, ids = gemma(seed), tokens(3, 70)
    mask = padded(side, 70, [70, 41, 9])
    with torch.no_grad():
        eager, ours = both(model, lambda: model(ids, attention_mask=mask).logits)
    assert (eager - ours)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_embedding_gemma(side: str | None, seed: int) -> None:
    """Gemma 3 with attention both ways, the window of its sliding layers counting to both sides."""
    torch.manual_seed(seed)
    config = transformers.Gemma3TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=24,
        use_bidirectional_attention=True,
    )
    model, ids = transformers.Gemma3TextModel(config).eval(), tokens(3, 70)
    mask = None if side is None else padded(side, 70, [70, 41, 9])
    with torch.no_grad():
        eager, ours = both(model, lambda: model(ids, attention_mask=mask).last_hidden_state)
    kept = torch.ones(3, 70, dtype=torch.bool) if mask is None else mask.bool()
    assert (eager - ours)[kept].abs().max() < 1e-4


def test_long_enough_for_the_blocked_engine(runtime: Runtime, seed: int) -> None:
    model, ids = gemma(seed, num_hidden_layers=2, max_position_embeddings=1024), tokens(2, 600)
    mask = padded("left", 600, [600, 333])
    with torch.no_grad():
        eager, ours = both(model, lambda: model(ids, attention_mask=mask).logits)
    assert (eager - ours)[mask.bool()].abs().max() < 1e-4
    assert library() in runtime.supply.supplied


def test_hidden_keys_matter(seed: int) -> None:
    """The comparisons here would notice a window one key wider: its output differs by more than they allow."""
    model, ids = gemma(seed), tokens(1, 70)
    with torch.no_grad():
        right = model(ids).logits
        model.config.sliding_window = WINDOW + 1
        wider = model(ids).logits
    assert (right - wider).abs().max() > 1e-2


def test_bfloat16_is_as_good_as_eager(runtimes: dict[str, Runtime], runtime: Runtime, seed: int) -> None:
    model, ids, mask = gemma(seed), tokens(2, 50), padded("left", 50, [50, 20])
    with torch.no_grad():
        exact = model(ids, attention_mask=mask).logits
        model.to(torch.bfloat16)
        with registered(runtimes["blocked"], back_to=runtime):
            eager, ours = both(model, lambda: model(ids, attention_mask=mask).logits)
    assert ours.dtype == torch.bfloat16
    errors = [(exact - logits.float())[mask.bool()].norm() for logits in (ours, eager)]
    assert errors[0] < 1.25 * errors[1]


def test_masks_are_shared_and_small(runtime: Runtime, seed: int) -> None:
    made, used = [], []

    def mask_function(**arguments: Any) -> Any:
        made.append(integration.interval_mask(**arguments))
        return made[-1]

    def attention_function(module: Any, q: Any, k: Any, v: Any, mask: Any, **arguments: Any) -> Any:
        used.append(mask)
        return integration.attention_forward(runtime, module, q, k, v, mask, **arguments)

    transformers.AttentionInterface.register("spied", attention_function)
    transformers.AttentionMaskInterface.register("spied", mask_function)
    model = gemma(seed, attn_implementation="spied")
    model(tokens(2, 60), attention_mask=padded("right", 60, [60, 30]))
    assert len(made) == 2
    assert [any(mask is one for one in made) for mask in used] == [True] * 4
    assert all(mask.lo.numel() <= 2 * 60 for mask in made)


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, **options)[:, -64:]


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache: str | None) -> None:
    """64 tokens over a padded batch, past the window; a fixed seed, since near ties may fall either way."""
    model = gemma(20)
    ids, mask = tokens(3, 40), padded("left", 40, [40, 23, 5])
    eager, ours = both(model, lambda: greedy(model, ids, mask, cache_implementation=cache))
    assert torch.equal(eager, ours)
    assert len(ours.unique()) > 20


def test_generate_with_beams() -> None:
    model = gemma(21)
    ids, mask = tokens(2, 30), padded("left", 30, [30, 12])
    eager, ours = both(model, lambda: greedy(model, ids, mask, num_beams=3))
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("static", [False, True])
def test_prefill_in_chunks(static: bool, seed: int) -> None:
    """Chunks of many tokens, then one by one, through a cache whose sliding layers drop old keys."""
    model, ids, mask = gemma(seed), tokens(2, 64), padded("left", 64, [64, 37])

    def run() -> torch.Tensor:
        cache = StaticCache(model.config, max_cache_len=80) if static else DynamicCache(config=model.config)
        logits, past = [], 0
        for chunk in (17, 30, 1, 1, 13, 1, 1):
            reach = past + chunk
            step = model(ids[:, past:reach], attention_mask=mask[:, :reach], past_key_values=cache)
            logits.append(step.logits)
            past = reach
        return torch.cat(logits, 1)

    with torch.no_grad():
        eager, ours = both(model, run)
        whole = model(ids, attention_mask=mask).logits
    assert (eager - ours)[mask.bool()].abs().max() < 1e-4
    assert (whole - ours)[mask.bool()].abs().max() < 1e-3


@NEEDS_TRANSFORMERS_5
def test_packed_sequences(runtime: Runtime, seed: int) -> None:
    """position_ids that restart: as eager, as each document by itself, and as document_ids to the runtime."""
    model, lengths, ids = gemma(seed), [31, 1, 38, 10], tokens(1, 80)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        eager, ours = both(model, lambda: model(ids, position_ids=positions, use_cache=False).logits)
        alone = torch.cat([model(document).logits for document in ids.split(lengths, 1)], 1)
    assert (eager - ours).abs().max() < 1e-4
    assert (alone - ours).abs().max() < 1e-4

    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 80, 64), torch.randn(1, 2, 80, 64)
    settings = model.config
    mask = transformers.masking_utils.create_sliding_window_causal_mask(
        settings, torch.zeros(1, 80, 0), None, past_key_values=None, position_ids=positions
    )
    options = {"scaling": layer.scaling, "softcap": 50.0, "sliding_window": WINDOW}
    out, weights = integration.attention_forward(runtime, layer, q, k, k, mask, **options)
    documents = document_ids_from_position_ids(positions)
    same = runtime.attention(q, k, k, AttentionConfig.from_hf(settings, 0), document_ids=documents)
    assert weights is None
    assert torch.equal(out, same.transpose(1, 2))


def test_unpacked_flash_arguments_raise(seed: int) -> None:
    model = gemma(seed, attn_implementation=NAME)
    with pytest.raises(ValueError, match="cu_seq_lens_q: 2 packed sequences that the mask doesn't know"):
        model(tokens(1, 8), cu_seq_lens_q=torch.tensor([0, 3, 8]))


def gradients(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_close_gradients(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (gradient - found[name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed: bool, seed: int) -> None:
    model, ids = gemma(seed).train(), tokens(2, 60)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(length) for length in (20, 33, 7)])[None]
    else:
        inputs["attention_mask"] = padded("right", 60, [60, 35])
        inputs["labels"] = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    eager, ours = both(model, lambda: gradients(model, **inputs))
    assert abs(eager[0] - ours[0]) < 1e-5
    assert_close_gradients(eager[1], ours[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, seed: int) -> None:
    model, ids = gemma(seed, attn_implementation=NAME).train(), tokens(2, 40)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": padded("left", 40, [40, 12])}
    inputs["labels"] = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    plain = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients(model, **inputs)
    # Reentrant checkpoints run first without gradients, so another engine may serve that pass.
    assert abs(plain[0] - checkpointed[0]) < 1e-5
    assert_close_gradients(plain[1], checkpointed[1])


def test_autocast(runtimes: dict[str, Runtime], runtime: Runtime, seed: int) -> None:
    """Under autocast value comes in bfloat16 while the rotary embedding left query and key in float32."""
    model, ids = gemma(seed, attn_implementation=NAME), tokens(2, 30)
    with registered(runtimes["eager"], back_to=runtime), torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(ids).logits
    assert 0 < (exact - mixed).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("causal", [True, False])
def test_layer_without_mask(causal: bool, runtime: Runtime, seed: int) -> None:
    """Encoders and layers called on their own pass no mask: the module says whether it is causal."""
    layer = gemma(seed).model.layers[0].self_attn
    layer.is_causal = causal
    q, k, v = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64), torch.randn(2, 2, 9, 64)
    out, _ = integration.attention_forward(runtime, layer, q, k, v, None, softcap=50.0, scaling=0.3)
    mask = torch.ones(1, 9, 9, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    expected, _ = reference(q, k, v, mask, scale=0.3, softcap=50.0)
    assert (out - expected.transpose(1, 2)).abs().max() < 1e-5


def test_output_is_laid_out_for_the_next_layer(runtime: Runtime, seed: int) -> None:
    layer = gemma(seed).model.layers[0].self_attn
    q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    out, _ = integration.attention_forward(runtime, layer, q, k, k, None, softcap=50.0)
    assert out.shape == (2, 9, 4, 64)
    assert out.is_contiguous()


REFUSED = {
    "head mask": ({}, {"head_mask": torch.ones(4)}, "head_mask: .*attn_implementation='eager'"),
    "sinks": ({}, {"s_aux": torch.ones(4)}, "s_aux: .*attn_implementation='eager'"),
    "own mask": ({}, {"attention_mask": torch.zeros(1, 1, 6, 5)}, "attention_mask: 6 rows and 5 keys"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, inputs, words = REFUSED[what]
    monkeypatch.setattr(Runtime, "attend_checked", lambda *_: pytest.fail("a kernel ran"))
    with pytest.raises(ValueError, match=words) as raised:
        gemma(seed, attn_implementation=NAME, **fields).train()(tokens(1, 6), **inputs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("own_mask", [False, True])
def test_dropout_of_weights(own_mask: bool, runtime: Runtime, seed: int) -> None:
    """By the same numbers of the generator as eager's: outputs and gradients are the same."""
    model, ids = gemma(seed, attention_dropout=0.3).train(), tokens(2, 40)
    hidden = torch.full((2, 1, 40, 40), torch.finfo(torch.float32).min).triu(1)
    mask = hidden if own_mask else None
    found = {}
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        torch.manual_seed(seed)
        logits = model(ids, attention_mask=mask).logits
        found[name] = [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]
    model.eval()
    still = model(ids, attention_mask=mask).logits
    assert relative_error(still, found[NAME][0]) > 1e-3, "nothing was dropped"
    for ours, theirs in zip(found[NAME], found["eager"], strict=True):
        assert relative_error(ours, theirs) < 1e-5  # float32's rounding, over three layers


def test_weights_are_none_and_told_once(runtime: Runtime, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    hf_checks.warn_once.cache_clear()
    model = gemma(seed)
    model.set_attn_implementation(NAME)
    for _ in range(2):
        assert not any(model(tokens(1, 6), output_attentions=True).attentions or ())
    told = [record for record in caplog.records if "output_attentions" in record.message]
    assert len(told) == 1


def test_padding_with_holes(runtime: Runtime, seed: int) -> None:
    """Logits and greedy tokens as eager's, as batched chat over several turns has them."""
    model, ids = gemma(seed), tokens(2, 40)
    keep = torch.ones_like(ids)
    keep[0, 8:13], keep[1, :4], keep[1, 20:27] = 0, 0, 0
    found = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = model(ids, attention_mask=keep).logits[keep.bool()]
            found.append((logits, model.generate(ids, attention_mask=keep, max_new_tokens=6, do_sample=False)))
    (logits, greedy), (own_logits, own_greedy) = found
    assert relative_error(own_logits, logits) <= 1e-5
    assert torch.equal(own_greedy, greedy)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("kind", ["causal", "tree"])
def test_a_mask_of_the_callers_own(runtime: Runtime, kind: str, additive: bool, seed: int) -> None:
    model, ids = gemma(seed, sliding_window=4096), tokens(1, 12)
    see = torch.ones(12, 12).tril().bool()
    if kind == "tree":  # three drafts of three tokens after three of a prompt
        see[6:, 3:6] = see[9:, 6:9] = False
    bias = torch.zeros(1, 1, 12, 12).masked_fill(~see, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    want = model(ids, attention_mask=bias).logits
    model.set_attn_implementation(NAME)
    got = model(ids, attention_mask=bias if additive else see[None, None]).logits
    assert relative_error(got, want) <= 1e-5


@NEEDS_TRANSFORMERS_5
def test_mask_of_another_length_raises(runtime: Runtime, seed: int) -> None:
    model = gemma(seed, attn_implementation=NAME)
    mask = transformers.masking_utils.create_causal_mask(model.config, torch.zeros(1, 6, 0), None, past_key_values=None)
    q, k = torch.randn(1, 4, 6, 64), torch.randn(1, 2, 7, 64)
    with pytest.raises(ValueError, match="made for 6 rows over 6 keys, but the layer has 6 over 7"):
        integration.attention_forward(runtime, model.model.layers[0].self_attn, q, k, k, mask)


def test_old_transformers_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the name imported above: the package puts another module object in its place while it loads.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.55.4")
    with pytest.raises(ImportError, match=r"transformers 4\.55\.4: expected 4\.56 or newer"):
        integration.register()


def test_missing_transformers_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'softcap-runtime\[transformers\]'"):
        integration.register()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"runtime": "softcap"}, "runtime: str, expected a Runtime; make one with"),
        ({"name": 3}, "name: int, expected a name for attn_implementation"),
        (
            {"context": 3},
            "context: int, expected a mapping of 'full_attention' and 'sliding_attention' to ContextMasks",
        ),
        ({"context": {"full": None}}, "context: 'full' among its keys, expected a mapping of 'full_attention' and"),
        (
            {"context": {"full_attention": 3}},
            r"context\['full_attention'\]: int, expected a ContextMask; make one with",
        ),
    ],
)
def test_what_can_not_be_registered(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        integration.register(**arguments)


def test_cache_position_of_older_versions(seed: int) -> None:
    """Transformers before 5 says where the rows are with a tensor of their positions."""
    arguments = {"batch_size": 2, "kv_length": 12, "mask_function": transformers.masking_utils.causal_mask_function}
    new = integration.interval_mask(q_length=3, q_offset=5, **arguments)
    old = integration.interval_mask(cache_position=torch.arange(5, 8), **arguments)
    assert old == new
    with pytest.raises(RuntimeError, match="in a way that this softcap_runtime doesn't know"):
        integration.interval_mask(**arguments)


def test_a_fresh_process_builds_nothing(runtime: Runtime, cache_dir: Path, seed: int) -> None:
    """Prefill, decoding with both caches and a training step of a warm machine: every kernel is from disk."""
    program = textwrap.dedent(f"""
        import json
        from tests.integrations.conftest import gemma, padded_run
        from softcap_runtime import Runtime, RuntimeSettings
        from softcap_runtime.integrations.transformers import register

        runtime = Runtime(RuntimeSettings(cache_dir={str(cache_dir)!r}, jit="forbid"))
        register(runtime)
        padded_run(gemma({seed}, attn_implementation="softcap"))
        print(json.dumps([kernel.source for kernel in runtime.supply.supplied.values()]))
    """)
    padded_run(gemma(seed, attn_implementation=NAME))
    command, root = [sys.executable, "-c", program], Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    warm = json.loads(run.stdout.splitlines()[-1])
    assert warm
    assert set(warm) == {"disk"}
