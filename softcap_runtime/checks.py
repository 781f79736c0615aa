"""Checks of a call before anything runs: one line that names the argument, its value and what was expected."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from softcap_runtime.compat.torch_private import constant_in_graphs
from softcap_runtime.config import AttentionConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Ends errors about shapes that would fit in this layout.
OTHER_LAYOUT = "if q, k and v are laid out [B, S, H, D], pass the transpose(1, 2) of each"

T = TypeVar("T")


class Cap(NamedTuple):
    """What a layer does to its logits: all that a call needs of a config besides its mask."""

    softcap: float | None
    scale: float


# What ``Runtime.attend`` reads of a config.
Capped = AttentionConfig | Cap


def constant_in_graph(number: T) -> T:
    """``number``, made a guarded constant of the graph while dynamo traces, as everything in a set is.

    With dynamic=True dynamo makes a float a symbol of the first graph that uses it, and fails in the next if that is
    the body of a checkpoint (torch 2.13). Nor does the operator take symbols.
    """
    return next(iter({number})) if torch.compiler.is_dynamo_compiling() else number


def check_type(name: str, value: Any, kind: type, expected: str) -> None:
    """Raise TypeError unless ``value`` is a ``kind``; ``expected`` describes one, and how to make it."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {type(value).__name__}, expected {expected}")


def check_config(config: Any) -> None:
    """Raise TypeError for what is no AttentionConfig."""
    how = "make one with AttentionConfig(scale=...) or AttentionConfig.from_hf(model.config)"
    check_type("config", config, AttentionConfig, f"an AttentionConfig; {how}")


def check_no_context_parallel() -> None:
    """Raise RuntimeError inside torch's ``context_parallel``: it shards sequences that only its own attention rejoins.

    It is recognized by its replacement for ``scaled_dot_product_attention``.
    """
    if _in_context_parallel():
        raise RuntimeError(
            "context_parallel of torch: replaces scaled_dot_product_attention alone, and this call would see a part of "
            "the sequence; use softcap_runtime.distributed.context_mask and Runtime.context_attention in place of it"
        )


@constant_in_graphs
def _in_context_parallel() -> bool:
    home = getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", None)
    return home is not None and home.startswith("torch.distributed.tensor")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError for what is no float tensor, ValueError for shapes, dtypes or devices that do not fit.

    ``q`` ``[B, Hq, Sq, D]``, ``k`` and ``v`` ``[B, Hkv, Skv, D]``, Hq a multiple of Hkv. B, Sq and Skv may be 0.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__}, expected a tensor [B, H, S, D]")
        if tensor.is_nested or tensor.layout != torch.strided:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name}: {kind}, expected a dense tensor [B, H, S, D]; pad it")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected 4 dimensions [B, H, S, D]")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: {tensor.dtype}, expected float32, bfloat16, float16 or float64")
        if tensor.shape[1] == 0 or tensor.shape[3] == 0:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, expected at least one head and a head_dim of at least 1; "
                "correct what reshapes it to [B, H, S, D]"
            )
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}.dtype: {tensor.dtype}, expected q's {q.dtype}; cast one of them")
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, expected q's {q.device}; move one of them")
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: batch {tensor.shape[0]}, expected q's {q.shape[0]}")
        if tensor.shape[3] != q.shape[3]:
            raise ValueError(f"{name}: head_dim {tensor.shape[3]}, expected q's {q.shape[3]}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, expected k's {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        fits = 0 < k.shape[2] <= q.shape[2] and q.shape[2] % k.shape[2] == 0 and q.shape[1] <= k.shape[1]
        hint = f"; {OTHER_LAYOUT}" if fits else ""
        raise ValueError(f"q: {q.shape[1]} heads, expected a multiple of the {k.shape[1]} key heads{hint}")


def device_of(name: str) -> torch.device:
    """The torch device of a request, with the index of a CUDA device.

    Raises ValueError when the name is none, or the device is not there.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise ValueError(f"device: {name!r}, expected a torch device such as 'cpu' or 'cuda:0'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {name!r}, expected cpu or cuda")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(f"device: {name!r}, but this process sees {count} CUDA devices; use 'cpu' or run there")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
