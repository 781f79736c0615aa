"""Softcapped attention on CUDA by kernels of our own, for bands and row intervals: what comes before their launch.

``bind_forward`` settles all that depends on shapes, strides and the mask, once, and finds the kernels; what it returns
allocates and launches. Nothing here imports Triton. Nothing waits for the device, so calls can be captured in a CUDA
graph (after one call outside of it, which loads the kernels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.cuda.gluon.attention import bind_gluon_forward
from softcap_runtime.cuda.gluon.options import faster_forward, serves
from softcap_runtime.cuda.options import decode_rows, device_limits, most_splits, padded, split_count, tile_width
from softcap_runtime.cuda.parameters import GpuKernels, Pointer
from softcap_runtime.cuda.triton.call import Factors, Mask, factors, make_mask, multiply_adds
from softcap_runtime.cuda.triton.launch import (
    Layout,
    Output,
    as_edges,
    attending,
    constants,
    edge_parameters,
    launcher,
    layout,
    on,
    readable,
    reading,
    strides,
    tile,
)

Forward = Callable[..., tuple[Tensor, Tensor]]  # of q, k, v and the edges


def bind_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *edges: Tensor,
    kernels: GpuKernels,
    scale: float,
    softcap: float | None,
    left: int | None = None,
    right: int | None = None,
    approx: bool = False,
    train: bool = False,
    gluon: bool | None = None,
    out: Tensor | None = None,
    beside: bool = False,
) -> Forward:
    """Softcapped attention and its logsumexp, for tensors that lie as these do.

    ``q`` ``[B, Hq, Sq, D]``, ``k`` and ``v`` ``[B, Hkv, Skv, D]``, one of bfloat16, float16, float32, D up
    to 256, Hq a multiple of Hkv, on one CUDA device (current or not). Row i sees the keys
    ``i + left <= j < i + right`` or, with ``edges`` ``lo`` and ``hi`` (int32 ``[B or 1, Sq]``), ``lo_i <= j < hi_i``;
    with ``kept`` (int32 ``[B or 1, Skv]``) after them only keys that are not 0 there.
    ``approx`` takes tanh from the ``tanh.approx.f32`` instruction (relative error
    2**-11, so up to ``softcap * 5e-4`` of a logit). ``train``: a backward follows, whose error depends on the output's
    where one key has nearly all the weight. ``gluon``: whether the Gluon kernel computes it, for tests; None leaves it
    to ``cuda.gluon.options``. ``beside``: an exchange between ranks runs beside it.

    The result takes tensors with the shapes, dtype, strides, and 16-byte alignment of these. It returns out
    ``[B, Hq, Sq, D]`` in q's dtype, a view of ``[B, Sq, Hq, D]`` memory, and the natural logsumexp float32
    ``[B, Hq, Sq]``; a row that sees nothing gives 0 and -inf. Given an ``out`` that lies as this one, it writes there.
    """
    mask = make_mask(left, right, edges)
    call = factors(q.dtype, scale, softcap, approx)
    read = readable(q), readable(k), readable(v)
    # float32 rounds no weights.
    total = train and not call.online and q.dtype != torch.float32
    if q.shape[2] * (q.shape[1] // k.shape[1]) <= decode_rows(q.dtype):
        run = _bind_decode(*read, mask, call, total, kernels, Output(q, out))
        return reading(run, (q, k, v, *edges))
    where = layout(multiply_adds(2, q, k, mask), *read)
    if gluon is None:
        served = serves(device_limits(q.device.index), q.dtype, call, where.tma)
        gluon = served and faster_forward(q.shape[-1], k.shape[2], mask, call, total)
    if gluon:
        run = bind_gluon_forward(*read, mask, call, total, kernels, Output(q, out), beside)
    else:
        run = _bind_forward(*read, mask, call, total, where, kernels, Output(q, out))
    return reading(run, (q, k, v, *edges))


def _bind_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    call: Factors,
    total: bool,
    where: Layout,
    kernels: GpuKernels,
    output: Output,
) -> Forward:
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = kernels.options(q, "forward")
    kernel = launcher(
        kernels,
        "forward_kernel",
        (batch * heads * -(-rows // options.block_m), 1, 1),
        [
            tile(q, options.block_m, where.tma), tile(k, options.block_n, where.tma),
            tile(v, options.block_n, where.tma), Pointer(q.dtype), Pointer(torch.float32), *edge_parameters(mask),
        ],
        [
            *strides(where.align, q.stride(), k.stride(), v.stride(), output.steps), mask.batch_stride(rows),
            heads, heads // kv_heads, rows, keys, mask.left, mask.right, mask.kept_len(keys),
            call.inner, call.coef, call.bias - call.reference, call.reference,
        ],
        {"BAND": mask.band, "ONLINE": call.online, "TOTAL": total, "FORM": call.form,
         **constants(dim, q.dtype, options, where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, aligned=where.align > 1,
    )  # fmt: skip
    return attending(kernel, output)


def _bind_decode(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, call: Factors, total: bool, kernels: GpuKernels, output: Output
) -> Forward:
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = kernels.options(q, "decode")
    packed = max(options.block_m, padded(heads // kv_heads * rows))
    limits = device_limits(q.device.index)
    splits = split_count(limits, batch * kv_heads, mask.width(rows, keys), options.block_n)
    where = layout(0, q, k, v)
    half, single = Pointer(q.dtype), Pointer(torch.float32)
    share = launcher(
        kernels,
        "decode_kernel",
        (batch * kv_heads * splits, 1, 1),
        [half, half, half, single, single, *edge_parameters(mask)],
        [
            *strides(where.align, q.stride(), k.stride(), v.stride()), mask.batch_stride(rows),
            heads, kv_heads, heads // kv_heads, rows, keys, splits, mask.left, mask.right, mask.kept_len(keys),
            call.inner, call.coef, call.bias - call.reference, call.reference,
        ],
        {"BAND": mask.band, "ONLINE": call.online, "TOTAL": total, "FORM": call.form,
         **constants(dim, q.dtype, options._replace(block_m=packed), where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, aligned=where.align > 1,
    )  # fmt: skip

    def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *edges: Tensor) -> None:
        share(q, k, v, out, lse, *as_edges(edges))

    return bind_shares(launch, q, splits, where, kernels, output)


def bind_shares(
    share: Callable[..., None],
    q: Tensor,
    splits: int,
    where: Layout,
    kernels: GpuKernels,
    output: Output,
    clear: bool = False,
) -> Forward:
    """The forward of a kernel ``share``, which writes ``splits`` shares of out and logsumexp: it, then their sum.

    ``share`` takes q, k, v, the shares, and the rest of what the forward is given. ``clear``: it leaves rows out, which
    see nothing.
    """
    batch, heads, rows, dim = q.shape
    device = q.device
    half, single = Pointer(q.dtype), Pointer(torch.float32)
    combine = launcher(
        kernels,
        "combine_kernel",
        (batch * heads * rows, 1, 1),
        [single, single, half, single],
        [*strides(where.align, output.steps), heads, rows, splits],
        {"D": dim, "DPAD": tile_width(dim), "SPLITS": most_splits(splits), "ALIGN": where.align},
        device=device, dtype=q.dtype, warps=4, aligned=where.align > 1,
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = output.empty() if out is None else out
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=device)
        shape = (splits, batch, heads, rows)
        part_out = torch.empty((*shape, tile_width(dim)), dtype=torch.float32, device=device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=device)
        if clear:
            part_lse.fill_(-torch.inf)
            part_out.zero_()
        with on(device):
            share(q, k, v, part_out, part_lse, *rest)
            combine(part_out, part_lse, out, lse)
        return out, lse

    return run
