"""The models that are known by name, beside the configs that transformers ships for them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from softcap_runtime import AttentionConfig
from softcap_runtime.presets import PRESETS, requests_for

transformers = pytest.importorskip("transformers")

# What the published configs say beside the defaults of Gemma-2's config class: heads, key heads, head_dim, scalar.
GEMMA2 = {"2b": (8, 4, 256, 256), "9b": (16, 8, 256, 256), "27b": (32, 16, 128, 144)}
PALIGEMMA2 = {"3b": "2b", "10b": "9b", "28b": "27b"}


def config_of(size: str, kind: Any = None) -> Any:
    heads, kv_heads, head_dim, scalar = GEMMA2[size]
    return (kind or transformers.Gemma2Config)(
        hidden_size=heads * head_dim,  # newer versions check that heads divide it
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
    )


def rows(requests: list[Any]) -> list[tuple[AttentionConfig, int, int, int]]:
    return [(one.config, one.num_heads, one.num_kv_heads, one.head_dim) for one in requests]


def read(config: Any, folder: Path) -> list[tuple[AttentionConfig, int, int, int]]:
    """What is prewarmed for a model of this config, as transformers writes it."""
    config.save_pretrained(folder)
    return rows(requests_for(folder))


@pytest.mark.parametrize("size", GEMMA2)
def test_gemma_2(size: str, tmp_path: Path) -> None:
    found = requests_for(f"gemma2-{size}", seq_lens=[10], dtype="float16", train=True)
    assert rows(found) == read(config_of(size), tmp_path)
    assert {(one.seq_lens, one.dtype, one.train) for one in found} == {((10,), "float16", True)}


def test_gemma_2_is_by_default_the_one_of_2b(tmp_path: Path) -> None:
    assert rows(requests_for("gemma2-2b")) == read(transformers.Gemma2Config(), tmp_path)


@pytest.mark.parametrize("size", PALIGEMMA2)
def test_paligemma_2(size: str, tmp_path: Path) -> None:
    model = transformers.PaliGemmaConfig(text_config=config_of(PALIGEMMA2[size]).to_dict())
    assert rows(requests_for(f"paligemma2-{size}")) == read(model, tmp_path)


@pytest.mark.parametrize(("encoder", "decoder"), [("2b", "2b"), ("9b", "2b"), ("9b", "9b")])
def test_t5gemma(encoder: str, decoder: str, tmp_path: Path) -> None:
    kind = inspect.getmodule(transformers.T5GemmaConfig).T5GemmaModuleConfig  # type: ignore[union-attr]
    model = transformers.T5GemmaConfig(encoder=config_of(encoder, kind), decoder=config_of(decoder, kind))
    found = rows(requests_for(f"t5gemma-{encoder}-{decoder}"))
    assert found == read(model, tmp_path)
    # As modeling_t5gemma.py has them: the encoder's layers, the decoder's, and the attention between the two.
    seen = [(config.causal, config.window) for config, *_ in found]
    assert seen == [(False, 4096), (False, None), (True, 4096), (True, None), (False, None)]
    assert {config.softcap for config, *_ in found} == {50.0}
    assert [row[1:] for row in found] == [GEMMA2[encoder][:3]] * 2 + [GEMMA2[decoder][:3]] * 3


def test_videoprism() -> None:
    """An encoder of pictures: no window, no direction, and as many key heads as heads."""
    if not hasattr(transformers, "VideoPrismVisionConfig"):
        pytest.skip("this transformers has no VideoPrism")
    model = transformers.VideoPrismVisionConfig()
    heads, head_dim = model.num_attention_heads, model.hidden_size // model.num_attention_heads
    kind = AttentionConfig(softcap=model.attn_logit_softcapping, scale=head_dim**-0.5, causal=False)
    assert rows(requests_for("videoprism-base")) == [(kind, heads, heads, head_dim)]


def test_grok_1() -> None:
    """As run.py and model.py of xai-org/grok-1 have it; transformers ships no config of it."""
    kind = AttentionConfig(softcap=30.0, scale=0.08838834764831845)
    assert rows(requests_for("grok-1")) == [(kind, 48, 8, 128)]


@pytest.mark.parametrize("softcap", [50.0, None])
def test_vaultgemma_by_its_own_config(softcap: float | None, tmp_path: Path) -> None:
    """No preset: configs of this family cap or don't, so the model's own file is what counts."""
    model = transformers.VaultGemmaConfig(attn_logit_softcapping=softcap)
    expected = [AttentionConfig.from_hf(model, layer_idx=layer) for layer in range(2)]
    assert [row[0] for row in read(model, tmp_path)] == expected
    assert {config.softcap for config in expected} == {softcap}


def test_every_preset_is_compared_above() -> None:
    compared = [f"gemma2-{size}" for size in GEMMA2] + [f"paligemma2-{size}" for size in PALIGEMMA2]
    compared += ["t5gemma-2b-2b", "t5gemma-9b-2b", "t5gemma-9b-9b", "videoprism-base", "grok-1"]
    assert sorted(compared) == sorted(PRESETS)
