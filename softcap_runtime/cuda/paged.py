"""Attention over a paged cache on CUDA: what comes before the launch of ``triton.paged``'s kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcap_runtime.cuda.options import decode_rows, device_limits, padded, split_count
from softcap_runtime.cuda.parameters import GpuKernels, Pointer
from softcap_runtime.cuda.triton.attention import bind_shares
from softcap_runtime.cuda.triton.call import factors, make_mask
from softcap_runtime.cuda.triton.launch import Output, constants, launcher, layout, strides

# Of q, k, v, the table, the lengths and, for ragged rows, their offsets, else None.
PagedForward = Callable[..., Tensor]


def bind_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    ragged: bool,
    kernels: GpuKernels,
    scale: float,
    softcap: float | None,
    left: int | None,
    right: int | None,
    approx: bool = False,
) -> PagedForward:
    """Softcapped attention over pages, for tensors that lie as these do.

    ``q`` ``[B, Hq, Sq, D]``, or with ``ragged`` ``[1, Hq, rows, D]``; ``k``, ``v`` ``[num_pages, Hkv, page_size, D]``,
    last stride 1, page_size a power of two; ``table`` int32 ``[sequences, pages]``, contiguous. A row that stands at
    key p sees the keys ``p + left <= j < p + right``.

    The result takes tensors with the shapes, strides and 16-byte alignment of these, int32 lengths ``[sequences]`` and
    offsets ``[sequences + 1]``; it returns out ``[B, Hq, Sq, D]``, a view of ``[B, Sq, Hq, D]`` memory.
    """
    _, heads, rows, dim = q.shape
    pages_at_hand, kv_heads, page_size = k.shape[:3]
    sequences, pages = table.shape
    group = heads // kv_heads
    mask, call = make_mask(left, right, ()), factors(q.dtype, scale, softcap, approx)
    options = kernels.options(q, "decode")
    block_m = max(options.block_m, min(padded(group * rows), decode_rows(q.dtype)))
    if block_m == options.block_m:  # few rows: bound by memory
        # Triton gives half of the stages to the page numbers, which the addresses of keys wait for: with so many, as
        # many keys are under way as in ``decode_kernel``, in the same shared memory.
        options = options._replace(stages=2 * options.stages - 1)
    options = options._replace(block_m=block_m)
    blocks = -(-group * rows // block_m)
    programs = sequences * kv_heads * blocks
    width = mask.width(min(rows, block_m), pages * page_size)
    splits = split_count(device_limits(q.device.index), programs, width, options.block_n)
    where = layout(0, q, k, v)
    half, single, whole = Pointer(q.dtype), Pointer(torch.float32), Pointer(torch.int32)
    share = launcher(
        kernels,
        "paged_kernel",
        (programs * splits, 1, 1),
        [half, half, half, single, single, whole, whole, whole if ragged else None],
        [
            *strides(where.align, q.stride(), k.stride(), v.stride()),
            heads, kv_heads, group, rows, blocks, pages, pages_at_hand, page_size.bit_length() - 1, splits,
            mask.left, mask.right, call.inner, call.coef, call.bias - call.reference, call.reference,
        ],
        {"RAGGED": ragged, "ONLINE": call.online, "FORM": call.form,
         **constants(dim, q.dtype, options, where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, aligned=where.align > 1,
    )  # fmt: skip
    # Rows of no sequence are written by no share.
    run = bind_shares(share, q, splits, where, kernels, Output(q), clear=ragged)
    return lambda *tensors: run(*tensors)[0]
