"""The engine around the Triton kernels, with the specification in their place: what a CPU can prove of it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from stand_in import tell_of
from support.helpers import Sizes, expected, gradients, make_qkv, relative_error
from torch import Tensor

from softcap_runtime import AttentionConfig, reference
from softcap_runtime.cuda.cubin import CubinSpec
from softcap_runtime.cuda.gluon.options import LONG
from softcap_runtime.cuda.kernel import GpuKernel
from softcap_runtime.cuda.options import BlockOptions, DeviceLimits, Direction, choose, device_limits, triton_version
from softcap_runtime.cuda.paged import bind_paged
from softcap_runtime.cuda.triton import attention as triton_attention
from softcap_runtime.cuda.triton import gradient as triton_gradient
from softcap_runtime.cuda.triton.launch import TMA_FROM
from softcap_runtime.engines import blocked_cuda
from softcap_runtime.engines.blocked_cuda import GpuKernelsOf
from softcap_runtime.engines.engine import Problem
from softcap_runtime.masks.intervals import RowIntervals, band, row_intervals

CONFIG = AttentionConfig(softcap=50.0, scale=0.2)
SIZES = Sizes(2, 4, 2, 40, 40, 64)
NO_KERNELS: Any = SimpleNamespace(function=print)


def problem(mask: RowIntervals, head_dim: int = 64) -> Problem:
    sizes = (SIZES.batch, SIZES.heads, SIZES.kv_heads, head_dim)
    scalars = (CONFIG.scale, CONFIG.softcap)
    return Problem(torch.device("cuda"), torch.float32, *sizes, *scalars, mask, True)


class Bound:
    """Stands in for what binds the kernels, and counts; what it returns is the specification."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards: list[list[tuple[int, ...]]] = []
        self.backwards: list[list[tuple[int, ...]]] = []
        monkeypatch.setattr(triton_attention, "bind_forward", self.bind_forward)
        monkeypatch.setattr(triton_gradient, "bind_backward", self.bind_backward)

    def bind_forward(self, *bound: Tensor, **how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        self.forwards.append([x.stride() for x in bound])

        def run(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
            mask = reference.visible(lo, hi, k.shape[2])
            return reference.attention(q, k, v, mask, scale=how["scale"], softcap=how["softcap"])

        return run

    def bind_backward(self, *bound: Tensor, **how: Any) -> Callable[..., tuple[Tensor, ...]]:
        self.backwards.append([x.stride() for x in bound])

        def run(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            mask = reference.visible(*rest[2:], k.shape[2])

            def attend(*x: Tensor) -> Tensor:
                return reference.attention(*x, mask, scale=how["scale"], softcap=how["softcap"])[0]

            return gradients(attend, (q, k, v), grad_out)[1]

        return run


def test_a_layout_is_bound_once_for_all_masks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Bound(monkeypatch)
    form = row_intervals(40, 40, causal=True, window=None, document_ids=torch.zeros(2, 40, dtype=torch.int32)).form
    forward = blocked_cuda.ENGINE.forward(problem(form), NO_KERNELS)
    backward = blocked_cuda.ENGINE.backward(problem(form), NO_KERNELS)
    layouts = ("transposed", "contiguous")
    for number in range(8):
        q, k, v = make_qkv(SIZES, layout=layouts[number] if number < 2 else random.choice(layouts))
        ids = (torch.rand(2, 40) < 0.2).cumsum(1)
        edges = row_intervals(40, 40, causal=True, window=None, document_ids=ids).vectors
        grad_out = torch.randn(2, 40, 4, 64).transpose(1, 2)
        out, lse = forward(q, k, v, *edges)
        assert lse is not None
        grads = backward(grad_out, q, k, v, out.transpose(1, 2).contiguous().transpose(1, 2), lse, *edges)
        want, want_grads = gradients(lambda *x: expected(*x, CONFIG, document_ids=ids), (q, k, v), grad_out)  # noqa: B023
        for mine, exact in zip((out, *grads), (want, *want_grads), strict=True):
            assert relative_error(mine, exact) <= 3e-6
    assert len(kernels.forwards) == len({str(strides) for strides in kernels.forwards}) == 2
    assert len(kernels.backwards) == len({str(strides) for strides in kernels.backwards}) == 2


def test_layouts_are_bounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Bound(monkeypatch)
    monkeypatch.setattr(blocked_cuda, "MAX_LAYOUTS", 3)
    form = row_intervals(40, 40, causal=True, window=None, document_ids=torch.zeros(1, 40, dtype=torch.int32))
    forward = blocked_cuda.ENGINE.forward(problem(form.form), NO_KERNELS)
    for _ in range(2):
        for width in range(64, 72):
            q, k, v = (torch.randn(2, heads, 40, width)[..., :64] for heads in (4, 2, 2))
            out, _ = forward(q, k, v, *form.vectors)
            assert relative_error(out, expected(q, k, v, CONFIG)) <= 3e-6
    assert len(kernels.forwards) == 16


def test_a_head_dim_beyond_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_cuda, "has_triton", lambda: True)
    mask = band(40, 40, causal=True, window=None)
    for head_dim, refused in ((1, False), (80, False), (256, False), (257, True)):
        assert (blocked_cuda.ENGINE.refuses(problem(mask, head_dim)) is not None) == refused


def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_cuda, "has_triton", lambda: True)
    mask = band(40, 40, causal=True, window=None)
    for version, refused in (("3.2.0", True), ("3.3.1", False), ("4.0.0+git1", False), ("unknown", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        triton_version.cache_clear()
        answer = blocked_cuda.ENGINE.refuses(problem(mask))
        assert (answer is not None and "triton 3.2 is too old" in answer) == refused
    triton_version.cache_clear()


LIMITS = DeviceLimits(227 * 1024, (9, 0), 132)


class Recorded:
    """``Kernels`` of a Hopper card that is not here: it notes what is asked for, and launches nothing."""

    def __init__(self) -> None:
        self.asked: set[GpuKernel] = set()

    def get(self, artifact: GpuKernel) -> Any:
        self.asked.add(artifact)
        return SimpleNamespace(bind=lambda grid, parameters, numbers: lambda *tensors: None)

    def options(self, device: int, dtype: torch.dtype, head_dim: int, direction: Direction) -> BlockOptions:
        return choose(LIMITS, dtype, head_dim, direction)

    def asked_by(self, call: Problem, layout: str = "transposed") -> set[GpuKernel]:
        """What a call asks for, with tensors that have no memory."""
        self.asked.clear()
        kernels: Any = self
        mask, shape = call.mask, (call.batch, call.num_heads, call.mask.q_len)

        def empty(heads: int, length: int) -> Tensor:
            sizes = (call.batch, length, heads, call.head_dim)
            if layout == "contiguous":
                sizes = (call.batch, heads, length, call.head_dim)
            x = torch.empty(sizes, dtype=call.dtype, device="meta")
            return x if layout == "contiguous" else x.transpose(1, 2)

        q, k, v = empty(call.num_heads, mask.q_len), *(empty(call.num_kv_heads, mask.kv_len) for _ in "kv")
        out, lse = blocked_cuda.ENGINE.forward(call, kernels)(q, k, v, *mask.vectors)
        assert lse is not None
        assert (out.shape, lse.shape) == (q.shape, shape)
        if call.train:
            blocked_cuda.ENGINE.backward(call, kernels)(q, q, k, v, out, lse, *mask.vectors)
        assert (blocked_cuda.ENGINE.intervals(call, kernels) is None) == (mask.lo is None)
        return set(self.asked)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    tell_of(LIMITS, monkeypatch.setattr)
    yield Recorded()
    device_limits.cache_clear()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("layout", ["transposed", "contiguous"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "kv_heads", "softcap"),
    [
        (BF16, 256, 8, 4, 50.0),
        (BF16, 128, 128, 8, 50.0),
        (BF16, 64, 4, 4, 50.0),
        (BF16, 128, 16, 8, None),
        (BF16, 256, 8, 4, 2000.0),
        (FP16, 128, 4, 4, 50.0),
        (FP32, 64, 16, 1, 50.0),
        (BF16, 20, 6, 2, 50.0),
        (BF16, 72, 40, 1, 50.0),
    ],
    ids=str,
)
def test_what_is_listed_is_what_calls_ask_for(
    dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, softcap: float | None, train: bool, layout: str,
    seed: int, recorded: Recorded,
) -> None:  # fmt: skip
    """A call's own list exactly; and of all lengths, batches and windows no call asks for what prewarming left out."""
    kernels: Any = recorded
    group = heads // kv_heads
    for packed in (False, True):

        def call(batch: int, rows: int, keys: int, window: int | None, holes: bool, packed: bool = packed) -> Problem:
            mask = band(rows, keys, causal=True, window=window)
            if packed:
                several = random.choice([1, batch])
                edge, kept = (torch.empty(several, size, dtype=torch.int32, device="meta") for size in (rows, keys))
                mask = RowIntervals(rows, keys, None, None, edge, edge, kept if holes else None)
            sizes = (batch, heads, kv_heads, head_dim)
            return Problem(torch.device("cuda", 0), dtype, *sizes, 0.1, softcap, mask, train)

        recorded.asked.clear()
        alike = blocked_cuda.ENGINE.alike(call(2, 77, 77, None, False))
        listed = {one for each in alike for one in blocked_cuda.ENGINE.artifacts(each, kernels)}
        assert not recorded.asked, "to list is to ask for nothing"
        few = [rows for rows in (1, 2, 3, 5, 16 // group, 17 // group, 32 // group, 33 // group, 64 // group) if rows]
        shapes = [(1, rows, keys) for rows in few for keys in (rows + 1, 1000, 60_000, 2**20)]
        shapes += [(batch, length, length) for batch in (1, 3) for length in (1, 64, 129, 4096, 40_000)]
        # At the lengths from which a kernel of so many products takes its tiles another way, and below.
        near = [math.isqrt(TMA_FROM // (products * heads * head_dim)) for products in range(1, 9)]
        shapes += [(1, length + more, length + more) for length in near for more in (0, 1)]
        shapes += [(256, LONG - 1, LONG - 1)]  # as many products as long inputs, over few keys
        shapes += [(random.randint(1, 64), *sorted(random.choices(range(1, 9000), k=2))) for _ in range(20)]
        met = set()
        for shape in shapes:
            for window, holes in itertools.product((None, 1, random.randint(1, 5000)), (False, True)):
                one = call(*shape, window, holes)
                asked = recorded.asked_by(one, layout)
                assert set(blocked_cuda.ENGINE.artifacts(one, kernels)) == asked, shape
                met |= asked
        assert met <= listed
        # In training a call of one row is its own kind: what is listed for inference alone is met there.
        assert listed <= met, "prewarming builds what no call needs"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "kv_heads", "softcap"),
    [
        (BF16, 256, 8, 4, 50.0),
        (BF16, 128, 40, 1, 50.0),
        (FP16, 64, 6, 2, None),
        (BF16, 256, 8, 4, 2000.0),
        (FP32, 64, 16, 1, 50.0),
    ],
    ids=str,
)
def test_paged_calls_ask_for_what_is_listed(
    dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, softcap: float | None, recorded: Recorded
) -> None:
    """Whatever the pages' size, the window, the number of rows and whether they lie side by side."""
    kernels: Any = recorded
    mask = band(1, 1, causal=True, window=None)
    device = torch.device("cuda", 0)
    problem = Problem(device, dtype, 1, heads, kv_heads, head_dim, 0.1, softcap, mask, False)
    listed = set(blocked_cuda.paged_artifacts(problem, kernels))
    assert not recorded.asked, "to list is to ask for nothing"
    for rows, page_size, length, sequences, ragged, window in itertools.product(
        (1, 2, 4, 8, 16, 31, 100), (16, 64, 256), (1, 5000, 200_000), (1, 40), (False, True), (None, 100)
    ):
        q = torch.empty(1 if ragged else sequences, rows, heads, head_dim, dtype=dtype, device="meta")
        k = torch.empty(9, page_size, kv_heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        table = torch.empty(sequences, -(-length // page_size), dtype=torch.int32, device="meta")
        bind_paged(
            q.transpose(1, 2), k, k, table, ragged=ragged, kernels=GpuKernelsOf(kernels, 0), scale=0.1, softcap=softcap,
            left=None if window is None else 1 - window, right=1,
        )  # fmt: skip
    assert set(recorded.asked) == listed


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_a_long_training_call_on_hopper_is_computed_by_gluon(head_dim: int, packed: bool, recorded: Recorded) -> None:
    mask = band(5000, 5000, causal=True, window=None)
    if packed:
        mask = RowIntervals(5000, 5000, None, None, *[torch.empty(1, 5000, dtype=torch.int32, device="meta")] * 2)
    call = Problem(torch.device("cuda", 0), BF16, 1, 8, 4, head_dim, 0.1, 50.0, mask, True)
    others = {"statistics_kernel", *(["query_hull_kernel", "row_intervals_kernel"] if packed else [])}
    listed = [one.spec.kernel for one in blocked_cuda.ENGINE.artifacts(call, cast(Any, recorded))]
    assert {name for name in listed if not name.startswith("gluon_")} == others
    assert len(listed) == len(others) + (4 if head_dim == 256 else 3)


class Launches:
    """Notes the kernels that are launched, and with how many programs."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def function(self, spec: CubinSpec) -> Any:
        def bind(grid: tuple[int, int, int], *_: Any) -> Callable[..., None]:
            return lambda *tensors: self.seen.append((spec.kernel, grid[0]))

        return SimpleNamespace(bind=bind)

    def options(self, q: Tensor, direction: Direction) -> BlockOptions:
        return choose(device_limits(0), q.dtype, q.shape[-1], direction)


def test_gradients_of_keys_come_first_and_beside_an_exchange_a_program_is_a_tile(recorded: Recorded) -> None:
    rows = 3000
    q, k = (torch.empty(1, rows, heads, 256, dtype=BF16, device="meta").transpose(1, 2) for heads in (16, 8))
    lse = torch.empty(1, 16, rows, device="meta")
    how = {"scale": 0.1, "softcap": 50.0, "left": -400, "right": 1, "gluon": True}
    for beside in (False, True):
        kernels = Launches()
        seen: Any = kernels.seen
        triton_attention.bind_forward(q, k, k, kernels=kernels, beside=beside, **how)(q, k, k)
        saved = (q, q, k, k, q, lse)
        backward = triton_gradient.bind_backward(*saved, kernels=kernels, beside=beside, **how)
        backward(*saved, keys_done=lambda *_: seen.append(("keys are done", 0)))  # noqa: B023
        names = [name for name, _ in seen]
        assert names[:1] == ["gluon_forward_kernel"]
        assert names[2:] == ["gluon_dkdv_kernel"] * 2 + ["keys are done", "gluon_dq_kernel"]
        programs = dict(seen)
        tiles = 16 * -(-rows // 128)
        assert programs["gluon_forward_kernel"] == programs["gluon_dq_kernel"] == (tiles if beside else 132)
        assert programs["gluon_dkdv_kernel"] == 132


def test_an_odd_layout_asks_for_kernels_of_its_own(recorded: Recorded) -> None:
    kernels: Any = recorded
    mask = band(300, 300, causal=True, window=None)
    call = Problem(torch.device("cuda", 0), torch.bfloat16, 1, 4, 2, 64, 0.1, 50.0, mask, False)
    q, k, v = (torch.empty(1, heads, 300, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    odd = torch.empty(1, 4, 300, 65, dtype=torch.bfloat16, device="meta")[..., :64]
    forward = blocked_cuda.ENGINE.forward(call, kernels)
    forward(q, k, v)
    forward(odd, k, v)
    assert sorted(one.spec.aligned for one in recorded.asked) == [False, True]


def test_a_gpu_kernel_can_be_asked_of_a_child_process() -> None:
    spec = CubinSpec("dq_kernel", 90, "bfloat16", ("*bf16", ""), "if", True, (("BAND", False), ("D", 128)), 4, 2)
    assert CubinSpec.of_json(json.dumps(spec)) == spec
