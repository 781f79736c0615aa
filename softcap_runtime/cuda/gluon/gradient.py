"""The gradients by the Gluon kernels: what comes before their launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.cuda.gluon.attention import output_tile
from softcap_runtime.cuda.gluon.options import WARPGROUP_ROWS, backward_options, programs
from softcap_runtime.cuda.options import Direction, device_limits, key_directions, padded_rows, tile_width
from softcap_runtime.cuda.parameters import GpuKernels, Parameter, Pointer
from softcap_runtime.cuda.triton.call import Factors, Mask
from softcap_runtime.cuda.triton.launch import Output, as_edges, edge_parameters, launcher, on, strides, tile, vector

Hull = Callable[..., tuple[Tensor | None, ...]]


def bind_gluon_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mask: Mask,
    call: Factors,
    kernels: GpuKernels,
    bind_hull: Callable[[int], Hull],
    beside: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """As ``triton.gradient.bind_backward``, for tensors that tensor maps can describe.

    ``bind_hull(keys)`` is ``triton.gradient``'s query hull for blocks of so many keys.
    """
    batch, heads, rows, dim = q.shape
    device = q.device
    outputs = [Output(x) for x in (q, k, v)]
    padded = padded_rows(rows)
    run_statistics = _bind_statistics(grad, out, padded, call, kernels)
    run_dq = _bind_dq(q, k, v, grad, outputs[0], padded, mask, call, kernels, beside)
    directions = key_directions(dim)
    run_dkdv = [_bind_dkdv(q, k, v, grad, outputs, padded, mask, call, kernels, each) for each in directions]
    hull = bind_hull(backward_options(directions[0], dim, mask.band).own)

    def run(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *edges: Tensor,
        keys_done: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (output.empty() for output in outputs)
        shift, delta = torch.empty((2, batch, heads, padded), dtype=torch.float32, device=device)
        with on(device):
            run_statistics(grad, out, lse, shift, delta)
            lo, hi, kept = as_edges(edges)
            intervals = hull(lo, hi)
            for one in run_dkdv:
                one(q, k, v, grad, shift, delta, dk, dv, *intervals, kept)
            if keys_done is not None:
                keys_done(dk, dv)
            run_dq(q, k, v, grad, shift, delta, dq, lo, hi, kept)
        return dq, dk, dv

    return run


def _bind_statistics(grad: Tensor, out: Tensor, padded: int, call: Factors, kernels: GpuKernels) -> Callable[..., None]:
    batch, heads, rows, dim = grad.shape
    block = 32
    return launcher(
        kernels,
        "statistics_kernel",
        (batch * heads * (padded // block), 1, 1),
        [Pointer(grad.dtype), Pointer(out.dtype), *[Pointer(torch.float32)] * 3],
        [*strides(8, grad.stride(), out.stride()), heads, rows, padded, call.bias],
        {"BLOCK_M": block, "D": dim, "DPAD": tile_width(dim), "ALIGN": 8},
        device=grad.device, dtype=grad.dtype, warps=4,
    )  # fmt: skip


def _bind_dq(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, output: Output, padded: int, mask: Mask, call: Factors,
    kernels: GpuKernels, beside: bool,
) -> Callable[..., None]:  # fmt: skip
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = backward_options("dq", dim, mask.band)
    single = Pointer(torch.float32)
    return launcher(
        kernels,
        "gluon_dq_kernel",
        programs(device_limits(q.device.index), batch * heads * -(-rows // options.own), mask.band, beside),
        [
            tile(q, WARPGROUP_ROWS, True), tile(k, options.block, True), tile(v, options.block, True),
            tile(grad, WARPGROUP_ROWS, True), single, single, output_tile(output), *edge_parameters(mask),
        ],
        [
            mask.batch_stride(rows), batch, heads, heads // kv_heads, rows, padded, keys, mask.left, mask.right,
            mask.kept_len(keys), call.inner, call.coef, call.gain,
        ],
        {"BAND": mask.band, "FORM": call.form, "BLOCK_M": options.own, "BLOCK_N": options.block, "D": dim,
         "DPAD": tile_width(dim), "K_STAGES": options.stages[0], "V_STAGES": options.stages[1]},
        device=q.device, dtype=q.dtype, warps=4,
    )  # fmt: skip


def _bind_dkdv(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, outputs: list[Output], padded: int, mask: Mask, call: Factors,
    kernels: GpuKernels, direction: Direction,
) -> Callable[..., None]:  # fmt: skip
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = backward_options(direction, dim, mask.band)
    blocks = -(-keys // options.own)
    several = mask.batch_stride(rows) > 0  # batch rows have intervals of their own
    statistic = vector(torch.float32, batch * heads * padded, options.block, True)
    intervals: list[Parameter] = [None] * 7
    if mask.batch is not None:
        interval = vector(torch.int32, mask.batch * padded, options.block, True)
        intervals = [interval, interval, *[Pointer(torch.int32)] * 4, Pointer(torch.int32)]
    return launcher(
        kernels,
        "gluon_dkdv_kernel",
        # Their exchange comes after them.
        programs(device_limits(q.device.index), batch * kv_heads * blocks, mask.band, beside=False),
        [
            tile(q, options.block, True), tile(k, WARPGROUP_ROWS, True), tile(v, WARPGROUP_ROWS, True),
            tile(grad, options.block, True), statistic, statistic, *map(output_tile, outputs[1:]), *intervals,
        ],
        [
            padded if several else 0, blocks if several else 0, batch, heads, kv_heads, heads // kv_heads, rows, padded,
            keys, mask.left, mask.right, mask.kept_len(keys), call.inner, call.coef, call.gain,
        ],
        {"BAND": mask.band, "FORM": call.form, "WANT_DK": direction != "dv", "WANT_DV": direction != "dk",
         "BLOCK_M": options.block, "BLOCK_N": options.own, "D": dim, "DPAD": tile_width(dim),
         "Q_STAGES": options.stages[0], "DO_STAGES": options.stages[1]},
        device=q.device, dtype=q.dtype, warps=4,
    )  # fmt: skip
