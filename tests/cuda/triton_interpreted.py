"""Runs the Triton kernels on the CPU, in Triton's interpreter, and prints their errors: a line of JSON a case.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported. All memory that the kernels get is full
of NaN, so whatever is read before it is written shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import stand_in
import torch
from torch import Tensor

from softcap_runtime import reference
from softcap_runtime.cuda import options as gpu_options
from softcap_runtime.cuda.cubin import CubinSpec
from softcap_runtime.cuda.parameters import Number, Parameter
from softcap_runtime.cuda.triton.attention import bind_forward
from softcap_runtime.cuda.triton.build import kernel_of
from softcap_runtime.cuda.triton.gradient import bind_backward
from softcap_runtime.masks.intervals import RowIntervals, with_kept

LIMITS = gpu_options.DeviceLimits(227 * 1024, (9, 0), 132)
stand_in.tell_of(LIMITS)


class Kernels:
    """Where the calls find their kernels."""

    def function(self, spec: CubinSpec) -> Interpreted:
        return Interpreted(spec)

    def options(self, q: Tensor, direction: gpu_options.Direction) -> gpu_options.BlockOptions:
        return gpu_options.choose(LIMITS, q.dtype, q.shape[-1], direction)


class Interpreted:
    """A kernel that Triton's interpreter runs, in the place of a loaded one."""

    def __init__(self, spec: CubinSpec) -> None:
        self.kernel, self.constants = kernel_of(spec), dict(spec.constants)

    def bind(
        self, grid: tuple[int, int, int], parameters: Sequence[Parameter], numbers: Sequence[Number]
    ) -> Callable[..., None]:
        def run(*tensors: Tensor | None) -> None:
            assert [x is None for x in tensors] == [one is None for one in parameters]
            for x, one in zip(tensors, parameters, strict=True):
                assert x is None or one is None or x.dtype == one.dtype
            self.kernel[grid](*tensors, *numbers, **self.constants)

        return run


def poisoned(make: Any) -> Any:
    def made(*shape: Any, **how: Any) -> Tensor:
        x: Tensor = make(*shape, **how)
        return x.fill_(float("nan") if x.is_floating_point() else 2**30)

    return made


def mask_of(kind: str, batch: int, rows: int, keys: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    at = torch.arange(rows, dtype=torch.int32).expand(batch, rows)
    if kind == "window":
        left, right = keys - rows - 20, keys - rows + 1
        return {"left": left, "right": right}, at + left, at + right
    lo, hi = at // 23 * 23, at + 1
    if kind == "kept":  # whole blocks that need no mask but for the keys
        lo = torch.zeros_like(lo)
        hi = (at + keys - rows + 1).contiguous()
    if kind == "a row of nothing":
        lo, hi = lo.clone(), hi.clone()
        lo[:, 5], hi[:, 5] = keys, 0
    elif kind == "shared":
        lo, hi = lo[:1], hi[:1]
    elif kind == "kept":
        # One row of keys without holes, others with few or many.
        share = torch.tensor([1.0, 0.98, 0.5])[:batch, None]
        made = RowIntervals(rows, keys, None, None, lo.contiguous(), hi.contiguous())
        made = with_kept(made, torch.rand(batch, keys) < share)
        return dict(zip(("lo", "hi", "kept"), made.vectors, strict=True)), lo, hi
    return {"lo": lo.contiguous(), "hi": hi.contiguous()}, lo, hi


def errors(case: dict[str, Any]) -> dict[str, Any]:
    batch, heads, kv_heads, rows, keys, dim = case["sizes"]
    dtype = getattr(torch, case["dtype"])
    q = torch.randn(batch, rows, heads, dim).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, keys, dim).to(dtype) for _ in range(2))
    grad_out = torch.randn(batch, heads, rows, dim).to(dtype)
    how, lo, hi = mask_of(case["mask"], batch, rows, keys)
    edges = [how.pop(name) for name in ("lo", "hi", "kept") if name in how]
    how |= {"scale": dim**-0.5, "softcap": case["softcap"]}
    empty, empty_strided = torch.empty, torch.empty_strided
    torch.empty, torch.empty_strided = poisoned(empty), poisoned(empty_strided)
    try:
        forward = bind_forward(q, k, v, *edges, kernels=Kernels(), **how)
        out, lse = forward(q, k, v, *edges)
        if rows <= 50:  # the interpreter takes seconds for more, and the same kernels serve these
            assert torch.equal(forward(q, k, v, *edges)[0], out)
        # Rows and heads of a larger output.
        larger = torch.empty(batch, rows + 8, heads + 2, dim, dtype=dtype)
        part = larger[:, 8:, 1:-1].transpose(1, 2)
        into = bind_forward(q, k, v, *edges, kernels=Kernels(), out=part, **how)(q, k, v, *edges, out=part)
        assert into[0] is part
        assert torch.equal(part, out)
        assert int(larger.isnan().sum()) == larger.numel() - part.numel()
        saved = (grad_out, q, k, v, out, lse, *edges)
        done: list[Tensor] = []
        backward = bind_backward(*saved, kernels=Kernels(), **how)
        grads = backward(*saved, keys_done=lambda *x: done.extend(x.clone() for x in x))
        assert all(torch.equal(x, y) for x, y in zip(done, grads[1:], strict=True))
    finally:
        torch.empty, torch.empty_strided = empty, empty_strided
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    mask = reference.visible(lo, hi, keys)
    if len(edges) == 3:
        mask = mask & (edges[2] != 0)[:, None]
    want, want_lse = reference.attention(*wide, mask, scale=how["scale"], softcap=how["softcap"])
    exact = torch.autograd.grad(want, wide, grad_out.double())
    pairs = zip(("out", "dq", "dk", "dv"), (out, *grads), (want, *exact), strict=True)
    found = {name: float((mine - true).norm() / true.norm()) for name, mine, true in pairs}
    seen = want_lse > -torch.inf
    found["lse"] = float((lse - want_lse)[seen].abs().max())
    found["lse of nothing"] = float((lse[~seen] > -torch.inf).sum())
    found["layout"] = float(not all(x.transpose(1, 2).is_contiguous() for x in (out, *grads)))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, seed = json.loads(sys.argv[1]), int(sys.argv[2])
    torch.manual_seed(seed)
    for case in cases:
        print(json.dumps(errors(case)), flush=True)
