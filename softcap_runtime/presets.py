"""Prewarm requests for known models, and for any model with a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from softcap_runtime.config import AttentionConfig, DtypeName, PrewarmRequest, hf_count, hf_head_dim

Kinds = tuple[AttentionConfig, ...]


class Shape(NamedTuple):
    """A model's attention layers of the same sizes: their distinct configs, and the sizes."""

    configs: Kinds
    num_heads: int
    num_kv_heads: int
    head_dim: int


def _kinds(softcap: float, scale: float, windows: Sequence[int | None], causal: bool = True) -> Kinds:
    return tuple(AttentionConfig(softcap=softcap, scale=scale, window=window, causal=causal) for window in windows)


def _gemma2(num_heads: int, num_kv_heads: int, head_dim: int, query_pre_attn_scalar: int) -> tuple[Shape]:
    """Gemma-2: a cap of 50, and a window of 4,096 on every other layer."""
    kinds = _kinds(50.0, float(query_pre_attn_scalar) ** -0.5, (4096, None))
    return (Shape(kinds, num_heads, num_kv_heads, head_dim),)


def _t5gemma(encoder: Sequence[Shape], decoder: Sequence[Shape]) -> tuple[Shape, Shape]:
    """A bidirectional encoder, and a decoder that also attends to all of the encoder's tokens."""
    (first,), (second,) = encoder, decoder
    both_ways = tuple(kind.model_copy(update={"causal": False}) for kind in first.configs)
    across = second.configs[-1].model_copy(update={"causal": False, "window": None})
    return first._replace(configs=both_ways), second._replace(configs=(*second.configs, across))


_2B, _9B, _27B = _gemma2(8, 4, 256, 256), _gemma2(16, 8, 256, 256), _gemma2(32, 16, 128, 144)
# Numbers from the published configs. The text models of PaliGemma 2 and the encoders and decoders of T5Gemma have the
# shapes of Gemma-2. Grok-1: run.py and model.py of xai-org/grok-1 (``attn_output_multiplier``, ``max_attn_val``).
PRESETS: dict[str, tuple[Shape, ...]] = {
    "gemma2-2b": _2B,
    "gemma2-9b": _9B,
    "gemma2-27b": _27B,
    "paligemma2-3b": _2B,
    "paligemma2-10b": _9B,
    "paligemma2-28b": _27B,
    "t5gemma-2b-2b": _t5gemma(_2B, _2B),
    "t5gemma-9b-2b": _t5gemma(_9B, _2B),
    "t5gemma-9b-9b": _t5gemma(_9B, _9B),
    "videoprism-base": (Shape(_kinds(50.0, 64**-0.5, (None,), causal=False), 12, 12, 64),),
    "grok-1": (Shape(_kinds(30.0, 128**-0.5, (None,)), 48, 8, 128),),
}


def requests_for(
    source: str | Path,
    *,
    seq_lens: Sequence[int] = (),
    dtype: DtypeName = "bfloat16",
    device: str = "cpu",
    train: bool = False,
    paged: bool = False,
) -> list[PrewarmRequest]:
    """The prewarm requests of a model, one per distinct kind of attention layer.

    ``source``: a name in ``PRESETS``, or the path of a Hugging Face ``config.json`` or its folder. An encoder-decoder
    model gives the requests of both, and of the attention between them. Raises ValueError if it is neither or lacks a
    field, OSError if it cannot be read.
    """
    shapes = PRESETS.get(str(source)) or _read_shapes(Path(source))
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
            paged=paged,
        )
        for shape in shapes
        for config in shape.configs
    ]


def _read_shapes(path: Path) -> tuple[Shape, ...]:
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(
            f"model: {str(path)!r} does not exist; expected {', '.join(PRESETS)}, a config.json, or its folder"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"model: {str(path)!r} is not JSON ({error}); expected a config.json") from None
    document = document if isinstance(document, dict) else {"text_config": None}
    parts: list[Any] = [document.get(name) for name in ("encoder", "decoder")]
    if not all(isinstance(part, dict) for part in parts):
        parts = [document.get("text_config", document)]
    if not isinstance(parts[0], dict):
        raise ValueError(f"model: {str(path)!r} holds no object; expected a Hugging Face config.json")
    try:
        shapes = [_shape(SimpleNamespace(**part)) for part in parts]
        return (shapes[0],) if len(shapes) == 1 else _t5gemma(shapes[:1], shapes[1:])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model: {str(path)!r} cannot be used: {error}") from None


def _shape(model: Any) -> Shape:
    heads = hf_count(model, "num_attention_heads")
    layers = hf_count(model, "num_hidden_layers")
    kinds = getattr(model, "layer_types", None)
    # Layers of linear attention need none of our kernels.
    ours = [at for at in range(layers) if kinds is None or kinds[at : at + 1] != ["linear_attention"]]
    distinct = dict.fromkeys(AttentionConfig.from_hf(model, layer_idx=at) for at in ours or range(layers))
    grouped = getattr(model, "num_key_value_heads", None) is not None
    kv_heads = hf_count(model, "num_key_value_heads") if grouped else heads
    return Shape(tuple(distinct), heads, kv_heads, hf_head_dim(model))
