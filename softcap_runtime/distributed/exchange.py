"""Exchanges between ranks that graphs can hold, by ``all_to_all_single`` of torch's functional collectives.

Their gradients return the same way. An exchange is waited for where its result is first used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from softcap_runtime.compat.torch_transforms import interpreters_active

Arriving = TypeVar("Arriving")


def exchanged(x: Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> Tensor:
    """Exchange rows between ranks, differentiably; ``received`` and ``sent``: sizes of dimension 0 for each rank."""
    return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, mesh)


def waited(x: Tensor) -> Tensor:
    """Wait for what was sent to this rank. With gradients torch has no public way to do so, and each use of ``x``
    waits."""
    return x if x.requires_grad else collectives.wait_tensor(x)


def in_stages(
    groups: Sequence[tuple[Tensor, Tensor, Tensor]],
    send: Callable[[Tensor, Tensor, Tensor], Arriving],
    compute: Callable[[Tensor, Tensor, Tensor, Arriving], Tensor],
) -> list[Tensor]:
    """The result of each group, computed while the next group is sent."""
    outs, coming = [], send(*groups[0])
    for (q, k, v), after in itertools.zip_longest(groups, groups[1:]):
        here = coming
        if after is not None:
            coming = send(*after)
        outs.append(compute(q, k, v, here))
    return outs


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts concatenated along heads (1) or rows (2), laid out ``[B, S, H, D]`` in memory like a call's output."""
    parts = [part for part in parts if part.shape[dim]]
    if len(parts) == 1:
        return parts[0]
    return cat([part.transpose(1, 2) for part in parts], 3 - dim).transpose(1, 2)


def picked(pieces: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """The pieces, concatenated in ``order`` along their first dimension."""
    return cat([pieces[at] for at in order]) if len(order) != 1 else pieces[order[0]]


def cat(pieces: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``, faster for large pieces of strided tensors: see ``fill``. It waits for those that are on their
    way; differentiable."""
    here = (piece for piece in pieces if not isinstance(piece, collectives.AsyncCollectiveTensor))
    if torch.compiler.is_compiling() or interpreters_active(*here):
        return torch.cat(list(pieces), dim)
    made: Tensor = _Cat.apply(dim, *pieces)  # type: ignore[no-untyped-call]
    return made


class _Cat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *pieces: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [piece.shape[dim] for piece in pieces]
        ctx.strides = [piece.stride() for piece in pieces]
        shape = list(pieces[0].shape)
        shape[dim] = sum(ctx.sizes)
        made = torch.empty(shape, dtype=pieces[0].dtype, device=pieces[0].device)
        fill(made, pieces, dim)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = grad.split(ctx.sizes, ctx.dim)
        if torch.is_grad_enabled():  # a second derivative follows
            return None, *parts
        # In the memory order of the pieces, which are views as a rule: their own derivatives then copy nothing.
        return None, *map(_laid_out, parts, ctx.strides)


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x, its dimensions in the memory order of a tensor with ``strides``; a copy where they are not."""
    order = sorted(range(x.dim()), key=strides.__getitem__, reverse=True)
    ordered = x.permute(order)
    if not ordered.is_contiguous():
        made = torch.empty_like(ordered, memory_format=torch.contiguous_format)
        fill(made, [ordered])
        ordered = made
    return ordered.permute([order.index(dim) for dim in range(x.dim())])


def fill(target: Tensor, pieces: Sequence[Tensor], dim: int = 0) -> None:
    """Write ``pieces`` one after the other along a dimension of ``target``, in words of 16 bytes where they are whole
    ones.

    torch copies strided tensors element by element: bfloat16 at 0.6 TB/s on an H200, which copies 4.
    """
    at = 0
    for piece in pieces:
        size = piece.shape[dim]
        part = target if size == target.shape[dim] else target.narrow(dim, at, size)
        at += size
        if isinstance(piece, collectives.AsyncCollectiveTensor):
            piece = collectives.wait_tensor(piece)
        if _is_of_words(part) and _is_of_words(piece):
            part, piece = part.view(torch.complex128), piece.view(torch.complex128)
        part.copy_(piece)


def _is_of_words(x: Tensor) -> bool:
    """Whether rows of x's last dimension are whole words of 16 bytes, each at a multiple of 16."""
    *steps, last = x.stride()
    whole = math.gcd(x.storage_offset(), x.shape[-1], *steps) * x.element_size() % 16 == 0
    return whole and last == 1 and not (x.is_neg() or x.data_ptr() % 16)
