"""Ranks compare what they are about to do before a collective, which would else hang or mix up their data."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def digest(fact: object) -> int:
    """A 63-bit hash of ``repr(fact)``, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(fact).encode()).digest()[:8], "little") >> 1


def digest_of(x: Tensor) -> int:
    """A 63-bit hash of an integer tensor's shape and contents: of the sum of its weighted entries."""
    flat = x.reshape(-1).to(torch.int64)
    weights = torch.arange(1, flat.shape[0] + 1) * 0x5851F42D4C957F2D  # wraps around
    return digest((tuple(x.shape), int(((flat + 1) * (weights ^ (weights >> 29))).sum())))


def agree(what: str, mesh: DeviceMesh, facts: dict[str, int], error: Exception | None = None) -> None:
    """Gather what every rank is about to do; returns if all are about to do the same.

    ``facts``: a digest of each part, with the same names on all ranks. A rank with an ``error`` raises it, and the
    others raise RuntimeError naming that rank. Raises RuntimeError naming the part and the ranks that differ from rank
    0.
    """
    own = torch.tensor([int(error is not None), *facts.values()], dtype=torch.int64, device=mesh.device_type)
    gathered = own.new_empty(mesh.size() * own.shape[0])
    # Renamed in torch 2.13, which warns of the old name.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(gathered, own, group=mesh.get_group())
    table = gathered.view(mesh.size(), -1).tolist()
    if error is not None:
        raise error
    failed = [rank for rank, row in enumerate(table) if row[0]]
    if failed:
        raise RuntimeError(
            f"{what}: failed on rank {_listed(failed)} of {mesh}, whose error says why; nothing was sent"
        )
    for at, name in enumerate(facts, start=1):
        apart = [rank for rank, row in enumerate(table) if row[at] != table[0][at]]
        if apart:
            raise RuntimeError(
                f"{what}: {name} of rank {_listed(apart)} differs from that of rank 0 of {mesh}, expected the same on "
                "all; nothing was sent"
            )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
