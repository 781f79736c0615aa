"""The blocked engine on the CPU: large matrix products over blocks of queries, one fused kernel between them.

A block of query rows meets the keys that its rows see, a chunk at a time. The softcap bounds every logit to
[-cap, cap], so for caps up to ``BOUNDED_CAP`` no running maximum and no rescaling is needed: ``exp`` of a logit
and sums of millions of them stay inside float32. Above it, and without a softcap, a row takes all its keys in
one chunk and its maximum is found first. Nothing of size S x S ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softcap_runtime.kernels.engine import (
    Backward,
    Engine,
    Forward,
    Kernels,
    Problem,
    Runner,
    empty_output,
    scalars,
)
from softcap_runtime.kernels.key import KernelSpec, dtype_name
from softcap_runtime.masks.blocks import key_ranges
from softcap_runtime.masks.intervals import edges
from softcap_runtime.torch_private import cpu_has_amx

# exp(64) is 6e27: a million such weights times values of 1e4 are still 1e3 times below float32's largest number,
# and exp(-64) is far above its smallest.
BOUNDED_CAP = 64.0
CHUNK = 1024


def block_rows(q_len: int) -> int:
    """Query rows of a block. Smaller blocks waste less on the causal diagonal, larger ones make better products.

    Forward + backward with 64 rows against 128, B1 Hq8 Hkv4 D256 float32: 8.4 against 9.2 ms at 256 tokens, 23.0
    against 23.8 at 512, 285 against 284 at 2,048.
    """
    return 64 if q_len <= 512 else 128


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products: bfloat16 only where the CPU has bf16 tiles (AMX), else float32.

    Measured on an AVX-512 CPU without AMX: float32 products run at 300 GFLOP/s on two cores, bf16 at 160; with
    AMX at 186 and 780.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 and cpu_has_amx() else torch.float32


def _forward_spec(problem: Problem) -> KernelSpec:
    bounded = problem.softcap is not None and problem.softcap <= BOUNDED_CAP
    op = "block_forward" if bounded else "block_softmax"
    return KernelSpec(op, "cpu", _name(problem), 0, problem.softcap is not None, "")


def _backward_spec(problem: Problem) -> KernelSpec:
    return KernelSpec("block_backward", "cpu", _name(problem), 0, problem.softcap is not None, "")


def _name(problem: Problem) -> str:
    return dtype_name(compute_dtype(problem.dtype))


def _specs(problem: Problem) -> list[KernelSpec]:
    return [_forward_spec(problem), *([_backward_spec(problem)] if problem.train else [])]


def _refuses(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"the blocked engine runs on the CPU, q is on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the blocked engine serves float32, bfloat16 and float16"
    return None


class _Block(NamedTuple):
    """Query rows ``[first, end)`` against the keys ``[lo, hi)`` that any of them sees."""

    first: int
    end: int
    lo: int
    hi: int


class _Walk:
    """The blocks of a problem, batch row by batch row, with the vectors that the fused kernels read."""

    def __init__(self, problem: Problem) -> None:
        lo, hi = edges(problem.mask, "cpu")
        self.lo, self.hi = list(lo.unbind(0)), list(hi.unbind(0))
        self.cols = torch.arange(problem.mask.kv_len, dtype=torch.int32, device="cpu")
        self.rows = block_rows(problem.mask.q_len)
        ranges = key_ranges(problem.mask, self.rows)
        if isinstance(ranges, list):
            self.ranges = [ranges]
        else:
            bounds = torch.stack([ranges.lo_min, ranges.hi_max], -1).tolist()
            self.ranges = [[(a, b) if a < b else (0, 0) for a, b in row] for row in bounds]

    def blocks(self, batch_row: int) -> Iterator[_Block]:
        q_len = self.lo[0].shape[0]
        row = self.ranges[min(batch_row, len(self.ranges) - 1)]
        for place, (lo, hi) in enumerate(row):
            yield _Block(place * self.rows, min((place + 1) * self.rows, q_len), lo, hi)

    def keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in the dtype of the products, at once where several blocks read it, else chunk by chunk later."""
        return x.to(dtype) if len(self.ranges[0]) > 1 else x

    def edges(self, batch_row: int, block: _Block) -> list[Tensor]:
        row = min(batch_row, len(self.lo) - 1)
        return [self.lo[row][block.first : block.end], self.hi[row][block.first : block.end]]


class _Scratch:
    """One buffer of logits, reused by all blocks of a call."""

    def __init__(self, heads: int, dtype: torch.dtype) -> None:
        self.heads, self.dtype = heads, dtype
        self.buffer = torch.empty(0, dtype=dtype, device="cpu")

    def view(self, groups: int, rows: int, cols: int) -> Tensor:
        size = groups * rows * cols
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=self.dtype, device="cpu")
        return self.buffer[:size].view(groups, rows, cols)


def _zeros(*shape: int) -> Tensor:
    # The kernels check no dtype and no device: neither may follow the process's defaults.
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _grouped(x: Tensor, first: int, end: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[first, end)`` of ``[Hq, S, D]`` as ``[Hkv, G * rows, D]``: a group's heads share one product."""
    rows = x[:, first:end].to(dtype)
    return rows.reshape(kv_heads, -1, x.shape[-1])


def _chunks(block: _Block, size: int) -> Iterator[tuple[int, int]]:
    for lo in range(block.lo, block.hi, size):
        yield lo, min(lo + size, block.hi)


def forward(problem: Problem, kernels: Kernels) -> Forward:
    """Bind the forward pass; it returns out ``[B, Hq, Sq, D]`` and, for training, lse ``[B, Hq, Sq]`` float32."""
    spec = _forward_spec(problem)
    fused = kernels.runner(spec)
    walk, numbers = _Walk(problem), scalars(problem)
    halves = problem.dtype == torch.float32  # half precision's own rounding is far larger

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out = empty_output(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if problem.train else None
        scratch = _Scratch(problem.num_heads, compute_dtype(problem.dtype))
        for row in range(problem.batch):
            k_row, v_row = walk.keys(k[row], scratch.dtype), walk.keys(v[row], scratch.dtype)
            for block in walk.blocks(row):
                q_block = _grouped(q[row], block.first, block.end, problem.num_kv_heads, scratch.dtype)
                vectors = walk.edges(row, block)
                summed, total, peak = _attend(
                    spec, fused, walk, numbers, scratch, block, vectors, (q_block, k_row, v_row), halves
                )
                if lse is not None:
                    log_total = total.log()
                    lse[row, :, block.first : block.end] = log_total if peak is None else log_total + peak
                # A row that sees nothing has total 0 and weights 0.
                total.clamp_min_(torch.finfo(torch.float32).tiny)
                heads_out = summed.view(problem.num_heads, -1, problem.head_dim)
                torch.div(heads_out, total[..., None], out=out[row, :, block.first : block.end])
        return out, lse

    return run


def _attend(
    spec: KernelSpec,
    fused: Runner,
    walk: _Walk,
    numbers: list[Tensor],
    scratch: _Scratch,
    block: _Block,
    vectors: list[Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    halves: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One block of queries: the weighted sum of values ``[Hkv, G * R, D]``, the weights' sum and peak ``[Hq, R]``."""
    q, k, v = qkv
    rows = block.end - block.first
    total = _zeros(scratch.heads, rows)
    safe = spec.op == "block_softmax"
    peak = _zeros(scratch.heads, rows) if safe else None
    summed = _zeros(*q.shape) if block.lo == block.hi else None
    for lo, hi in _chunks(block, max(block.hi - block.lo, 1) if safe else CHUNK):
        k_part, v_part = k[:, lo:hi].to(scratch.dtype), v[:, lo:hi].to(scratch.dtype)
        weights = _logits(q, k_part, scratch.view(q.shape[0], q.shape[1], hi - lo), halves)
        per_row = [total] if peak is None else [total, peak]
        by_head = weights.view(scratch.heads, rows, hi - lo)
        fused([by_head, *vectors, walk.cols[lo:hi], *per_row, *numbers])
        if summed is None:
            summed = torch.bmm(weights, v_part).float()
        elif scratch.dtype == torch.float32:
            summed.baddbmm_(weights, v_part)
        else:
            summed += torch.bmm(weights, v_part)
    assert summed is not None
    return summed, total, peak


def _logits(q: Tensor, k: Tensor, out: Tensor, halves: bool) -> Tensor:
    """``q @ k^T`` into ``out``; in halves of head_dim the sums are shorter, and so is their rounding error."""
    if not halves:
        return torch.bmm(q, k.mT, out=out)
    middle = q.shape[-1] // 2
    torch.bmm(q[..., :middle], k[..., :middle].mT, out=out)
    return out.baddbmm_(q[..., middle:], k[..., middle:].mT)


def backward(problem: Problem, kernels: Kernels) -> Backward:
    """Bind the backward pass: logits are computed again, block by block, from q, k and the logsumexp."""
    fused = kernels.runner(_backward_spec(problem))
    walk, numbers = _Walk(problem), scalars(problem)
    kv_heads = problem.num_kv_heads

    def run(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(problem.dtype)
        grads = empty_output(q), empty_output(k), empty_output(v)
        scratch, scratch_p = _Scratch(problem.num_heads, dtype), _Scratch(problem.num_heads, dtype)
        # A row that sees nothing has lse -inf; with 0 its hidden weights come out 0.
        lse = torch.where(lse == -torch.inf, 0.0, lse)
        for row in range(problem.batch):
            k_row, v_row = k[row].to(dtype), v[row].to(dtype)
            grad_k = _zeros(*k_row.shape)
            grad_v = _zeros(*v_row.shape)
            for block in walk.blocks(row):
                first, end = block.first, block.end
                q_block = _grouped(q[row], first, end, kv_heads, dtype)
                grad_block = _grouped(grad_out[row], first, end, kv_heads, dtype)
                delta = (grad_out[row, :, first:end].float() * out[row, :, first:end].float()).sum(-1)
                per_row = [lse[row, :, first:end].contiguous(), delta]
                grad_q = _zeros(*q_block.shape)
                vectors = walk.edges(row, block)
                for lo, hi in _chunks(block, CHUNK):
                    shape = (kv_heads, q_block.shape[1], hi - lo)
                    k_part, v_part = k_row[:, lo:hi], v_row[:, lo:hi]
                    p = torch.bmm(q_block, k_part.mT, out=scratch.view(*shape))
                    ds = torch.bmm(grad_block, v_part.mT, out=scratch_p.view(*shape))
                    by_head = (problem.num_heads, end - first, hi - lo)
                    fused([p.view(by_head), ds.view(by_head), *vectors, walk.cols[lo:hi], *per_row, *numbers])
                    _accumulate(grad_v[:, lo:hi], p.mT, grad_block)
                    _accumulate(grad_k[:, lo:hi], ds.mT, q_block)
                    _accumulate(grad_q, ds, k_part)
                grads[0][row, :, first:end] = grad_q.view(problem.num_heads, -1, problem.head_dim)
            grads[1][row], grads[2][row] = grad_k, grad_v
        return grads

    return run


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in float32; a bf16 product is added after, not rounded into the sum."""
    if a.dtype == torch.float32:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


ENGINE = Engine("blocked", _refuses, _specs, forward, backward)
