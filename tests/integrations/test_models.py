"""Other models than Gemma-2: what they do with a mask on its way, and what of it is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from softcap_runtime import Runtime
from softcap_runtime.integrations.transformers import HfMask
from softcap_runtime.masks.intervals import dense

from .conftest import NAME, NEEDS_TRANSFORMERS_5, VOCABULARY, WINDOW, both, gemma, tokens
from .test_transformers import greedy, padded

pytestmark = pytest.mark.usefixtures("runtime")

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def model_of(name: str, **fields: Any) -> Any:
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(20)
    return transformers.AutoModelForCausalLM.from_config(config(**{**SMALL, **fields})).eval()


@pytest.mark.parametrize(
    ("name", "fields"), [("LlamaConfig", {}), ("MistralConfig", {"sliding_window": WINDOW}), ("GemmaConfig", {})]
)
def test_static_cache_where_all_layers_are_alike(name: str, fields: dict[str, Any]) -> None:
    """``generate`` makes one mask ahead of the model, which hands it to its mask function once more."""
    model, ids, mask = model_of(name, **fields), tokens(2, 30), padded("left", 30, [30, 12])
    eager, ours = both(model, lambda: greedy(model, ids, mask, cache_implementation="static"))
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("cache", [None, "static"])
def test_layers_that_share_keys(cache: str | None) -> None:
    """Gemma 4: the layers that share keys get the mask of the last rows alone."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = model_of(
        "Gemma4TextConfig",
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=WINDOW,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
    )
    ids, mask = tokens(2, 40), padded("left", 40, [40, 23])
    with torch.no_grad():
        eager, ours = both(model, lambda: model(ids, attention_mask=mask, logits_to_keep=3).logits)
    assert (eager - ours).abs().max() < 1e-4
    eager, ours = both(model, lambda: greedy(model, ids, mask, cache_implementation=cache))
    assert torch.equal(eager, ours)


@NEEDS_TRANSFORMERS_5
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("make", ["causal", "sliding_window_causal", "bidirectional"])
def test_last_rows_of_a_mask(make: str, side: str | None) -> None:
    settings = gemma(0, num_hidden_layers=1, sliding_window=4).config
    settings._attn_implementation = NAME
    function = getattr(masking_utils, f"create_{make}_mask")
    padding = None if side is None else padded(side, 9, [9, 3])
    mask = function(settings, torch.zeros(2, 9, 0), padding, past_key_values=None)
    for first in (None, 0, 4, 8, -1, -3, -20):
        rows = mask[:, :, first:, :]
        assert isinstance(rows, HfMask)
        assert torch.equal(dense(rows, "cpu"), dense(mask, "cpu")[:, first:])


@NEEDS_TRANSFORMERS_5
@pytest.mark.parametrize("use", ["arithmetic", "torch", "indices", "dtype"])
def test_mask_used_as_a_tensor_raises_by_name(use: str) -> None:
    settings = gemma(0, num_hidden_layers=1).config
    settings._attn_implementation = NAME
    mask = masking_utils.create_causal_mask(settings, torch.zeros(1, 4, 0), None, past_key_values=None)
    uses = {
        "arithmetic": lambda: torch.zeros(4) + mask,
        "torch": lambda: torch.cat([mask, mask], dim=-1),
        "indices": lambda: mask[:, 0, :, :],
        "dtype": lambda: mask.dtype,
    }
    words = r"attention_mask.*: this model computes with its mask .*attn_implementation='eager'"
    with pytest.raises((ValueError, AttributeError), match=words):
        uses[use]()


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_chosen_keys_and_sinks_raise_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What models with sparse attention and sinks of their own hand to their attention function."""
    monkeypatch.setattr(Runtime, "attend_checked", lambda *_: pytest.fail("a kernel ran"))
    with pytest.raises(ValueError, match=rf"{name}: .*attn_implementation='eager'"):
        gemma(0, attn_implementation=NAME)(tokens(1, 6), **{name: torch.zeros(1)})
