"""The keys method: each rank receives the keys that its rows see and that it lacks.

What is sent has the layout ``[rows, 2, B, H, D]``, keys and values of a row side by side, so that one exchange brings
both to where the kernels read them. A layer is one autograd function:

- forward: the exchange starts; own keys are copied to where the others' arrive beside them; inner rows are computed;
  outer rows after the wait, on a stream of their own. Both calls write to their rows of the one output.
- backward: gradients of all keys come first; those of the others' keys travel back while that of q is computed.

``work.wait()`` makes the current stream wait, not the host of a GPU. An exchange holds some of the GPU's
multiprocessors: a kernel that would take them all first must not be launched right after it, where it is to overlap.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from softcap_runtime.checks import check_no_context_parallel
from softcap_runtime.compat.torch_transforms import interpreters_active
from softcap_runtime.distributed.context import KeyPlan, Layer, Part
from softcap_runtime.distributed.exchange import cat, exchanged, fill, in_stages, joined, waited
from softcap_runtime.distributed.ranges import Ranges, length
from softcap_runtime.engines.engine import empty_output
from softcap_runtime.masks.intervals import RowIntervals
from softcap_runtime.ops.planned import rows_together


class _Exchange(NamedTuple):
    """What arrives, ``[rows, 2, B, H, D]``, valid after waiting for ``work``; what was sent is kept until then.

    ``keys``: the tensor of all keys that the outer rows see, of which what arrives is a part; None if it is not one.
    """

    arrived: Tensor
    sent: Tensor
    work: dist.Work | None
    keys: Tensor | None = None

    def wait(self) -> Tensor:
        """What arrived."""
        if self.work is not None:
            self.work.wait()
        return self.arrived


def attend_by_keys(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of this rank's rows, for checked inputs."""
    if torch.compiler.is_compiling():
        return _in_graph(layer, q, k, v)
    check_no_context_parallel()
    with _no_autocast(q.device.type):  # the inputs are cast already
        if interpreters_active(q, k, v):
            return _in_graph(layer, q, k, v)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out: Tensor = _ByKeys.apply(layer, q, k, v)  # type: ignore[no-untyped-call]
            return out
        return _forward(layer, q, k, v, train=False)[0]


def _plan(layer: Layer) -> KeyPlan:
    plan = layer.context.by_keys
    assert plan is not None
    return plan


def _no_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _ByKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, kept = _forward(layer, q, k, v, train=True)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.layer = layer
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        return None, *_backward(ctx.layer, grad_out, q, k, v, out, kept)


def _forward(layer: Layer, q: Tensor, k: Tensor, v: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
    """The output; for training also what arrived and the logsumexp of each group of heads."""
    q, k, v = rows_together(q), rows_together(k), rows_together(v)
    out = empty_output(q)
    groups = list(zip(*(_groups(x, layer.stages) for x in (q, k, v, out)), strict=True))
    kept: list[Tensor] = []
    coming = _send_keys(layer, *groups[0][1:3])
    for at, (q_, k_, v_, out_) in enumerate(groups, start=1):
        here = coming
        if at < layer.stages:
            coming = _send_keys(layer, *groups[at][1:3])
        lse = _compute(layer, q_, k_, v_, out_, here, train)
        if lse is not None:
            kept += (here.arrived, lse)
    return out, kept


def _groups(x: Tensor, stages: int) -> Sequence[Tensor]:
    return (x,) if stages == 1 else x.split(x.shape[1] // stages, 1)


def _send_keys(layer: Layer, k: Tensor, v: Tensor) -> _Exchange:
    """Start the exchange. If what arrives is contiguous among the outer rows' keys, it arrives in their tensor."""
    plan = _plan(layer)
    k_rows, v_rows = _rows_first(k), _rows_first(v)
    total, keys, place = sum(plan.received), None, _arrival(plan.outer_keys)
    if len(place) == 1:
        keys = k_rows.new_empty(sum(_sizes(plan.outer_keys)), 2, *k_rows.shape[1:])
        arrived = keys[slice(*place[0])]
    else:
        arrived = k_rows.new_empty(total, 2, *k_rows.shape[1:])
    if plan.silent:
        return _Exchange(arrived, arrived, None)
    sent = [length(rows) for rows in plan.sent]
    packed = _packed(k_rows, v_rows, [rows for to in plan.sent for rows in to])
    work = _start(arrived, packed, plan.received, sent, layer)
    if keys is not None:
        for part, there in zip(plan.outer_keys, keys.split(_sizes(plan.outer_keys)), strict=True):
            if not part.arrived:
                _fill_both(there, k_rows, v_rows, [(part.start, part.end)])
    return _Exchange(arrived, packed, work, keys)


def _start(arrived: Tensor, packed: Tensor, received: list[int], sent: list[int], layer: Layer) -> dist.Work | None:
    group = layer.context.mesh.get_group()
    return dist.all_to_all_single(arrived, packed, received, sent, group=group, async_op=True)


def _packed(k_rows: Tensor, v_rows: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Rows of keys and values, in this order and the layout in which they are sent."""
    packed = k_rows.new_empty(length(ranges), 2, *k_rows.shape[1:])
    _fill_both(packed, k_rows, v_rows, ranges)
    return packed


def _fill_both(target: Tensor, k_rows: Tensor, v_rows: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
    """Write the rows of ``ranges`` to ``target``, ``[rows, 2, B, H, D]``."""
    for x, column in ((k_rows, 0), (v_rows, 1)):
        fill(target[:, column], [x[start:end] for start, end in ranges])


def _compute(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, out: Tensor, coming: _Exchange, train: bool
) -> Tensor | None:
    """Compute a group of heads into ``out``; returns its logsumexp if training."""
    plan = _plan(layer)
    (ahead, inner, behind), several = plan.rows, layer.stages > 1

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: RowIntervals, out: Tensor, beside: bool) -> Tensor | None:
        call = layer.call(mask, train, beside)
        lse = layer.runtime.plan(q, k, call).forward_into(out, q, k, v, *mask.vectors)
        return lse if train else None

    if plan.outer is None:
        assert plan.inner is not None
        coming.wait()  # what is sent: the kernel would take all multiprocessors before it starts
        return attend(q, k, v, plan.inner, out, several)
    if plan.inner is None:
        return attend(q, *_outer_keys(k, v, coming, plan), plan.outer, out, several)
    first, middle, last = q.split([ahead, inner, behind], 2)
    out_first, out_middle, out_last = out.split([ahead, inner, behind], 2)
    ready = torch.cuda.current_stream(q.device).record_event() if q.is_cuda else None
    within = attend(middle, k, v, plan.inner, out_middle, several)  # while keys of others are on their way
    with _beside(ready, q.device):
        keys, values = _outer_keys(k, v, coming, plan)
        if ahead and behind:
            rows = joined([first, last], 2)
            apart = empty_output(rows)
            lse = attend(rows, keys, values, plan.outer, apart, True)
            out_first.copy_(apart[:, :, :ahead])
            out_last.copy_(apart[:, :, ahead:])
        elif ahead:
            lse = attend(first, keys, values, plan.outer, out_first, True)
        else:
            lse = attend(last, keys, values, plan.outer, out_last, True)
    if within is None or lse is None:
        return None
    return torch.cat([lse[:, :, :ahead], within, lse[:, :, ahead:]], 2)


@contextmanager
def _beside(ready: torch.cuda.Event | None, device: torch.device) -> Iterator[None]:
    """Launch on a side stream that waits only for ``ready``, and make the current stream wait for it; without an event,
    launch on the current stream.

    Kernels of the outer rows can then use multiprocessors as those of the inner rows release them.
    """
    if ready is None:
        yield
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_event(ready)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _outer_keys(k: Tensor, v: Tensor, coming: _Exchange, plan: KeyPlan) -> tuple[Tensor, Tensor]:
    """Wait for the exchange; returns the keys and values that the outer rows see."""
    arrived = coming.wait()
    if coming.keys is None:
        return _together(k, v, arrived, plan.outer_keys)
    keys, values = (x.permute(1, 2, 0, 3) for x in coming.keys.unbind(1))
    return keys, values


def _together(k: Tensor, v: Tensor, arrived: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """The keys and values of ``parts``; those of this rank itself if they are all."""
    if list(parts) == [Part(False, 0, k.shape[2])]:
        return k, v
    keys, values = (
        cat([(came if part.arrived else own)[part.start : part.end] for part in parts])
        for own, came in zip((_rows_first(k), _rows_first(v)), arrived.unbind(1), strict=True)
    )
    return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)


def _backward(
    layer: Layer, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: list[Tensor]
) -> list[Tensor]:
    """The gradients of q, k and v, by groups of heads; what the other ranks send is added at the end."""
    plan = _plan(layer)
    call = layer.call(plan.every, True, True)
    grads: list[tuple[Tensor, Tensor, Tensor]] = []
    coming: list[_Exchange] = []
    every = [rows_together(x) for x in (q, k, v, grad_out)]
    groups = zip(*(_groups(x, layer.stages) for x in (*every, out)), kept[::2], kept[1::2], strict=True)
    for q_, k_, v_, grad, out_, arrived, lse in groups:
        keys, values = _together(k_, v_, arrived, plan.keys)
        found = layer.runtime.plan(q_, keys, call).backward_of_keys_first(
            lambda dk, dv: coming.append(_send_gradients(layer, dk, dv)),
            grad, q_, keys, values, out_, lse, *plan.every.vectors,
        )  # fmt: skip
        rows = k_.shape[2]
        grads.append((found[0], _own_rows(found[1], plan.keys, rows), _own_rows(found[2], plan.keys, rows)))
    for (_, dk, dv), exchange in zip(grads, coming, strict=True):
        came, at = exchange.wait(), 0
        for start, end in (rows for to in plan.sent for rows in to):
            for own, column in ((dk, 0), (dv, 1)):
                own[:, :, start:end] += came[at : at + end - start, column].permute(1, 2, 0, 3)
            at += end - start
    return [joined(parts, 1) for parts in zip(*grads, strict=True)]


def _send_gradients(layer: Layer, dk: Tensor, dv: Tensor) -> _Exchange:
    """Start to send the gradients of other ranks' keys back to them."""
    plan = _plan(layer)
    dk_rows, dv_rows = _rows_first(dk), _rows_first(dv)
    packed = _packed(dk_rows, dv_rows, _arrival(plan.keys))
    sizes = [length(rows) for rows in plan.sent]
    came = packed.new_empty(sum(sizes), *packed.shape[1:])
    work = None if plan.silent else _start(came, packed, sizes, plan.received, layer)
    return _Exchange(came, packed, work)


def _arrival(parts: Sequence[Part]) -> Ranges:
    """The places of what arrived among all parts, in the order of arrival."""
    sizes = _sizes(parts)
    places = zip(parts, sizes, itertools.accumulate(sizes), strict=True)
    found = sorted((part.start, (end - size, end)) for part, size, end in places if part.arrived)
    return tuple(place for _, place in found)


def _own_rows(grad: Tensor, parts: Sequence[Part], rows: int) -> Tensor:
    """This rank's rows of a gradient of ``parts``; a view if they are contiguous."""
    pieces = zip(parts, grad.split(_sizes(parts), 2), strict=True)
    own = [(part, piece) for part, piece in pieces if not part.arrived]
    if [part for part, _ in own] == [Part(False, 0, rows)]:
        return own[0][1]
    # None of this rank's rows sees some of them, or others lie between them.
    batch, heads, _, head_dim = grad.shape
    whole = grad.new_zeros(batch, rows, heads, head_dim).transpose(1, 2)
    for part, piece in own:
        whole[:, :, part.start : part.end] = piece
    return whole


def _sizes(parts: Sequence[Part]) -> list[int]:
    return [part.end - part.start for part in parts]


def _rows_first(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3)


# --- As operators that graphs can hold: for the compiler, and under modes and transforms.


def _in_graph(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    plan, runtime, config = _plan(layer), layer.runtime, layer.config
    (ahead, inner, behind) = plan.rows

    def compute(q: Tensor, k: Tensor, v: Tensor, coming: Tensor | None) -> Tensor:
        if plan.outer is None:
            assert plan.inner is not None
            return runtime.attend_checked(q, *_tied(k, v, coming, plan.keys), config, plan.inner)
        if plan.inner is None:
            return runtime.attend_checked(q, *_tied(k, v, coming, plan.outer_keys), config, plan.outer)
        first, middle, last = q.split([ahead, inner, behind], 2)
        out = runtime.attend_checked(middle, k, v, config, plan.inner)
        keys, values = _tied(k, v, coming, plan.outer_keys)
        outer = runtime.attend_checked(joined([first, last], 2), keys, values, config, plan.outer)
        first, last = outer.split([ahead, behind], 2)
        return joined([first, out, last], 2)

    def send(_: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if plan.silent:
            return None
        ranges = [rows for to in plan.sent for rows in to] or [(0, 0)]
        rows = [torch.cat([_rows_first(x)[start:end] for start, end in ranges]) for x in (k, v)]
        return exchanged(torch.stack(rows, 1), plan.received, [length(to) for to in plan.sent], layer.context.mesh)

    groups = list(zip(*(_groups(x, layer.stages) for x in (q, k, v)), strict=True))
    return joined(in_stages(groups, send, compute), 1)


def _tied(k: Tensor, v: Tensor, coming: Tensor | None, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """``_together``, but dependent on the exchange even if nothing arrives, as gradients of what was sent do."""
    if coming is None:
        return _together(k, v, k.new_empty(0, 2), parts)
    arrived = waited(coming)  # in any case, as what is sent is kept until then
    if not any(part.arrived for part in parts) and arrived.requires_grad:
        parts = [*parts, Part(True, 0, 0)]
    return _together(k, v, arrived, parts)
