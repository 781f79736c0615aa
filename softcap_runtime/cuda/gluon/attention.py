"""The forward by the Gluon kernel: what comes before its launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.cuda.gluon.options import WARPGROUP_ROWS, forward_options, programs
from softcap_runtime.cuda.options import device_limits, tile_width
from softcap_runtime.cuda.parameters import GpuKernels, Parameter, Pointer, Tile
from softcap_runtime.cuda.triton.call import Factors, Mask
from softcap_runtime.cuda.triton.launch import Output, attending, edge_parameters, launcher, tile


def bind_gluon_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, call: Factors, total: bool, kernels: GpuKernels, output: Output,
    beside: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """As ``triton.attention.bind_forward``, for tensors that tensor maps can describe."""
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = forward_options(dim)
    device = q.device
    tiles = batch * heads * -(-rows // options.block_m)
    kernel = launcher(
        kernels,
        "gluon_forward_kernel",
        programs(device_limits(device.index), tiles, mask.band or mask.kept, beside),
        [
            tile(q, WARPGROUP_ROWS, True), tile(k, options.block_n, True), tile(v, options.block_n, True),
            output_tile(output), Pointer(torch.float32), *edge_parameters(mask),
        ],
        [
            mask.batch_stride(rows), batch, heads, heads // kv_heads, rows, keys, mask.left, mask.right,
            mask.kept_len(keys), call.inner, call.coef, call.bias - call.reference, call.reference,
        ],
        {"BAND": mask.band, "ONLINE": call.online, "TOTAL": total, "FORM": call.form, "BLOCK_M": options.block_m,
         "BLOCK_N": options.block_n, "D": dim, "DPAD": tile_width(dim), "STAGES": options.stages,
         "WARPGROUPS": options.warpgroups},
        device=device, dtype=q.dtype, warps=4,
    )  # fmt: skip
    return attending(kernel, output)


def output_tile(output: Output) -> Parameter:
    """What a warpgroup writes its rows of ``output`` through."""
    return Tile(output.dtype, tuple(output.shape), output.steps, (1, 1, WARPGROUP_ROWS, tile_width(output.shape[-1])))
