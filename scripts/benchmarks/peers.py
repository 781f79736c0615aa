"""The peers: what people use today for softcapped attention, each written from its documented formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings, reference
from softcap_runtime.masks import band, dense

SOFTCAP = 50.0


def inputs(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh random q, k, v as projections make them: ``[B, S, H, D]`` in memory, seen as ``[B, H, S, D]``."""
    made = [
        torch.randn(batch, length, count, head_dim).to(dtype).transpose(1, 2) for count in (heads, kv_heads, kv_heads)
    ]
    return tuple(x.detach().requires_grad_(grad) for x in made)  # type: ignore[return-value]


def causal(length: int, window: int | None = None) -> Tensor:
    """The dense mask ``[1, S, S]``, True where visible."""
    return dense(band(length, length, causal=True, window=window), "cpu")


def exact(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """The reference in float64."""
    mask = causal(q.shape[2], window)
    wide = [x.detach().double() for x in (q, k, v)]
    return reference.attention(*wide, mask, scale=q.shape[3] ** -0.5, softcap=SOFTCAP)[0]


def error(out: Tensor, true: Tensor) -> float:
    """Relative Frobenius error."""
    return float((out.double() - true).norm() / true.norm())


@functools.cache
def runtime(engine: str = "auto") -> Runtime:
    """One runtime an engine, on the default cache."""
    return Runtime(RuntimeSettings(engine=engine))  # type: ignore[arg-type]


def ours(
    q: Tensor, k: Tensor, v: Tensor, engine: str = "auto", window: int | None = None, softcap: float | None = SOFTCAP
) -> Tensor:
    """This package."""
    config = AttentionConfig(softcap=softcap, scale=q.shape[3] ** -0.5, window=window)
    return runtime(engine).attention(q, k, v, config)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Hugging Face's eager formula: products in the input dtype, softmax in float32, an additive mask.

    As there, the output lies ``[B, S, H, D]`` in memory.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = torch.matmul(q, k.transpose(2, 3)) * q.shape[3] ** -0.5
    logits = torch.tanh(logits / SOFTCAP) * SOFTCAP + mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous().transpose(1, 2)


def additive(length: int, dtype: torch.dtype) -> Tensor:
    """The mask that eager adds: 0 or the dtype's lowest number."""
    return torch.zeros(1, 1, length, length, dtype=dtype).masked_fill(~causal(length), torch.finfo(dtype).min)


@functools.cache
def compiled_dense() -> Callable[..., Tensor]:
    """The dense path under ``torch.compile``, as unsloth's fallback for torch without flex."""
    return torch.compile(eager, dynamic=True, fullgraph=True)


@functools.cache
def compiled_flex() -> Any:
    """Stock ``torch.compile(flex_attention)``, with torch.tanh as score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def tanh_softcap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The documented score_mod."""
    return SOFTCAP * torch.tanh(score / SOFTCAP)


@functools.cache
def stock_block_mask(length: int) -> Any:
    """The mask that stock flex wants."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")


def stock_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stock compiled flex on a causal mask; without one for a single new token, which sees its whole cache."""
    mask = stock_block_mask(q.shape[2]) if q.shape[2] > 1 else None
    out: Tensor = compiled_flex()(
        q, k, v, score_mod=tanh_softcap, block_mask=mask, scale=q.shape[3] ** -0.5, enable_gqa=True
    )
    return out


def products_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The two matrix products of causal blocks of 128 rows and nothing between them: what no engine can beat.

    In the dtype that this CPU multiplies fastest in; its result is no attention.
    """
    batch, heads, length, head_dim = q.shape
    dtype = q.dtype if _has_tiles() else torch.float32
    q, k, v = (x.to(dtype).contiguous().flatten(0, 1) for x in (q, k, v))
    out = torch.empty(batch * heads, length, head_dim, dtype=dtype)
    grouped = (k.shape[0], -1)
    for start in range(0, length, 128):
        end = min(start + 128, length)
        rows = q[:, start:end].reshape(*grouped, head_dim)
        logits = torch.bmm(rows, k[:, :end].mT)
        out[:, start:end] = torch.bmm(logits, v[:, :end]).view(batch * heads, -1, head_dim)
    return out


@functools.cache
def _has_tiles() -> bool:
    """Whether this CPU multiplies bf16 in tiles (AMX); others multiply float32 faster."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
        return "amx_bf16" in info.read(16384)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Uncapped scaled_dot_product_attention: what attention without a softcap costs."""
    causal = q.shape[2] > 1  # its mask is aligned top-left, where a single new token would see one key
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def inference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every engine and every peer on the same inputs, by name; ``mask``: the dense one, as eager code adds it."""
    dense = compiled_dense()
    return {
        "softcap_runtime auto": lambda: ours(q, k, v),
        "softcap_runtime flex": lambda: ours(q, k, v, "flex"),
        "softcap_runtime blocked": lambda: ours(q, k, v, "blocked"),
        "stock compiled flex": lambda: stock_flex(q, k, v),
        "compiled dense": lambda: dense(q, k, v, mask),
        "Hugging Face eager": lambda: eager(q, k, v, mask),
        "SDPA, no softcap": lambda: sdpa(q, k, v),
    }
