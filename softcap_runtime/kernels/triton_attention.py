"""Softcapped attention on CUDA by kernels of our own: forward and backward, bands and row intervals.

Importing this module imports neither Triton nor the kernels; the first call does. Nothing here waits for the
device, so calls can be captured in a CUDA graph (after one call outside of it, which compiles).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gpu_options import (
    BlockOptions,
    Direction,
    choose,
    decode_rows,
    device_limits,
    padded,
    split_count,
    splits_backward,
)
from .triton_launch import constants, launch, layout, strides, tile, vector

# No bound: far enough for any length, and no sum with a row leaves int32.
UNBOUNDED = 1 << 29
# Fixed-reference weights span exp(-cap - reference) to exp(cap - reference); past this cap float32 cannot hold
# both ends, a sum over the keys and the values' own size.
FIXED_REFERENCE_CAP = 64.0
# exp(50) * 2**20 keys * values of 1e9 is still finite in float32.
REFERENCE_FROM = 50.0
LOG2E = 1.4426950408889634


class Mask(NamedTuple):
    """A band (``left``, ``right``; no tensors) or intervals (``lo``, ``hi`` int32 ``[B or 1, Sq]``)."""

    left: int
    right: int
    lo: Tensor | None
    hi: Tensor | None

    def width(self, rows: int, keys: int) -> int:
        """Keys a row may see at most, as far as the host knows."""
        return keys if self.lo is not None else max(1, min(keys, rows + self.right - self.left))

    @property
    def batch_stride(self) -> int:
        """Elements from one batch entry's intervals to the next; 0 when they share one."""
        return 0 if self.lo is None or self.lo.shape[0] == 1 else self.lo.stride(0)


class Factors(NamedTuple):
    """How a raw product becomes a logit in log2 units: ``triton_common.capped``'s arguments and its form."""

    form: int
    inner: float
    coef: float
    bias: float
    reference: float
    gain: float
    online: bool


@lru_cache(maxsize=256)
def factors(dtype: torch.dtype, scale: float, softcap: float | None, approx: bool) -> Factors:
    """The form of the softcap and its constants; see ``triton_common`` for the identities."""
    if softcap is None:
        return Factors(0, scale * LOG2E, 0.0, 0.0, 0.0, scale, True)
    # float16 weights underflow against a fixed reference (its smallest is exp(-16.6)), so they follow a maximum.
    online = softcap > FIXED_REFERENCE_CAP or dtype == torch.float16
    reference = 0.0 if online else max(0.0, softcap - REFERENCE_FROM) * LOG2E
    outer = softcap * LOG2E
    if approx or dtype == torch.float32:
        form = 2 if approx else 3
        return Factors(form, scale / softcap, outer, 0.0, reference, scale, online)
    return Factors(1, 2 * scale * LOG2E / softcap, -2 * outer, outer, reference, 4 * scale, online)


def make_mask(left: int | None, right: int | None, lo: Tensor | None, hi: Tensor | None) -> Mask:
    """The mask of a call; None bounds are none. Intervals are made contiguous along the rows."""
    if lo is not None and hi is not None:
        lo, hi = lo.to(torch.int32), hi.to(torch.int32)
        if lo.stride(-1) != 1 or hi.stride() != lo.stride():
            lo, hi = lo.contiguous(), hi.contiguous()
        return Mask(0, 0, lo, hi)
    return Mask(
        -UNBOUNDED if left is None else max(-UNBOUNDED, min(left, UNBOUNDED)),
        UNBOUNDED if right is None else max(-UNBOUNDED, min(right, UNBOUNDED)),
        None,
        None,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    left: int | None = None,
    right: int | None = None,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    approx: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softcapped attention and its logsumexp.

    ``q`` ``[B, Hq, Sq, D]``, ``k`` and ``v`` ``[B, Hkv, Skv, D]``, one of bfloat16, float16, float32, D in 64, 96,
    128, 256, Hq a multiple of Hkv, on one CUDA device (current or not). Row i sees the keys
    ``i + left <= j < i + right`` or, with ``lo`` and ``hi`` (int32 ``[B or 1, Sq]``), ``lo_i <= j < hi_i``.
    Returns out ``[B, Hq, Sq, D]`` in q's dtype, a view of ``[B, Sq, Hq, D]`` memory, and the natural logsumexp
    float32 ``[B, Hq, Sq]``; a row that sees nothing gives 0 and -inf. ``approx`` takes tanh from the
    ``tanh.approx.f32`` instruction (relative error 2**-11, so up to ``softcap * 5e-4`` of a logit).
    """
    q, k, v = (_last_stride_one(t) for t in (q, k, v))
    mask = make_mask(left, right, lo, hi)
    call = factors(q.dtype, scale, softcap, approx)
    batch, heads, rows, dim = q.shape
    out = torch.empty((batch, rows, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    with _on(q.device):
        if rows * (heads // k.shape[1]) <= decode_rows(q.dtype):
            _decode(q, k, v, out, lse, mask, call)
        else:
            _forward(q, k, v, out, lse, mask, call)
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, call: Factors) -> None:
    from .triton_forward import forward_kernel

    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = _options(q, "forward")
    where = layout(2 * batch * heads * rows * mask.width(rows, keys) * dim, q, k, v, out)
    launch(
        forward_kernel,
        (batch * heads * -(-rows // options.block_m), 1, 1),
        [
            tile(q, options.block_m, where.tma), tile(k, options.block_n, where.tma),
            tile(v, options.block_n, where.tma), out, lse, mask.lo, mask.hi,
            *strides(where.align, q, k, v, out), mask.batch_stride, heads, heads // kv_heads, rows, keys,
            mask.left, mask.right, call.inner, call.coef, call.bias - call.reference, call.reference,
        ],
        {"BAND": mask.lo is None, "ONLINE": call.online, "FORM": call.form, **constants(dim, q.dtype, options, where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, reusable=where.reusable,
    )  # fmt: skip


def _decode(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, call: Factors) -> None:
    from .triton_decode import combine_kernel, decode_kernel

    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = _options(q, "decode")
    packed = max(options.block_m, padded(heads // kv_heads * rows))
    splits = split_count(
        device_limits(q.device.index), batch * kv_heads, mask.width(rows, keys), options.block_n
    )
    where = layout(0, q, k, v, out)
    part_out = torch.empty((splits, batch, heads, rows, padded(dim)), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((splits, batch, heads, rows), dtype=torch.float32, device=q.device)
    launch(
        decode_kernel,
        (splits, batch * kv_heads, 1),
        [
            q, k, v, part_out, part_lse, mask.lo, mask.hi, *strides(where.align, q, k, v), mask.batch_stride,
            heads, kv_heads, heads // kv_heads, rows, keys, splits, mask.left, mask.right,
            call.inner, call.coef, call.bias - call.reference, call.reference,
        ],
        {"BAND": mask.lo is None, "ONLINE": call.online, "FORM": call.form,
         **constants(dim, q.dtype, options._replace(block_m=packed), where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, reusable=where.reusable,
    )  # fmt: skip
    launch(
        combine_kernel,
        (batch * heads * rows, 1, 1),
        [part_out, part_lse, out, lse, *strides(where.align, out), heads, rows, splits],
        {"D": dim, "DPAD": padded(dim), "SPLITS": padded(splits), "ALIGN": where.align},
        device=q.device, dtype=q.dtype, warps=4, reusable=where.reusable,
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None,
    left: int | None = None,
    right: int | None = None,
    lo: Tensor | None = None,
    hi: Tensor | None = None,
    approx: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients ``(dq, dk, dv)`` of ``forward``, shaped and laid out as q, k and v, in their dtype.

    ``grad_out`` like out; ``out`` and ``lse`` as ``forward`` returned them; the rest as it was given them. Holds
    one float32 per query row beyond its inputs and outputs. Sums run in a fixed order: two runs agree bit for bit.
    """
    q, k, v, out, grad_out = (_last_stride_one(t) for t in (q, k, v, out, grad_out))
    mask = make_mask(left, right, lo, hi)
    call = factors(q.dtype, scale, softcap, approx)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    batch, heads, rows = lse.shape
    stats = torch.empty((2, batch, heads, _padded_rows(rows)), dtype=torch.float32, device=q.device)
    with _on(q.device):
        # dq first: it leaves what dk and dv need of every row in stats.
        _dq(q, k, v, grad_out, out, lse, stats, dq, mask, call)
        for direction in ("dk", "dv") if splits_backward(q.shape[-1]) else ("dkdv",):
            _dkdv(q, k, v, grad_out, stats, dk, dv, mask, call, direction)  # type: ignore[arg-type]
    return dq, dk, dv


def _dq(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor, stats: Tensor, dq: Tensor,
    mask: Mask, call: Factors,
) -> None:  # fmt: skip
    from .triton_backward import dq_kernel

    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = _options(q, "dq")
    where = layout(3 * batch * heads * rows * mask.width(rows, keys) * dim, q, k, v, grad, out, dq)
    launch(
        dq_kernel,
        (batch * heads * -(-rows // options.block_m), 1, 1),
        [
            tile(q, options.block_m, where.tma), tile(k, options.block_n, where.tma),
            tile(v, options.block_n, where.tma), tile(grad, options.block_m, where.tma),
            out, lse, stats[0], stats[1], dq, mask.lo, mask.hi,
            *strides(where.align, q, k, v, grad, out, dq), mask.batch_stride,
            heads, heads // kv_heads, rows, stats.shape[-1], keys, mask.left, mask.right,
            call.inner, call.coef, call.bias, call.gain,
        ],
        {"BAND": mask.lo is None, "FORM": call.form, **constants(dim, q.dtype, options, where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, reusable=where.reusable,
    )  # fmt: skip


def _dkdv(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, stats: Tensor, dk: Tensor, dv: Tensor,
    mask: Mask, call: Factors, direction: Direction,
) -> None:  # fmt: skip
    from .triton_backward import dkdv_kernel

    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    options = _options(q, direction)
    where = layout(4 * batch * heads * rows * mask.width(rows, keys) * dim, q, k, v, grad, dk, dv)
    lo, hi, first, last = _query_hull(mask, rows, stats.shape[-1], keys, options.block_n)
    launch(
        dkdv_kernel,
        (batch * kv_heads * -(-keys // options.block_n), 1, 1),
        [
            tile(q, options.block_m, where.tma), tile(k, options.block_n, where.tma),
            tile(v, options.block_n, where.tma), tile(grad, options.block_m, where.tma),
            vector(stats[0], options.block_m, where.tma), vector(stats[1], options.block_m, where.tma), dk, dv,
            vector(lo, options.block_m, where.tma), vector(hi, options.block_m, where.tma), first, last,
            *strides(where.align, q, k, v, grad, dk, dv),
            0 if lo is None or len(lo) == 1 else lo.stride(0),
            0 if first is None or len(first) == 1 else first.stride(0),
            heads, kv_heads, heads // kv_heads, rows, stats.shape[-1], keys, mask.left, mask.right,
            call.inner, call.coef, call.gain,
        ],
        {"BAND": mask.lo is None, "FORM": call.form, "WANT_DK": direction != "dv", "WANT_DV": direction != "dk",
         **constants(dim, q.dtype, options, where)},
        device=q.device, dtype=q.dtype, warps=options.warps, stages=options.stages, reusable=where.reusable,
    )  # fmt: skip


def _query_hull(
    mask: Mask, rows: int, padded_rows: int, keys: int, block_n: int
) -> tuple[Tensor | None, ...]:
    """What the key blocks need of intervals: lo, hi padded, and the query rows that may see each block.

    int32 ``[B or 1, padded_rows]`` twice and ``[B or 1, blocks]`` twice; four None for a band.
    """
    if mask.lo is None:
        return None, None, None, None
    from .triton_backward import query_hull_kernel

    blocks = -(-keys // block_n)
    batch = mask.lo.shape[0]
    lo, hi = torch.empty((2, batch, padded_rows), dtype=torch.int32, device=mask.lo.device)
    first, last = torch.empty((2, batch, blocks), dtype=torch.int32, device=mask.lo.device)
    launch(
        query_hull_kernel,
        (-(-blocks // 16), batch, 1),
        [mask.lo, mask.hi, lo, hi, first, last, mask.batch_stride, rows, padded_rows, keys, blocks],
        {"BLOCK_N": block_n, "ROWS": 512, "KEYS": 16},
        device=lo.device, dtype=lo.dtype, warps=4, reusable=False,
    )  # fmt: skip
    return lo, hi, first, last


def _padded_rows(rows: int) -> int:
    """Rows of a statistics vector: whole blocks of the largest block, so kernels read it without a mask."""
    return -(-rows // 128) * 128


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current for the launches; nothing to do where it is, which is nearly always."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _last_stride_one(tensor: Tensor) -> Tensor:
    """The tensor itself where kernels can read it, else a contiguous copy (an expanded gradient, say)."""
    steps = tensor.stride()
    if steps[-1] == 1 and (min(steps) > 0 or tensor.numel() == 0):
        return tensor
    return tensor.contiguous()


def _options(q: Tensor, direction: Direction) -> BlockOptions:
    return choose(device_limits(q.device.index), q.dtype, q.shape[-1], direction)
