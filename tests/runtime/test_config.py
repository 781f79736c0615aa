"""What may be asked for: configs, requests and settings, and the one-line errors of what may not."""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcap_runtime import AttentionConfig, PrewarmRequest, RuntimeSettings
from softcap_runtime.config import default_cache_dir, hf_head_dim
from softcap_runtime.supply import Supply, warn_of_unknown_variables

positive = st.floats(1e-6, 1e6)


@given(softcap=st.none() | positive, scale=positive, window=st.none() | st.integers(1, 2**40), causal=st.booleans())
def test_equal_configs_are_one_key(softcap: float | None, scale: float, window: int | None, causal: bool) -> None:
    fields = {"softcap": softcap, "scale": scale, "window": window, "causal": causal}
    one, two = AttentionConfig(**fields), AttentionConfig(**fields)
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1
    assert one.model_dump() == fields
    assert pickle.loads(pickle.dumps(one)) == one
    for name, other in (("scale", scale * 2), ("causal", not causal), ("window", (window or 0) + 1)):
        assert AttentionConfig(**{**fields, name: other}) != one


def test_copies_are_checked() -> None:
    config = AttentionConfig(softcap=50.0, scale=0.1, window=7)
    assert config.model_copy(update={"window": None}) == AttentionConfig(softcap=50.0, scale=0.1)
    one_line_error(lambda: config.model_copy(update={"softcap": -1}), "softcap", "-1")


def test_frozen() -> None:
    config, settings = AttentionConfig(scale=0.1), RuntimeSettings()
    assert (config.softcap, config.window, config.causal) == (None, None, True)
    for frozen, name in ((config, "scale"), (settings, "jit"), (config, "no_field")):
        kind = type(frozen).__name__
        words = (f"{kind}.{name}: ", "frozen", "'other'", f"build a new {kind}(...)")
        one_line_error(lambda frozen=frozen, name=name: setattr(frozen, name, "other"), *words)


@pytest.mark.parametrize("name", ["softcap", "scale"])
@pytest.mark.parametrize(
    "value", [0, -1.0, 1e-46, 1e-38, 1e38, 1e39, math.nan, math.inf, -math.inf, True, "wide", [1.0]]
)
def test_bad_numbers(name: str, value: Any) -> None:
    one_line_error(lambda: AttentionConfig(**{"scale": 0.1, name: value}), name, repr(value))


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "wide", math.inf])
def test_bad_windows(value: Any) -> None:
    one_line_error(lambda: AttentionConfig(scale=0.1, window=value), "window", repr(value))


def test_other_bad_fields() -> None:
    one_line_error(lambda: AttentionConfig(softcap=50.0), "scale")
    one_line_error(lambda: AttentionConfig(scale=None), "scale", "None")
    one_line_error(lambda: AttentionConfig(scale=1.0, causal="perhaps"), "causal", "'perhaps'")
    one_line_error(lambda: AttentionConfig(scale=1.0, cap=50.0), "cap: unknown", "is softcap (got 50.0)")
    one_line_error(lambda: RuntimeSettings(approx=True), "approx: unknown; the closest known field is softcap_approx (")
    one_line_error(lambda: AttentionConfig(scale=-1.0, window=0), "scale", "-1.0", "window", "0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0),
        ("num_kv_heads", True),
        ("num_kv_heads", 3),
        ("num_head", 8),
        ("head_dim", -64),
        ("seq_lens", (128, 0)),
        ("dtype", "float64"),
        ("config", None),
    ],
)
def test_bad_requests(name: str, value: Any) -> None:
    fields = {"config": AttentionConfig(scale=0.1), "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    assert PrewarmRequest(**fields).dtype == "bfloat16"
    one_line_error(lambda: PrewarmRequest(**{**fields, name: value}), name)
    one_line_error(lambda: PrewarmRequest(**fields).model_copy(update={name: value}), name)


def one_line_error(make: Any, *words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        make()
    text = str(raised.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTCAP_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SOFTCAP_CACHE_SIZE_LIMIT", "3GB")
    monkeypatch.setenv("SOFTCAP_JIT", "forbid")
    monkeypatch.setenv("SOFTCAP_BUILD", "background")
    monkeypatch.setenv("SOFTCAP_ENGINE", "blocked")
    monkeypatch.setenv("SOFTCAP_APPROX", "1")
    settings = RuntimeSettings()
    assert settings.cache_dir == tmp_path
    assert settings.softcap_approx
    assert settings.cache_size_limit == 3 * 10**9
    assert (settings.jit, settings.build, settings.engine) == ("forbid", "background", "blocked")
    # What is given wins.
    assert RuntimeSettings(jit="warn", engine="eager").engine == "eager"


@pytest.mark.parametrize(
    ("name", "value"),
    [("ENGINE", "fast"), ("JIT", "maybe"), ("BUILD", "later"), ("CACHE_SIZE_LIMIT", "0"), ("CACHE_SIZE_LIMIT", "much")],
)
def test_bad_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    one_line_error(lambda: RuntimeSettings(**{name.lower(): value}), name.lower(), value)
    monkeypatch.setenv(f"SOFTCAP_{name}", value)
    one_line_error(RuntimeSettings, f"environment variable SOFTCAP_{name}: ", repr(value))
    # What is given is told by its own name, also while a variable is wrong.
    one_line_error(lambda: RuntimeSettings(jit="no", build="no", engine="no"), " jit: ", " build: ", " engine: ")


@pytest.mark.parametrize(
    ("name", "value"), [("cache_size_limit", True), ("cache_dir", "a\0b"), ("cache_key_file", "\0")]
)
def test_settings_of_other_kinds(name: str, value: Any) -> None:
    one_line_error(lambda: RuntimeSettings(**{name: value}), name, repr(value), "expected a")


def test_bad_softcap_approx(monkeypatch: pytest.MonkeyPatch) -> None:
    one_line_error(lambda: RuntimeSettings(softcap_approx="maybe"), "softcap_approx", "maybe")
    monkeypatch.setenv("SOFTCAP_APPROX", "maybe")
    one_line_error(RuntimeSettings, "environment variable SOFTCAP_APPROX: ", "'maybe'")


def test_unknown_variables_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "softcap_runtime")  # a command run in this process may have set another
    for name in ("SOFTCAP_CACHEDIR", "Softcap_Jitt", "SOFTCAP_CACHE_DIR", "softcap_engine", "SOFTCAP_APPROX"):
        monkeypatch.setenv(name, "")
    for name in ("SOFTCAP_PUBLIC_TORCH_ONLY", "SOFTCAP_TEST_SEED", "_SOFTCAP_RUNTIME_COMPLETE"):
        monkeypatch.setenv(name, "")
    warn_of_unknown_variables.cache_clear()
    for _ in range(2):
        Supply(RuntimeSettings())
    assert caplog.messages == [
        "environment variable SOFTCAP_CACHEDIR: unknown, ignored; the closest known one is SOFTCAP_CACHE_DIR",
        "environment variable Softcap_Jitt: unknown, ignored; the closest known one is SOFTCAP_JIT",
    ]


@pytest.mark.parametrize("name", ["CACHE_DIR", "CACHE_KEY_FILE", "CACHE_SIZE_LIMIT", "JIT", "APPROX"])
def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(f"SOFTCAP_{name}", raising=False)
    default = RuntimeSettings()
    monkeypatch.setenv(f"SOFTCAP_{name}", "")
    assert RuntimeSettings() == default


@pytest.mark.parametrize("name", ["cache_dir", "cache_key_file"])
def test_paths_of_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(RuntimeSettings(**{name: Path("~/here")}), name) == tmp_path / "here"
    monkeypatch.setenv(f"SOFTCAP_{name.upper()}", "~/there")
    assert getattr(RuntimeSettings(), name) == tmp_path / "there"
    one_line_error(lambda: RuntimeSettings(**{name: "~no such user/x"}), name, "~no such user")


def test_default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE_DIR", "CACHE_SIZE_LIMIT", "CACHE_KEY_FILE", "JIT", "BUILD", "ENGINE", "APPROX"):
        monkeypatch.delenv(f"SOFTCAP_{name}", raising=False)
    settings = RuntimeSettings()
    assert (settings.jit, settings.build, settings.engine) == ("allow", "block", "auto")
    assert not settings.softcap_approx
    assert (settings.cache_size_limit, settings.cache_key_file) == (2 * 2**30, None)
    assert settings.cache_dir == default_cache_dir()
    assert default_cache_dir().name in ("cache", "softcap_runtime")


def test_from_gemma2() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.Gemma2Config(num_hidden_layers=4, query_pre_attn_scalar=144, sliding_window=77)
    assert [AttentionConfig.from_hf(model, layer).window for layer in range(4)] == [77, None, 77, None]
    for layer in (None, 1):
        config = AttentionConfig.from_hf(model, layer)
        assert config == AttentionConfig(softcap=50.0, scale=144**-0.5)
    for layer in (-1, 4):
        one_line_error(lambda layer=layer: AttentionConfig.from_hf(model, layer), "layer_idx", str(layer))


def test_from_other_models() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.Gemma3TextConfig(num_hidden_layers=6, sliding_window=512)
    found = [AttentionConfig.from_hf(model, layer) for layer in range(6)]
    assert [config.window for config in found] == [
        512 if kind == "sliding_attention" else None for kind in model.layer_types
    ]
    assert {config.window for config in found} == {512, None}
    assert {config.softcap for config in found} == {None}
    assert found[0].scale == model.query_pre_attn_scalar**-0.5
    # The text part of a model of text and images; a model without any of the fields of Gemma's.
    assert AttentionConfig.from_hf(transformers.Gemma3Config(text_config=model), 0) == found[0]
    llama = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4)
    assert AttentionConfig.from_hf(llama) == AttentionConfig(scale=128**-0.5)
    mistral = transformers.MistralConfig(sliding_window=99, head_dim=64)
    assert AttentionConfig.from_hf(mistral).window == 99
    assert hf_head_dim(mistral) == 64


def test_from_models_that_look_both_ways() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.Gemma3TextConfig(), "use_bidirectional_attention"):
        pytest.skip("this transformers has no such models")
    model = transformers.Gemma3TextConfig(use_bidirectional_attention=True, sliding_window=512, num_hidden_layers=6)
    found = [AttentionConfig.from_hf(model, layer) for layer in (0, 5)]
    # abs(i - j) < sliding_window, which the config halves as it is made.
    assert [(config.window, config.causal) for config in found] == [(model.sliding_window, False), (None, False)]
    fields = {"head_dim": 64, "sliding_window": 9, "layer_types": ["sliding_attention"]}
    for more, window, causal in (
        ({"is_causal": False}, 10, False),  # abs(i - j) <= sliding_window
        ({"is_causal": True, "use_bidirectional_attention": None}, 9, True),
        ({"use_bidirectional_attention": "all"}, 9, False),
        ({"use_bidirectional_attention": True, "model_type": "gemma2"}, 9, True),  # of PaliGemma 2: a prefix of a call
        ({"use_bidirectional_attention": "vision"}, 9, True),  # images alone, which are spans of a call
    ):
        config = AttentionConfig.from_hf(SimpleNamespace(**fields, **more))
        assert (config.window, config.causal) == (window, causal)


def test_from_any_object() -> None:
    assert AttentionConfig.from_hf(SimpleNamespace(head_dim=64)) == AttentionConfig(scale=0.125)
    only_sliding = SimpleNamespace(head_dim=64, sliding_window=9, layer_types=["sliding_attention"] * 2)
    assert AttentionConfig.from_hf(only_sliding).window == 9
    switched_off = SimpleNamespace(head_dim=64, sliding_window=9, use_sliding_window=False)
    assert AttentionConfig.from_hf(switched_off).window is None
    one_line_error(lambda: AttentionConfig.from_hf(SimpleNamespace()), "query_pre_attn_scalar")
    one_line_error(
        lambda: AttentionConfig.from_hf(SimpleNamespace(head_dim=64, attn_logit_softcapping=-1.0)), "softcap", "-1.0"
    )


@pytest.mark.parametrize(
    ("fields", "windows", "whole"),
    [
        ({"model_type": "gemma2"}, [9, None, 9, None, 9, None], None),
        ({"sliding_window_pattern": 3}, [9, 9, None, 9, 9, None], None),
        ({"sliding_window_pattern": 1}, [None] * 6, None),
        ({"model_type": "mistral"}, [9] * 6, 9),
        ({"model_type": "gemma2", "layer_types": ["sliding_attention"] * 6}, [9] * 6, 9),
    ],
)
def test_models_from_before_layer_types(fields: dict[str, Any], windows: list[int | None], whole: int | None) -> None:
    """Gemma-2's config.json holds no kinds of layers, and transformers before 4.53 gives its config none."""
    model = SimpleNamespace(head_dim=64, sliding_window=9, num_hidden_layers=6, **fields)
    assert [AttentionConfig.from_hf(model, layer).window for layer in range(6)] == windows
    assert AttentionConfig.from_hf(model).window == whole


@pytest.mark.parametrize(
    ("fields", "layer", "words"),
    [
        ({"sliding_window_pattern": "LLLG", "sliding_window": 9}, 0, "sliding_window_pattern: 'LLLG'"),
        ({"query_pre_attn_scalar": 0}, None, "query_pre_attn_scalar: 0"),
        ({"query_pre_attn_scalar": -256}, None, "query_pre_attn_scalar: -256"),
        ({"query_pre_attn_scalar": "abc"}, None, "query_pre_attn_scalar: 'abc'"),
        ({"query_pre_attn_scalar": True}, None, "query_pre_attn_scalar: True"),
        ({"attn_logit_softcapping": "50"}, None, "attn_logit_softcapping: '50'"),
        ({"head_dim": 0}, None, "head_dim: 0"),
        ({"head_dim": "x"}, None, "head_dim: 'x'"),
        ({"head_dim": None, "hidden_size": 64, "num_attention_heads": 0}, None, "num_attention_heads: 0"),
        ({"head_dim": None, "hidden_size": 0, "num_attention_heads": 4}, None, "hidden_size: 0"),
        ({"head_dim": None, "hidden_size": 4, "num_attention_heads": 8}, None, "hidden_size: 4"),
        ({"sliding_window": "x"}, None, "sliding_window: 'x'"),
        ({"sliding_window": 0}, None, "sliding_window: 0"),
        ({}, "0", "layer_idx: '0'"),
        ({}, True, "layer_idx: True"),
        ({}, -1, "layer_idx: -1"),
        ({"num_hidden_layers": 4}, 4, "layer_idx: 4, expected at least 0 and less than the model's 4 layers"),
        ({"layer_types": ["full_attention"] * 2}, 2, "layer_idx: 2"),
        ({"num_hidden_layers": "4"}, 0, "num_hidden_layers: '4'"),
        ({"layer_types": "full_attention"}, 0, "layer_types: 'full_attention'"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, 1, "layer_types[1]: 'chunked_attention'"),
        ({"layer_types": ["linear_attention"], "sliding_window": 9}, 0, "layer_types[0]: 'linear_attention'"),
    ],
)
def test_odd_fields_of_a_model(fields: dict[str, Any], layer: Any, words: str) -> None:
    model = SimpleNamespace(**{"head_dim": 64, **fields})
    one_line_error(lambda: AttentionConfig.from_hf(model, layer), words, "expected")


def test_other_layers_of_a_model_with_odd_kinds() -> None:
    kinds = ["full_attention", "chunked_attention", "sliding_attention"]
    model = SimpleNamespace(head_dim=64, sliding_window=9, layer_types=kinds)
    assert [AttentionConfig.from_hf(model, layer).window for layer in (None, 0, 2)] == [None, None, 9]
