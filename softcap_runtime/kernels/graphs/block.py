"""The blocked engine's pointwise kernels as graphs to export: what stands between its matrix products.

All work in place on a block of logits ``[R, C]`` (the query rows of all heads, keys). Row r sees the columns with
``lo[r] <= cols[c] < hi[r]``; ``lo``, ``hi`` ``[R]`` and ``cols`` ``[C]`` are int32, scalars are float32.

Heads have no dimension of their own: with one, Inductor walks what is stored and what is summed in loops of different
depth, and so each of them over the block for itself, through memory for what stands between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softcap_runtime.kernels.graphs.example import Graph
from softcap_runtime.kernels.graphs.softcap import capped, tanh, tanh_half
from softcap_runtime.kernels.key import KernelSpec


def _visible(lo: Tensor, hi: Tensor, cols: Tensor) -> Tensor:
    return (cols >= lo[:, None]) & (cols < hi[:, None])


def _float(x: Tensor) -> Tensor:
    # Not a plain .float(): traced on a float32 input it becomes a copy, and writing to x is lost (torch 2.13).
    return x if x.dtype == torch.float32 else x.float()


class BlockForward(nn.Module):
    """``(s, lo, hi, cols, total, scale, cap, inv_cap)``: s becomes exp(logit), total gains its row sums.

    The softcap bounds the logits, so exp needs no running maximum: sums of e^64 stay far inside float32. What is summed
    is what the next product reads: in bfloat16 a row of few keys is off by its weights' rounding otherwise.
    ``half``: q, k and v are of half precision.
    """

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.tanh = tanh_half if half else tanh

    def forward(
        self, s: Tensor, lo: Tensor, hi: Tensor, cols: Tensor, total: Tensor, *scalars: Tensor
    ) -> None:
        """One block of keys; blocks of one row add up in ``total`` ``[R]`` in any order."""
        scale, cap, inv_cap = scalars
        weight = torch.exp(capped(_float(s) * scale, cap, inv_cap, self.tanh))
        weight = torch.where(_visible(lo, hi, cols), weight, 0.0).to(s.dtype)
        total.add_(_float(weight).sum(-1))
        s.copy_(weight)


class BlockSoftmax(nn.Module):
    """``(s, lo, hi, cols, total, peak, scale[, cap, inv_cap])``: the safe form, for unbounded logits.

    s becomes exp(logit - peak) with ``peak`` ``[R]`` the row maxima, so it takes all keys of a row at once.
    """

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__()
        self.capped = spec.capped

    def forward(
        self, s: Tensor, lo: Tensor, hi: Tensor, cols: Tensor, total: Tensor, peak: Tensor, *scalars: Tensor
    ) -> None:
        """All keys of its rows; a row that sees nothing has total 0 and peak 0."""
        logit = _float(s) * scalars[0]
        if self.capped:
            logit = capped(logit, scalars[1], scalars[2])
        visible = _visible(lo, hi, cols)
        top = torch.where(visible, logit, -torch.inf).amax(-1)
        top = torch.where(top == -torch.inf, 0.0, top)
        weight = torch.where(visible, torch.exp(logit - top[..., None]), 0.0).to(s.dtype)
        total.copy_(_float(weight).sum(-1))
        peak.copy_(top)
        s.copy_(weight)


class BlockBackward(nn.Module):
    """``(s, grad_p, lo, hi, cols, lse, delta, scale[, cap, inv_cap])``: s becomes p, grad_p becomes ds.

    With logit = cap * tanh(scale * s / cap): ``p = exp(logit - lse)`` and
    ``ds = scale * p * (grad_p - delta) * (1 - (logit / cap)^2)``, delta the row sums of grad_out * out.
    ``half``: q, k and v are of half precision.
    """

    def __init__(self, spec: KernelSpec, half: bool) -> None:
        super().__init__()
        self.capped = spec.capped
        self.tanh = tanh_half if half else tanh

    def forward(
        self,
        s: Tensor,
        grad_p: Tensor,
        lo: Tensor,
        hi: Tensor,
        cols: Tensor,
        lse: Tensor,
        delta: Tensor,
        *scalars: Tensor,
    ) -> None:
        """One block; ``lse`` and ``delta`` are ``[R]`` float32, lse finite even where a row sees nothing."""
        scale = scalars[0]
        logit = _float(s) * scale
        slope = scale
        if self.capped:
            bounded = self.tanh(logit * scalars[2])
            logit = scalars[1] * bounded
            slope = scale * (1 - bounded * bounded)
        # Masked before exp: a hidden logit may lie far above the row's logsumexp, and inf * 0 is NaN.
        logit = torch.where(_visible(lo, hi, cols), logit - lse[..., None], -torch.inf)
        p = torch.exp(logit)
        ds = p * (_float(grad_p) - delta[..., None]) * slope
        s.copy_(p)
        grad_p.copy_(ds)


def _block(spec: KernelSpec, count: int, vectors: int, module: nn.Module) -> Graph:
    """``count`` logit blocks, the interval vectors, ``vectors`` [R] tensors, the scalars."""
    dim = torch.export.Dim.DYNAMIC
    rows, cols = 120, 48
    blocks = [torch.zeros(rows, cols, dtype=spec.torch_dtype) for _ in range(count)]
    edges = [torch.zeros(rows, dtype=torch.int32) for _ in range(2)]
    columns = torch.zeros(cols, dtype=torch.int32)
    per_row = [torch.zeros(rows) for _ in range(vectors)]
    scalars = [torch.ones(()) for _ in range(3 if spec.capped else 1)]
    example = (*blocks, *edges, columns, *per_row, *scalars)
    dynamic = [{place: dim for place in range(tensor.dim())} for tensor in example]
    named = count + 3 + vectors
    return Graph(module, example, (*dynamic[:named], tuple(dynamic[named:])))


def block_forward(spec: KernelSpec, half: bool = False) -> Graph:
    """The graph of op ``block_forward``, or of ``block_forward_half``."""
    return _block(spec, 1, 1, BlockForward(half))


def block_softmax(spec: KernelSpec) -> Graph:
    """The graph of op ``block_softmax``."""
    return _block(spec, 1, 2, BlockSoftmax(spec))


def block_backward(spec: KernelSpec, half: bool = False) -> Graph:
    """The graph of op ``block_backward``, or of ``block_backward_half``."""
    return _block(spec, 2, 2, BlockBackward(spec, half))
