"""The gradients of ``attention``: what comes before the launch of the backward kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.cuda.gluon.gradient import bind_gluon_backward
from softcap_runtime.cuda.gluon.options import serves
from softcap_runtime.cuda.options import Direction, device_limits, key_directions, padded_rows
from softcap_runtime.cuda.parameters import GpuKernels, Parameter, Pointer
from softcap_runtime.cuda.triton.call import Factors, Mask, factors, make_mask, multiply_adds
from softcap_runtime.cuda.triton.launch import (
    Layout,
    Output,
    as_edges,
    constants,
    edge_parameters,
    launcher,
    layout,
    on,
    readable,
    reading,
    strides,
    tile,
    vector,
)

# Rows that the extremes of the query hull are of: a block that streams by in the Gluon kernels.
ROW_BLOCK = 64
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]  # of grad_out, q, k, v, out, lse and the edges


def bind_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *edges: Tensor,
    kernels: GpuKernels,
    scale: float,
    softcap: float | None,
    left: int | None = None,
    right: int | None = None,
    approx: bool = False,
    gluon: bool | None = None,
    beside: bool = False,
) -> Backward:
    """The gradients ``(dq, dk, dv)`` of ``attention.bind_forward``'s results, for tensors that lie as these do.

    ``grad_out`` like out, out and lse as the forward returned them, the rest as it was given to the forward. The
    result takes the same tensors; its gradients are shaped as q, k and v, in their dtype, views of ``[B, S, H, D]``
    memory. It holds one float32 per query row beyond its inputs and outputs. Sums run in a fixed order: two runs agree
    bit for bit. ``keys_done(dk, dv)`` is called when their kernels are launched: where the Gluon kernels serve before
    that of dq, which then runs ``beside`` an exchange.
    """
    mask = make_mask(left, right, edges)
    call = factors(q.dtype, scale, softcap, approx)
    read = readable(grad_out), readable(q), readable(k), readable(v), readable(out)
    # One rule for all kernels of a backward, by what dq multiplies.
    where = layout(multiply_adds(3, q, k, mask), *read)
    if gluon is None:
        gluon = serves(device_limits(q.device.index), q.dtype, call, where.tma)
    if gluon:

        def bind_hull(block_n: int) -> Callable[..., tuple[Tensor | None, ...]]:
            return _bind_query_hull(mask, q.shape[2], k.shape[2], block_n, kernels, q.device)

        run: Backward = bind_gluon_backward(*read, mask, call, kernels, bind_hull, beside)
    else:
        run = _bind_backward(*read, mask, call, where, kernels)
    return reading(run, (grad_out, q, k, v, out, lse, *edges))


def _bind_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Mask, call: Factors, where: Layout,
    kernels: GpuKernels,
) -> Backward:  # fmt: skip
    batch, heads, rows, _ = q.shape
    device = q.device
    outputs = [Output(x) for x in (q, k, v)]
    stats_shape = (2, batch, heads, padded_rows(rows))
    run_dq = _bind_dq(q, k, v, grad, out, outputs[0], mask, call, where, kernels)
    directions = key_directions(q.shape[-1])
    written = _whole_blocks(rows, kernels.options(q, "dq").block_m)
    read = max(_whole_blocks(rows, kernels.options(q, direction).block_m) for direction in directions)
    run_dkdv = [_bind_dkdv(q, k, v, grad, outputs, mask, call, where, kernels, direction) for direction in directions]

    def run(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *edges: Tensor,
        keys_done: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (output.empty() for output in outputs)
        stats = torch.empty(stats_shape, dtype=torch.float32, device=device)
        shift, delta = stats
        if written < read:  # as dq_kernel leaves rows past the end
            shift.fill_(-torch.inf)
            delta.zero_()
        with on(device):
            # dq first: it leaves what dk and dv need of every row in shift and delta.
            lo, hi, kept = as_edges(edges)
            run_dq(q, k, v, grad, out, lse, shift, delta, dq, lo, hi, kept)
            for one in run_dkdv:
                one(q, k, v, grad, shift, delta, dk, dv, lo, hi, kept)
        if keys_done is not None:
            keys_done(dk, dv)
        return dq, dk, dv

    return run


def _bind_dq(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, output: Output, mask: Mask, call: Factors,
    where: Layout, kernels: GpuKernels,
) -> Callable[..., None]:  # fmt: skip
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = kernels.options(q, "dq")
    single = Pointer(torch.float32)
    return launcher(
        kernels,
        "dq_kernel",
        (batch * heads * -(-rows // options.block_m), 1, 1),
        [
            tile(q, options.block_m, where.tma), tile(k, options.block_n, where.tma),
            tile(v, options.block_n, where.tma), tile(grad, options.block_m, where.tma), Pointer(out.dtype),
            single, single, single, Pointer(q.dtype), *edge_parameters(mask),
        ],
        [
            *strides(where.align, *(x.stride() for x in (q, k, v, grad, out)), output.steps), mask.batch_stride(rows),
            heads, heads // kv_heads, rows, padded_rows(rows), keys, mask.left, mask.right, mask.kept_len(keys),
            call.inner, call.coef, call.bias, call.gain,
        ],
        {"BAND": mask.band, "FORM": call.form, **constants(dim, q.dtype, options, where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, aligned=where.align > 1,
    )  # fmt: skip


def _bind_dkdv(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, outputs: list[Output], mask: Mask, call: Factors, where: Layout,
    kernels: GpuKernels, direction: Direction,
) -> Callable[..., None]:  # fmt: skip
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = kernels.options(q, direction)
    block_m, block_n = options.block_m, options.block_n
    padded, blocks = padded_rows(rows), -(-keys // block_n)
    several = mask.batch_stride(rows) > 0  # batch rows have intervals of their own

    def statistic(dtype: torch.dtype, of: int) -> Parameter:
        return vector(dtype, of * padded, block_m, where.tma)

    intervals: list[Parameter] = [None] * 5
    if mask.batch is not None:
        intervals = [*[statistic(torch.int32, mask.batch)] * 2, *[Pointer(torch.int32)] * 2, Pointer(torch.int32)]
    kernel = launcher(
        kernels,
        "dkdv_kernel",
        (batch * kv_heads * blocks, 1, 1),
        [
            tile(q, block_m, where.tma), tile(k, block_n, where.tma), tile(v, block_n, where.tma),
            tile(grad, block_m, where.tma), *[statistic(torch.float32, batch * heads)] * 2,
            *[Pointer(q.dtype)] * 2, *intervals,
        ],
        [
            *strides(where.align, *(x.stride() for x in (q, k, v, grad)), outputs[1].steps, outputs[2].steps),
            padded if several else 0, blocks if several else 0,
            heads, kv_heads, heads // kv_heads, rows, padded, keys, mask.left, mask.right, mask.kept_len(keys),
            call.inner, call.coef, call.gain,
        ],
        {"BAND": mask.band, "FORM": call.form, "WANT_DK": direction != "dv", "WANT_DV": direction != "dk",
         **constants(dim, q.dtype, options, where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, aligned=where.align > 1,
    )  # fmt: skip
    hull = _bind_query_hull(mask, rows, keys, block_n, kernels, q.device)

    def run(*tensors: Tensor | None) -> None:
        *given, lo, hi, kept = tensors
        kernel(*given, *hull(lo, hi)[:4], kept)

    return run


def _bind_query_hull(
    mask: Mask, rows: int, keys: int, block_n: int, kernels: GpuKernels, device: torch.device
) -> Callable[..., tuple[Tensor | None, ...]]:
    """What the key blocks need of intervals: lo, hi padded, and the query rows that may see each block.

    int32 ``[B or 1, padded_rows]`` twice and ``[B or 1, blocks]`` twice, and of every ``ROW_BLOCK`` rows the largest lo
    and the smallest hi; flat. Six None for a band.
    """
    if mask.batch is None:
        return lambda *edges: (None,) * 6
    batch = mask.batch
    padded, blocks = padded_rows(rows), -(-keys // block_n)
    each = _whole_blocks(batch * blocks, 4)  # addresses are multiples of 16 bytes
    kernel = launcher(
        kernels,
        "query_hull_kernel",
        (batch, -(-blocks // 16), 1),
        [Pointer(torch.int32)] * 8,
        [mask.batch_stride(rows), rows, padded, keys, blocks],
        {"BLOCK_N": block_n, "ROWS": 512, "KEYS": 16, "EACH": ROW_BLOCK},
        device=device, dtype=torch.int32, warps=4,
    )  # fmt: skip

    def run(*edges: Tensor) -> tuple[Tensor, ...]:
        lo, hi = torch.empty((2, batch, padded), dtype=torch.int32, device=device)
        first, last = torch.empty((2, each), dtype=torch.int32, device=device)
        most, least = torch.empty((2, _whole_blocks(lo.numel() // ROW_BLOCK, 4)), dtype=torch.int32, device=device)
        kernel(*edges, lo, hi, first, last, most, least)
        return lo, hi, first, last, most, least

    return run


def _whole_blocks(rows: int, block: int) -> int:
    return -(-rows // block) * block
