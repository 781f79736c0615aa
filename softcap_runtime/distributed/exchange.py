"""Exchanges between ranks that graphs can hold, by ``all_to_all_single`` of torch's functional collectives.

Their gradients return the same way. An exchange is waited for where its result is first used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

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
    return torch.cat([part.transpose(1, 2) for part in parts], 3 - dim).transpose(1, 2)
