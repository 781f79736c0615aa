"""The blocked engine on the CPU: large matrix products over blocks of queries, one fused kernel between them.

A block of query rows meets the keys that its rows see, a chunk at a time. The softcap bounds every logit to
[-cap, cap], so for caps up to ``BOUNDED_CAP`` no running maximum and no rescaling is needed: ``exp`` of a logit
and sums of millions of them stay inside float32. Above it, and without a softcap, a row takes all its keys in
one chunk and its maximum is found first. Nothing of size S x S ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime import torch_features
from softcap_runtime.kernels.blocked_walk import Block, Walk
from softcap_runtime.kernels.engine import Engine, Kernels, Problem, empty_output, per_mask, scalars
from softcap_runtime.kernels.key import dtype_name
from softcap_runtime.kernels.package import Package
from softcap_runtime.kernels.products import accumulate, compute_dtype, multiply_in_parts
from softcap_runtime.kernels.workspace import Workspace

# exp(64) is 6e27: a million such weights times values of 1e4 are still 1e3 times below float32's largest number,
# and exp(-64) is far above its smallest.
BOUNDED_CAP = 64.0
CHUNK = 1024


def _forward_package(problem: Problem) -> Package:
    bounded = problem.softcap is not None and problem.softcap <= BOUNDED_CAP
    op = _by_precision("block_forward", problem) if bounded else "block_softmax"
    return _package(op, problem)


def _backward_package(problem: Problem) -> Package:
    return _package(_by_precision("block_backward", problem), problem)


def _by_precision(op: str, problem: Problem) -> str:
    """The kernel with the cheaper tanh where there is one and q, k and v are of half precision."""
    return op if problem.softcap is None or problem.dtype == torch.float32 else f"{op}_half"


def _package(op: str, problem: Problem) -> Package:
    return Package(op, "cpu", dtype_name(compute_dtype(problem.dtype)), 0, problem.softcap is not None, "")


def _artifacts(problem: Problem, kernels: Kernels) -> list[Package]:
    return [_forward_package(problem), *([_backward_package(problem)] if problem.train else [])]


def _refuses(problem: Problem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q.dtype: {problem.dtype}, the blocked engine serves float32, bfloat16 and float16"
    if not torch_features.PACKAGES:
        return f"torch {torch.__version__} cannot compile kernels ahead of time (2.6 and newer can)"
    return None


class _Pass:
    """A problem bound to its fused kernel: what forward and backward have in common."""

    def __init__(self, problem: Problem, kernels: Kernels, package: Package) -> None:
        self.problem = problem
        self.fused = kernels.get(package)
        self.dtype = compute_dtype(problem.dtype)
        self.walk, self.numbers = Walk(problem), scalars(problem)
        # Half precision's own rounding is far larger than that of long sums.
        self.multiply = multiply_in_parts if problem.dtype == torch.float32 else torch.bmm

    def grouped(self, space: Workspace, name: str, rows: Tensor) -> Tensor:
        """``rows`` ``[Hq, R, D]`` as ``[Hkv, G * R, D]``: a group's heads share one product."""
        heads, kv_heads = self.problem.num_heads, self.problem.num_kv_heads
        if heads == kv_heads and rows.dtype == self.dtype:
            return rows
        return space.empty(name, self.dtype, *rows.shape).copy_(rows).view(kv_heads, -1, rows.shape[-1])

    def part(self, space: Workspace, name: str, keys: Tensor, lo: int, hi: int) -> Tensor:
        """Keys or values ``[lo, hi)`` of ``[Hkv, Skv, D]`` as the products take them.

        Those in bf16 copy what has gaps between its heads, and a transposed one element by element: half of the time
        of ``q k^T``.
        """
        piece = keys[:, lo:hi]
        if piece.dtype == self.dtype and (self.dtype == torch.float32 or piece.is_contiguous()):
            return piece
        return space.empty(name, self.dtype, *piece.shape).copy_(piece)

    def logits(self, space: Workspace, name: str, q: Tensor, keys: int) -> Tensor:
        """Room for the products of a block of queries ``[Hkv, G * R, D]`` with a chunk of keys."""
        return space.empty(name, self.dtype, q.shape[0], q.shape[1], keys)

    def by_head(self, rows: Tensor) -> Tensor:
        """A group's rows ``[Hkv, G * R, D]`` head by head: ``[Hq, R, D]``."""
        return rows.view(self.problem.num_heads, -1, rows.shape[-1])


class _Forward(_Pass):
    def __init__(self, problem: Problem, kernels: Kernels) -> None:
        package = _forward_package(problem)
        super().__init__(problem, kernels, package)
        self.safe = package.op == "block_softmax"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out = empty_output(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if self.problem.train else None
        with Workspace() as space:
            for row in range(self.problem.batch):
                keys, values = self.walk.keys(k[row], self.dtype), self.walk.keys(v[row], self.dtype)
                for block in self.walk.blocks(row):
                    q_block = self.grouped(space, "q", q[row, :, block.first : block.end])
                    summed, total, peak = self.attend(space, row, block, q_block, keys, values)
                    if lse is not None:
                        log_total = total.log()
                        lse[row, :, block.first : block.end] = (
                            log_total if peak is None else log_total.add_(peak)
                        )
                    # A row that sees nothing has total 0 and weights 0.
                    total.clamp_min_(torch.finfo(torch.float32).tiny)
                    torch.div(
                        self.by_head(summed), total[..., None], out=out[row, :, block.first : block.end]
                    )
        return out, lse

    def attend(
        self, space: Workspace, batch_row: int, block: Block, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block: the weighted sum of values ``[Hkv, G * R, D]``, the weights' sum and peak ``[Hq, R]``."""
        heads, rows = self.problem.num_heads, block.end - block.first
        total = _zeros(heads, rows)
        peak = _zeros(heads, rows) if self.safe else None
        per_row = [x.view(-1) for x in (total, peak) if x is not None]
        edges = self.walk.edges(batch_row, block)
        summed = space.empty("summed", torch.float32, *q.shape)
        if block.lo == block.hi:
            summed.zero_()
        size = max(block.hi - block.lo, 1) if self.safe else CHUNK
        for lo, hi in block.chunks(size):
            k_part, v_part = self.part(space, "k", k, lo, hi), self.part(space, "v", v, lo, hi)
            weights = self.logits(space, "weights", q, hi - lo)
            self.multiply(q, k_part.mT, out=weights)
            self.fused([weights.view(-1, hi - lo), *edges, self.walk.cols[lo:hi], *per_row, *self.numbers])
            accumulate(space, summed, weights, v_part, first=lo == block.lo)
        return summed, total, peak


class _Backward(_Pass):
    """Logits are computed again, block by block, from q, k and the logsumexp, by the same products.

    Of sums that are rounded in another order the weights would not sum to 1: at logits near a cap of 50 they are off by
    1e-5, an error that eager code does not have.
    """

    def __init__(self, problem: Problem, kernels: Kernels) -> None:
        super().__init__(problem, kernels, _backward_package(problem))

    def __call__(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = empty_output(q), empty_output(k), empty_output(v)
        # A row that sees nothing has lse -inf; with 0 its hidden weights come out 0.
        lse = torch.where(lse == -torch.inf, 0.0, lse)
        with Workspace() as space:
            for row in range(self.problem.batch):
                keys, values = self.walk.keys(k[row], self.dtype), self.walk.keys(v[row], self.dtype)
                grad_k, grad_v = grads[1][row], grads[2][row]
                sums = _sums(space, "grad_k", grad_k), _sums(space, "grad_v", grad_v)
                for block in self.walk.blocks(row):
                    rows = row, slice(None), slice(block.first, block.end)
                    q_block = self.grouped(space, "q", q[rows])
                    grad_block = self.grouped(space, "grad_out", grad_out[rows])
                    delta = _row_sums(space, grad_block, out[rows])
                    per_row = [*self.walk.edges(row, block), lse[rows].contiguous().view(-1), delta.view(-1)]
                    grad_q = self.differentiate(
                        space, block, (q_block, grad_block, keys, values), per_row, sums
                    )
                    grads[0][rows] = self.by_head(grad_q)
                grad_k.copy_(sums[0])  # nothing to do where the sums are the gradient
                grad_v.copy_(sums[1])
        return grads

    def differentiate(
        self,
        space: Workspace,
        block: Block,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        per_row: list[Tensor],
        sums: tuple[Tensor, Tensor],
    ) -> Tensor:
        """One block: its gradient of q ``[Hkv, G * R, D]``; those of its keys and values are added to ``sums``."""
        q, grad_out, keys, values = tensors
        grad_k, grad_v = sums
        lo_hi, rest = per_row[:2], per_row[2:]
        grad_q = space.empty("grad_q", torch.float32, *q.shape)
        if block.lo == block.hi:
            grad_q.zero_()
        for lo, hi in block.chunks(CHUNK):
            k, v = self.part(space, "k", keys, lo, hi), self.part(space, "v", values, lo, hi)
            p = self.logits(space, "p", q, hi - lo)
            self.multiply(q, k.mT, out=p)
            ds = torch.bmm(grad_out, v.mT, out=self.logits(space, "ds", q, hi - lo))
            blocks = [x.view(-1, hi - lo) for x in (p, ds)]
            self.fused([*blocks, *lo_hi, self.walk.cols[lo:hi], *rest, *self.numbers])
            accumulate(space, grad_v[:, lo:hi], p.mT, grad_out)
            accumulate(space, grad_k[:, lo:hi], ds.mT, q)
            accumulate(space, grad_q, ds, k, first=lo == block.lo)
        return grad_q


def _zeros(*shape: int) -> Tensor:
    # The kernels check no dtype and no device: neither may follow the process's defaults.
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _sums(space: Workspace, name: str, grad: Tensor) -> Tensor:
    """Where a gradient is summed up, in float32: itself, or a wider tensor of its shape."""
    total = grad if grad.dtype == torch.float32 else space.empty(name, torch.float32, *grad.shape)
    return total.zero_()


def _row_sums(space: Workspace, grad_out: Tensor, out: Tensor) -> Tensor:
    """The sums of ``grad_out * out`` over head_dim, float32 ``[Hq, R]``; ``grad_out`` may be grouped."""
    product = space.empty("product", torch.float32, *out.shape)
    return torch.mul(grad_out.float().view(out.shape), out, out=product).sum(-1)


ENGINE = Engine("blocked", _refuses, _artifacts, per_mask(_Forward), per_mask(_Backward))
