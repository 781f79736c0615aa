"""What to prewarm for known models, and for any model that comes with a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from softcap_runtime.config import (
    FULL,
    SLIDING,
    AttentionConfig,
    DtypeName,
    PrewarmRequest,
    hf_count,
    hf_head_dim,
)


class Shape(NamedTuple):
    """The attention layers of a model: the distinct kinds of them, and the sizes that they share."""

    configs: tuple[AttentionConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int


def _gemma2(num_heads: int, num_kv_heads: int, head_dim: int, query_pre_attn_scalar: int) -> Shape:
    """Gemma-2: a cap of 50, and a window of 4,096 on every other layer."""
    scale = float(query_pre_attn_scalar) ** -0.5
    kinds = tuple(AttentionConfig(softcap=50.0, scale=scale, window=window) for window in (4096, None))
    return Shape(kinds, num_heads, num_kv_heads, head_dim)


PRESETS: dict[str, Shape] = {
    "gemma2-2b": _gemma2(8, 4, 256, 256),
    "gemma2-9b": _gemma2(16, 8, 256, 256),
    "gemma2-27b": _gemma2(32, 16, 128, 144),
}


def requests_for(
    source: str | Path,
    *,
    seq_lens: Sequence[int] = (),
    dtype: DtypeName = "bfloat16",
    device: str = "cpu",
    train: bool = False,
) -> list[PrewarmRequest]:
    """The prewarm requests of a model, one per distinct kind of attention layer.

    ``source``: a name in ``PRESETS``, or the path of a Hugging Face ``config.json`` or of the folder that holds
    one. Raises ValueError when it is neither or lacks a field, OSError when it cannot be read.
    """
    shape = PRESETS.get(str(source)) or _read_shape(Path(source))
    return [
        PrewarmRequest(
            config=config,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            seq_lens=tuple(seq_lens),
            dtype=dtype,
            device=device,
            train=train,
        )
        for config in shape.configs
    ]


def _read_shape(path: Path) -> Shape:
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(
            f"model: {str(path)!r} does not exist; expected {', '.join(PRESETS)}, a config.json, or its folder"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"model: {str(path)!r} is not JSON ({error}); expected a config.json") from None
    text = document.get("text_config", document) if isinstance(document, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"model: {str(path)!r} holds no object; expected a Hugging Face config.json")
    model = SimpleNamespace(**text)
    try:
        return _shape(model)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model: {str(path)!r} cannot be used: {error}") from None


def _shape(model: Any) -> Shape:
    heads = hf_count(model, "num_attention_heads")
    layers = hf_count(model, "num_hidden_layers")
    if getattr(model, "layer_types", None) is None:
        model.layer_types = _layer_types(model, layers)
    kinds = model.layer_types
    # Layers of linear attention run no kernel of ours.
    ours = [at for at in range(layers) if kinds is None or kinds[at : at + 1] != ["linear_attention"]]
    distinct = dict.fromkeys(AttentionConfig.from_hf(model, layer_idx=at) for at in ours or range(layers))
    grouped = getattr(model, "num_key_value_heads", None) is not None
    kv_heads = hf_count(model, "num_key_value_heads") if grouped else heads
    return Shape(tuple(distinct), heads, kv_heads, hf_head_dim(model))


def _layer_types(model: Any, layers: int) -> list[str] | None:
    """The kinds of layers of a config from before ``layer_types``, by the rules of the models' own code."""
    if getattr(model, "sliding_window_pattern", None) is not None:
        pattern = hf_count(model, "sliding_window_pattern")
    elif getattr(model, "model_type", None) == "gemma2":
        pattern = 2
    else:
        return None
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
