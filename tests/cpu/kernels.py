"""The CPU library as its tests call it: one build, one arithmetic, any problem, nothing between them and it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from support.helpers import Sizes as Sizes
from support.helpers import make_qkv
from support.rounding import gradient_errors, output_error
from torch import Tensor

from softcap_runtime import AttentionConfig, reference
from softcap_runtime.artifacts.lifecycle import Artifacts
from softcap_runtime.cpu.library import CpuLibrary, Library
from softcap_runtime.engines.blocked_cpu import ENGINE
from softcap_runtime.engines.engine import Problem
from softcap_runtime.masks.intervals import RowIntervals, band, clipped, dense

SINGLE, PAIRS, TILES = 1, 2, 3
CPU = torch.device("cpu")
# float32: the stated figures. Else half a step of the dtype for each rounding: of a weight and of the output; a
# gradient sees both through delta, and its own and that of the logit's gradient.
STORED = {torch.float32: 5e-7, torch.bfloat16: 2 * 2.0**-9, torch.float16: 2 * 2.0**-11}
STORED_GRADIENT = {torch.float32: 7e-7, torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-11}
HEAD_DIMS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 96, 127, 128, 129, 160, 192, 256, 257, 320]


class Kernel(NamedTuple):
    """One way in which the library computes: for whom it is compiled, the inputs' dtype, the products of bfloat16."""

    capability: str
    dtype: torch.dtype
    arithmetic: int

    def __str__(self) -> str:
        names = {SINGLE: "single", PAIRS: "pairs", TILES: "tiles"}
        return f"{self.capability or 'native'}-{str(self.dtype)[6:]}-{names[self.arithmetic]}"


NATIVE = [
    Kernel("", torch.float32, SINGLE),
    Kernel("", torch.float16, SINGLE),
    *(Kernel("", torch.bfloat16, how) for how in (SINGLE, PAIRS, TILES)),
]
NARROW = [
    Kernel(capability, dtype, SINGLE)
    for capability in ("AVX2", "DEFAULT")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


class Libraries:
    """The builds of the session's cache, each made and loaded once."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts

    def __call__(self, kernel: Kernel) -> Library:
        capability = kernel.capability or torch.backends.cpu.get_cpu_capability()
        found: Library = self._artifacts.get(CpuLibrary(capability))
        return found._replace(arithmetic=kernel.arithmetic)


def problem_of(
    q: Tensor, k: Tensor, mask: RowIntervals, scale: float, softcap: float | None, train: bool = True
) -> Problem:
    batch, heads, _, head_dim = q.shape
    return Problem(CPU, q.dtype, batch, heads, k.shape[1], head_dim, scale, softcap, mask, train)


def attend(library: Library, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Out and the logsumexp."""
    kernels: Any = SimpleNamespace(get=lambda artifact: library)
    out, lse = ENGINE.forward(problem, kernels)(q, k, v, *problem.mask.vectors)
    return out, lse if lse is not None else torch.empty(0)


def differentiate(library: Library, problem: Problem, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of grad_out, q, k, v, out and the logsumexp: the gradients of q, k and v."""
    kernels: Any = SimpleNamespace(get=lambda artifact: library)
    return ENGINE.backward(problem, kernels)(*tensors, *problem.mask.vectors)


class Call(NamedTuple):
    """A drawn problem; ``seed`` makes its inputs."""

    sizes: Sizes
    mask: RowIntervals
    scale: float
    softcap: float | None
    layout: str
    seed: int
    threads: int

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and grad_out."""
        torch.manual_seed(self.seed)
        return *make_qkv(self.sizes, dtype, self.layout), make_qkv(self.sizes, dtype)[0]


class Exact(NamedTuple):
    """What a call gives in float64, and what rounding may do to it; ``wanted``: of out and the gradients."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    lse: Tensor
    wanted: list[tuple[str, Tensor, Tensor]]


def exact(call: Call, dtype: torch.dtype) -> Exact:
    """The specification's results (see ``rounding`` for the bounds)."""
    q, k, v, grad_out = call.inputs(dtype)
    seen = dense(call.mask, CPU)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*leaves, seen, scale=call.scale, softcap=call.softcap)
    config = AttentionConfig(softcap=call.softcap, scale=call.scale)
    # A logit is a sum of head_dim products in parts of at most 128; what is left of the inputs' dtype is nothing.
    eps = 4 * torch.finfo(torch.float32).eps
    results = (out.detach(), *torch.autograd.grad(out, leaves, grad_out.double()))
    bounds = [output_error(q, k, v, config, seen, eps, STORED[dtype])]
    bounds += gradient_errors((q, k, v), grad_out, config, seen, eps, STORED_GRADIENT[dtype])
    return Exact((q, k, v, grad_out), lse.detach(), list(zip(("out", "dq", "dk", "dv"), results, bounds, strict=True)))


def check(library: Library, call: Call, dtype: torch.dtype, known: Exact | None = None) -> None:
    """Results against the specification in float64, each within what rounding may do; ``known`` if it is computed."""
    (q, k, v, grad_out), want_lse, wanted = known or exact(call, dtype)
    problem = problem_of(q, k, call.mask, call.scale, call.softcap)
    before = torch.get_num_threads()
    torch.set_num_threads(call.threads)
    try:
        out, lse = attend(library, problem, q, k, v)
        grads = differentiate(library, problem, grad_out, q, k, v, out, lse)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    there = ~want_lse.isneginf()
    # Of what a cap bounds, and of sums of squares: some ulps of the cap, or of the logits' own size.
    size = 1 + want_lse[there].abs() + (call.softcap or 0) + (q.double().norm(dim=-1)[there] * call.scale)
    assert bool(((lse - want_lse)[there].abs() <= STORED[dtype] + 1e-6 * size).all())
    for (name, want, bound), got in zip(wanted, (out, *grads), strict=True):
        close(name, got, want, bound)


def close(name: str, got: Tensor, want: Tensor, bound: Tensor) -> None:
    """By the norms of the error and of its bound; what is exactly 0 must be 0 (rows that see nothing, hidden keys)."""
    assert (got.shape, bool(got.isfinite().all())) == (want.shape, True), name
    error, most = float((got.double() - want).norm()), float(bound.norm())
    assert error <= most, f"{name}: off by {error:.1e}, rounding allows {most:.1e} of {float(want.norm()):.1e}"
    assert not got[bound == 0].any(), name


@st.composite
def calls(draw: st.DrawFn, max_len: int = 160, few_rows: bool = False) -> Call:
    """Any problem: simple ones first."""
    lengths = st.one_of(st.integers(1, 20), st.integers(1, max_len))
    kv_len = draw(lengths)
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    few = st.one_of(st.integers(1, 8 // group), st.integers(1, 64 // group))
    q_len = draw(few if few_rows else st.one_of(st.just(kv_len), lengths))
    batch = draw(st.integers(1, 3))
    sizes = Sizes(batch, kv_heads * group, kv_heads, q_len, kv_len, draw(st.sampled_from(HEAD_DIMS)))
    caps = st.sampled_from([0.1, 1.0, 30.0, 50.0, 64.0, 64.5, 1000.0])
    return Call(
        sizes,
        draw(masks(batch, q_len, kv_len)),
        sizes.head_dim**-0.5 * draw(st.floats(0.5, 2.0)),
        draw(st.one_of(st.none(), caps, st.floats(0.1, 1000.0))),
        draw(st.sampled_from(["transposed", "contiguous", "fused", "expanded"])),
        draw(st.integers(0, 2**31 - 1)),
        draw(st.sampled_from([1, 1, 2, 4, 7])),
    )


@st.composite
def masks(draw: st.DrawFn, batch: int, q_len: int, kv_len: int) -> RowIntervals:
    """A band, or intervals of any kind: rows apart, in any order, of nothing, those of one batch row or of each."""
    kind = draw(st.sampled_from(["causal", "window", "band", "intervals"]))
    if kind in ("causal", "window"):
        window = draw(st.integers(1, kv_len + 2)) if kind == "window" else None
        return band(q_len, kv_len, causal=draw(st.booleans()), window=window)
    position = st.integers(-3, kv_len + 3)
    if kind == "band":
        left, right = draw(position), draw(position)
        return RowIntervals(q_len, kv_len, left - q_len, right, None, None)
    rows = draw(st.sampled_from([1, batch]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    lo, hi = (torch.randint(-3, kv_len + 4, (rows, q_len), generator=generator, dtype=torch.int32) for _ in "lh")
    if draw(st.booleans()):  # as packed sequences have them
        lo, hi = lo.sort(1).values, hi.sort(1).values
    return clipped(q_len, kv_len, lo, hi)
