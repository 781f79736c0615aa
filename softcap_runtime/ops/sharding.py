"""The operator on DTensors: sharded by batch or heads, or replicated; a sharded sequence is resharded to heads.

The rules are registered with the first DTensor; until then nothing here imports torch.distributed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.compat.torch_private import constant_in_graphs

_registered = False


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a DTensor; imports nothing."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(x, kind)


def whole(x: Tensor | None) -> Any:
    """A mask argument as a plain tensor; a sharded DTensor is gathered."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[union-attr]


def sharded_inputs(q: Tensor, k: Tensor, v: Tensor, *edges: Tensor | None) -> tuple[Any, ...]:
    """A call's tensors with placements that a rule serves; unchanged if q, k and v are no DTensors.

    A sharded sequence is resharded to heads; plain ``edges`` (lo, hi, kept) count as replicated. Raises ValueError,
    naming the tensor and its placement, for shardings that no rule serves.
    """
    if not (is_dtensor(q) or is_dtensor(k) or is_dtensor(v)):
        return q, k, v, *edges
    check_placements(q, k, v)
    _register_once()
    return *map(_by_heads, (q, k, v)), *[_replicated(edge, q) for edge in edges]


def _by_heads(x: Any) -> Any:
    from torch.distributed.tensor import Shard

    if Shard(2) not in x.placements:
        return x
    return x.redistribute(placements=[Shard(1) if own == Shard(2) else own for own in x.placements])


def _replicated(edge: Tensor | None, q: Any) -> Any:
    if edge is None or is_dtensor(edge):
        return edge
    from torch.distributed.tensor import DTensor, Replicate

    mesh = q.device_mesh
    return DTensor.from_local(edge, mesh, [Replicate()] * mesh.ndim, run_check=False)


def check_placements(q: Any, k: Any, v: Any) -> None:
    """Raise ValueError, naming the tensor and its placement, for DTensors with shardings that no rule serves."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_dtensor(x):
            raise ValueError(f"{name}: a plain tensor beside DTensors, expected q, k and v alike; distribute it")
        if x.device_mesh != q.device_mesh:
            raise ValueError(f"{name}: on {x.device_mesh}, expected q's {q.device_mesh}; redistribute it")
    mesh = q.device_mesh
    ranks, said = 1, ""  # that heads are split over
    for index, placements in enumerate(zip(q.placements, k.placements, v.placements, strict=True)):
        dims: dict[int, str] = {}
        for name, placement in zip("qkv", placements, strict=True):
            if placement.is_shard():
                dims.setdefault(placement.dim % 4, f"{name}: {placement!r} on mesh dimension {_named(mesh, index)}")
        if 3 in dims:
            raise ValueError(
                f"{dims[3]} splits head_dim, expected Shard(0) (the batch), Shard(1) (heads), Shard(2) (the sequence) "
                "or Replicate(); redistribute it"
            )
        if {1, 2} & dims.keys():
            ranks *= mesh.size(index)
            said = said or next(iter(dims.values()))
    if q.shape[1] % ranks or k.shape[1] % ranks:
        raise ValueError(
            f"{said} asks for heads over {ranks} ranks, but there are {q.shape[1]} query and {k.shape[1]} key "
            "heads, expected multiples of it; redistribute to Replicate(), or use Runtime.context_attention"
        )


def _named(mesh: Any, index: int) -> str:
    names = mesh.mesh_dim_names
    return str(index) if names is None else repr(names[index])


@constant_in_graphs
def _register_once() -> bool:
    global _registered
    if not _registered:
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(torch.ops.softcap_runtime.attention.default)(_forward)
        register_sharding(torch.ops.softcap_runtime.attention_backward.default)(_backward)
        _registered = True
    return True


# A rule lists the possible placements of all results and arguments on one dimension of a mesh; torch takes the one
# that is cheapest to reach.


def _forward(q: Any, k: Any, v: Any, lo: Any, hi: Any, *numbers: Any) -> list[tuple[list[Any], list[Any]]]:
    train = numbers[5]  # else the logsumexp is empty
    return [
        ([main, main if train else edge_of_none], [main] * 3 + edges + _placed(numbers, edges))
        for main, edge_of_none, edges in _choices(lo)
    ]


def _backward(
    grad_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, lo: Any, hi: Any, *numbers: Any
) -> list[tuple[list[Any], list[Any]]]:
    return [([main] * 3, [main] * 6 + edges + _placed(numbers, edges)) for main, _, edges in _choices(lo)]


def _placed(numbers: tuple[Any, ...], edges: list[Any]) -> list[Any]:
    """The placements of an operator's last arguments: None for numbers, those of the edges for ``kept``."""
    return [edges[0] if hasattr(one, "shape") else None for one in numbers]


def _choices(lo: Any) -> list[tuple[Any, Any, list[Any]]]:
    """All valid combinations: the placement of q, k, v and alike; of what is empty; of both edges."""
    from torch.distributed.tensor import Replicate, Shard

    own_rows = lo is not None and lo.shape[0] > 1  # edges are sharded as their batch rows are
    whole = Replicate()
    found = []
    for main in (Shard(1), Shard(0), whole):
        edge = main if main == Shard(0) and own_rows else whole
        found.append((main, whole, [None if lo is None else edge] * 2))
    return found
