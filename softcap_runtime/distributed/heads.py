"""The heads method (Ulysses): each rank receives all rows of its heads, and sends its results back to the rows."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from softcap_runtime.distributed.context import HeadPlan, Layer
from softcap_runtime.distributed.exchange import cat, exchanged, in_stages, picked, waited


def attend_by_heads(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of this rank's rows, for checked inputs."""
    runtime, config, context, stages = layer
    plan, mesh, like = context.by_heads, context.mesh, q
    assert plan is not None

    def compute(q: Tensor, k: Tensor, v: Tensor, coming: Tensor) -> Tensor:
        heads = [x.shape[1] for x in (q, k, v)]
        whole = _rows_together(waited(coming), sum(heads), like, plan).split(heads, 1)
        out = runtime.attend_checked(whole[0], whole[1], whole[2], config, context.whole)
        return _back_to_rows(out, plan, context.rank, mesh)

    groups = _head_groups(q, k, v, context.layout.ranks, stages)
    outs = in_stages(groups, lambda q, k, v: _send_rows(q, k, v, plan, mesh), compute)
    ranks, (batch, heads, here, head_dim) = context.layout.ranks, q.shape
    shape = (ranks, here, batch, heads // ranks // stages, head_dim)
    # [rank, B, rows, heads, D] of each group: heads in the order of ranks, then of groups. Concatenating copies, which
    # waits for the results.
    by_rank = zip(*(waited(out).view(shape).transpose(1, 2).unbind(0) for out in outs), strict=True)
    return cat([heads for groups in by_rank for heads in groups], 2).transpose(1, 2)


def _head_groups(q: Tensor, k: Tensor, v: Tensor, ranks: int, stages: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of each group as ``[ranks, heads, B, rows, D]``: which heads go to which rank."""
    if k.shape[1] < ranks:  # each rank's query heads read one key head: it goes to several ranks
        k, v = (x.repeat_interleave(ranks // x.shape[1], 1) for x in (k, v))
    by_rank = [x.unflatten(1, (ranks, -1)).permute(1, 2, 0, 3, 4) for x in (q, k, v)]
    parts = [x.split(x.shape[1] // stages, 1) for x in by_rank]
    return list(zip(*parts, strict=True))


def _send_rows(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, mesh: DeviceMesh) -> Tensor:
    packed = cat((q, k, v), 1)
    row = packed[0, :, :, 0].numel()
    here = packed.shape[3]
    received = [rows * row for rows in plan.rows]
    return exchanged(packed.flatten(), received, [here * row] * len(plan.rows), mesh)


def _rows_together(arrived: Tensor, heads: int, q: Tensor, plan: HeadPlan) -> Tensor:
    """``[B, heads, S, D]`` in the sequence's order, from what every rank sent: ``[heads, B, rows, D]``."""
    batch, head_dim = q.shape[0], q.shape[3]
    row = heads * batch * head_dim
    parts = arrived.split([rows * row for rows in plan.rows])
    shaped = [x.view(heads, batch, -1, head_dim).permute(2, 1, 0, 3) for x in parts]
    pieces = [piece for own, sizes in zip(shaped, plan.pieces, strict=True) for piece in own.split(sizes)]
    return picked(pieces, plan.order).permute(1, 2, 0, 3)


def _back_to_rows(out: Tensor, plan: HeadPlan, rank: int, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of what every rank computed, ``[rank * rows, B, heads, D]``; nothing here waits for them."""
    pieces = out.permute(2, 0, 1, 3).split(plan.sorted_pieces)
    return exchanged(picked(pieces, plan.back), [plan.rows[rank]] * len(plan.rows), plan.rows, mesh)
