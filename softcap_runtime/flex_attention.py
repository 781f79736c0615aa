"""The documented functions of the Flex Attention system, with the names and signatures that unsloth users know.

The names come from the page "Implementation: Flex_Attention" of Unsloth's wiki. These functions and
``Runtime.attention`` share one dispatch. A sliding window of w shows w keys including the query's own
(``0 <= i - j < w``), as in unsloth 2026.10.9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from softcap_runtime.checks import Cap, constant_in_graph
from softcap_runtime.compat import torch_features
from softcap_runtime.config import EngineName, check_positive
from softcap_runtime.engines.general import attend_block_mask, attend_elements, elements_of
from softcap_runtime.errors import EngineUnavailable, KernelNotPrewarmed
from softcap_runtime.masks.block_mask import block_mask, form_of, intervals_of
from softcap_runtime.masks.elements import check_rows_and_heads, read_elements
from softcap_runtime.masks.intervals import RowIntervals, band, combined, dense, row_intervals
from softcap_runtime.ops.operator import checked_inputs
from softcap_runtime.runtime import Runtime

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

HAS_FLEX_ATTENTION: bool = torch_features.FLEX_ATTENTION
"""Whether this torch has ``flex_attention`` (2.5 and newer). Without it the masks below are dense tensors."""


def slow_attention_softcapping(
    Q: Tensor, K: Tensor, V: Tensor, causal_mask: Any, self: Any, bsz: int, q_len: int
) -> Tensor:
    """Attention with logit softcapping: ``[bsz, Sq, n_heads * head_dim]``, by the warm kernel.

    ``Q`` ``[bsz, n_heads, Sq, head_dim]``, ``K`` and ``V`` ``[bsz, n_kv_heads, Skv, head_dim]``; query row i stands
    at key position ``Skv - Sq + i``. ``q_len`` is Sq or, as unsloth's layer passes it, Skv.
    ``causal_mask``: a BlockMask of the functions below (of any length: it is remade for these), another BlockMask
    (compiled by flex, for these lengths only), a bool mask (True: visible) or an additive float mask ``[Sq, Skv]`` to
    ``[B, H, Sq, Skv]``, or None for plain causal. Of a tensor mask with more than Sq rows, the rows ``Skv - Sq`` to
    ``Skv`` are read, and of its keys the first Skv: one mask of the longest length serves every step.
    ``self``: any object whose ``config`` has ``attn_logit_softcapping`` (None: no cap) and
    ``query_pre_attn_scalar`` (without it the scale is ``head_dim ** -0.5``).

    Raises ValueError or TypeError for arguments that do not fit, and as ``Runtime.attention`` does.
    """
    return attend(Q, K, V, causal_mask, self, bsz, q_len)


def slow_inference_attention_softcapping(
    Q: Tensor, K: Tensor, V: Tensor, causal_mask: Any, self: Any, bsz: int, q_len: int
) -> Tensor:
    """``slow_attention_softcapping`` by the eager engine, which never compiles anything and needs no kernel."""
    return attend(Q, K, V, causal_mask, self, bsz, q_len, "eager")


def create_flex_attention_causal_mask(max_seq_length: int = 8192) -> BlockMask | Tensor:
    """The causal mask over ``max_seq_length`` tokens: a BlockMask, made in microseconds.

    On a torch without flex a dense bool mask ``[S, S]``. Raises ValueError for a length below 1.
    """
    return _create(max_seq_length, None)


def create_flex_attention_sliding_window_mask(
    max_seq_length: int = 8192, sliding_window: int = 4096
) -> BlockMask | Tensor:
    """The causal mask with ``sliding_window`` visible keys, including the query's own: ``0 <= i - j < w``.

    On a torch without flex a dense bool mask ``[S, S]``. Raises ValueError for a length or window below 1.
    """
    return _create(max_seq_length, _count("sliding_window", sliding_window))


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or value < 1:  # type: ignore[operator]
        raise ValueError(f"{name}: {value!r}, expected an int of at least 1")
    return value if isinstance(value, int) else value.__index__()


def _create(length: int, window: int | None) -> BlockMask | Tensor:
    length = _count("max_seq_length", length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = band(length, length, causal=True, window=window)
    return block_mask(mask, device) if HAS_FLEX_ATTENTION else dense(mask, device)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    layer: Any,
    bsz: int,
    q_len: int,
    engine: EngineName | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The common part of both functions; ``engine``: None for that of the settings.

    ``documents`` ``[B or 1, Skv]``: the document ids of packed sequences, which ``mask`` is combined with.
    """
    q, k, v = checked_inputs(q, k, v)
    lengths = q.shape[2], k.shape[2]
    if bsz != q.shape[0]:
        raise ValueError(f"bsz: {bsz}, expected Q's batch of {q.shape[0]}")
    if q_len not in lengths:
        raise ValueError(f"q_len: {q_len}, expected Q's {lengths[0]} rows or K's {lengths[1]} keys")
    config = _layer(layer, q.shape[3])
    runtime = Runtime.get()
    found = _intervals(mask, q, *lengths)
    if documents is not None:
        found = _within_documents(found, documents, *lengths)
    if isinstance(found, RowIntervals):
        out = runtime.attend_checked(q, k, v, config, found, engine)
    elif isinstance(found, Tensor):
        out = attend_elements(q, k, v, found, scale=config.scale, softcap=config.softcap)
    elif engine == "eager":
        out = attend_elements(q, k, v, elements_of(found, q, k), scale=config.scale, softcap=config.softcap)
    else:
        _check_foreign(q, k, v, runtime)
        out = attend_block_mask(q, k, v, found, scale=config.scale, softcap=config.softcap)
    return out.transpose(1, 2).flatten(2)


def _layer(layer: Any, head_dim: int) -> Cap:
    config = getattr(layer, "config", None)
    if config is None:
        raise ValueError(f"self: {type(layer).__name__} has no config; pass the attention layer")
    if isinstance(config, dict):
        raise TypeError(
            "self.config: dict, expected an object with attributes; pass SimpleNamespace(**config) or the model's"
        )
    softcap = constant_in_graph(getattr(config, "attn_logit_softcapping", None))
    scalar = constant_in_graph(getattr(config, "query_pre_attn_scalar", None))
    check_positive("self.config.attn_logit_softcapping", softcap)
    check_positive("self.config.query_pre_attn_scalar", scalar)
    scale = float(head_dim if scalar is None else scalar) ** -0.5
    return Cap(None if softcap is None else float(softcap), scale)


def _intervals(mask: Any, q: Tensor, q_len: int, kv_len: int) -> RowIntervals | Tensor | BlockMask:
    """The mask as row intervals; unchanged if it is a tensor or a caller's BlockMask that does not have that form."""
    if mask is None:
        return _band(q_len, kv_len, True, None)
    if isinstance(mask, Tensor):
        return read_elements(mask, q, kv_len, "causal_mask")
    if not hasattr(mask, "mask_mod"):
        raise TypeError(
            f"causal_mask: {type(mask).__name__}, expected a BlockMask, a tensor or None; see "
            "create_flex_attention_causal_mask"
        )
    check_rows_and_heads(mask.shape, q, "causal_mask")
    form = form_of(mask)
    if form is not None:
        return _band(q_len, kv_len, *form)
    ours = intervals_of(mask)
    if ours is None and not torch_features.MASK_LENGTHS:
        raise EngineUnavailable(
            f"causal_mask: a BlockMask of your own needs torch 2.6 or newer, this is {torch.__version__}; pass a "
            "dense mask"
        )
    lengths = tuple(mask.shape[-2:]) if ours is None else (ours.q_len, ours.kv_len)
    if lengths != (q_len, kv_len):
        raise ValueError(
            f"causal_mask: a BlockMask for {lengths}, expected {(q_len, kv_len)}; make it for these "
            "lengths, or use create_flex_attention_causal_mask, which fits any"
        )
    return mask if ours is None else ours


def _within_documents(
    mask: RowIntervals | Tensor | BlockMask, documents: Tensor, q_len: int, kv_len: int
) -> RowIntervals:
    if not isinstance(mask, RowIntervals):
        raise ValueError(
            f"causal_mask: {type(mask).__name__} that is no row interval, expected causal, window or padding beside "
            "packed sequences; use create_flex_attention_causal_mask"
        )
    own = row_intervals(q_len, kv_len, causal=False, window=None, document_ids=documents)
    return combined(mask, own, documents.device)


def _band(q_len: int, kv_len: int, causal: bool, window: int | None) -> RowIntervals:
    if causal and q_len > kv_len:
        raise ValueError(f"Q: {q_len} rows over {kv_len} keys, expected no more rows than keys")
    return band(q_len, kv_len, causal=causal, window=window)


def _check_foreign(q: Tensor, k: Tensor, v: Tensor, runtime: Runtime) -> None:
    if runtime.settings.jit == "forbid":
        raise KernelNotPrewarmed(
            "causal_mask: a BlockMask of your own is compiled in each process and cannot be prewarmed; pass row "
            "intervals or a dense mask, or set SOFTCAP_JIT=allow"
        )
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise EngineUnavailable(
            "causal_mask: flex has no backward on the CPU for a BlockMask of your own; pass a dense mask to train"
        )
