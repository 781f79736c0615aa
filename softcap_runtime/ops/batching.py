"""The operator under ``torch.func.vmap``: samples become batch rows, so that one call serves them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register_rules(library: torch.library.Library) -> None:
    """Register the rules of both operators. torch 2.4 has no such rules: it runs sample by sample, and warns."""
    register = getattr(torch.library, "register_vmap", None)
    if register is None:
        return
    register("softcap_runtime::attention", _attention, lib=library)
    register("softcap_runtime::attention_backward", _attention_backward, lib=library)


def _attention(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    out, lse = torch.ops.softcap_runtime.attention(*_joined(info.batch_size, in_dims, inputs, 3))
    out = _split(out, info.batch_size)
    train = inputs[10]  # else there is no logsumexp
    return ((out, _split(lse, info.batch_size)), (0, 0)) if train else ((out, lse), (0, None))


def _attention_backward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    grads = torch.ops.softcap_runtime.attention_backward(*_joined(info.batch_size, in_dims, inputs, 6))
    return tuple(_split(grad, info.batch_size) for grad in grads), (0, 0, 0)


def _joined(samples: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...], count: int) -> list[Any]:
    """An operator's inputs with samples as batch rows: ``count`` tensors ``[B, ...]``, both edges, numbers, ``kept``.

    Edges and ``kept`` of ``[1, S]`` that all samples share serve any batch, and stay as they are.
    """
    tensors = [_join(x, dim, samples) for x, dim in zip(inputs[:count], in_dims, strict=False)]
    places = [count, count + 1]
    if isinstance(inputs[-1], Tensor):  # kept; else the last is a number, or None
        places.append(len(inputs) - 1)
    made = [*tensors, *inputs[count:]]
    shared = inputs[count] is None or all(in_dims[at] is None and inputs[at].shape[0] == 1 for at in places)
    if not shared:
        batch = tensors[0].shape[0] // samples
        for at in places:
            made[at] = _join(inputs[at], in_dims[at], samples, batch)
    return made


def _join(x: Tensor, dim: int | None, samples: int, batch: int = -1) -> Tensor:
    """``[samples * batch, ...]`` from a tensor with its samples in ``dim``; None: the same tensor for all samples."""
    each = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
    return each.expand(-1, batch, *each.shape[2:]).flatten(0, 1)


def _split(x: Tensor, samples: int) -> Tensor:
    return x.unflatten(0, (samples, -1))
