"""The Triton kernels against the float64 reference, on a CUDA device."""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from softcap_runtime import reference
from softcap_runtime.cuda.cubin import Cubin, CubinSpec
from softcap_runtime.cuda.driver import LoadedCubin
from softcap_runtime.cuda.options import BlockOptions, Direction, choose, device_limits
from softcap_runtime.cuda.triton import build as triton_build
from softcap_runtime.cuda.triton.attention import bind_forward
from softcap_runtime.cuda.triton.gradient import bind_backward
from softcap_runtime.masks.intervals import RowIntervals, with_kept

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORWARD_ERROR = {BF16: 4e-3, FP16: 6e-4, FP32: 3e-6}
BACKWARD_ERROR = {BF16: 7e-3, FP16: 1e-3, FP32: 5e-6}


@functools.cache
def loaded(device: int, spec: CubinSpec) -> LoadedCubin:
    return LoadedCubin(Cubin.unpack(triton_build.build(spec)), device)


class Kernels(NamedTuple):
    device: int

    def function(self, spec: CubinSpec) -> LoadedCubin:
        return loaded(self.device, spec)

    def options(self, q: Tensor, direction: Direction) -> BlockOptions:
        return choose(device_limits(self.device), q.dtype, q.shape[-1], direction)


def forward(*tensors: Tensor, edges: tuple[Tensor, ...] = (), **how: Any) -> tuple[Tensor, Tensor]:
    tensors += edges
    how.setdefault("train", True)
    return bind_forward(*tensors, kernels=Kernels(tensors[0].device.index), **how)(*tensors)


def backward(*tensors: Tensor, edges: tuple[Tensor, ...] = (), **how: Any) -> tuple[Tensor, ...]:
    tensors += edges
    how.pop("train", None)  # a backward is of training
    return bind_backward(*tensors, kernels=Kernels(tensors[0].device.index), **how)(*tensors)


class Case(NamedTuple):
    """One call and the dense mask it stands for."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    options: dict[str, Any]
    mask: Tensor


def make(
    *, batch: int = 2, heads: int = 4, kv_heads: int = 2, rows: int = 200, keys: int = 200, dim: int = 64,
    dtype: torch.dtype = BF16, softcap: float | None = 50.0, kind: str = "causal", spread: float = 1.0,
    approx: bool = False, gluon: bool | None = None,
) -> Case:  # fmt: skip
    """Fresh random inputs, with logits of a standard deviation near 3 times ``spread``."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float32)

    q = (draw(batch, rows, heads, dim) * spread * 3).to(dtype).transpose(1, 2)
    k = draw(batch, kv_heads, keys, dim).to(dtype)
    v = draw(batch, kv_heads, keys, dim).to(dtype)
    grad = draw(batch, rows, heads, dim).to(dtype).transpose(1, 2)
    options, lo, hi = mask_of(kind, batch, rows, keys)
    options |= {"scale": dim**-0.5, "softcap": softcap, "approx": approx, "gluon": gluon}
    mask = reference.visible(lo, hi, keys)
    if len(options.get("edges", ())) == 3:
        mask = mask & (options["edges"][2] != 0)[:, None]
    return Case(q, k, v, grad, options, mask)


def mask_of(kind: str, batch: int, rows: int, keys: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The arguments of a mask kind, and its intervals ``[B, rows]``; "... with holes" hides keys besides."""
    if kind.endswith(" with holes"):
        _, lo, hi = mask_of(kind.removesuffix(" with holes"), batch, rows, keys)
        share = torch.tensor([0.9, 0.998, 0.2], device="cuda")[:batch, None]
        made = RowIntervals(rows, keys, None, None, lo.contiguous(), hi.contiguous())
        made = with_kept(made, torch.rand(batch, keys, device="cuda") < share)
        return {"edges": made.vectors}, lo, hi
    at = torch.arange(rows, device="cuda", dtype=torch.int32).expand(batch, rows)
    offset = keys - rows
    bands = {"full": (None, None), "causal": (None, offset + 1), "window": (offset - 36, offset + 1),
             "two-sided": (offset - 20, offset + 21), "nothing": (keys + 9, keys + 12)}  # fmt: skip
    if kind in bands:
        left, right = bands[kind]
        lo = torch.zeros_like(at) if left is None else at + left
        hi = torch.full_like(at, keys) if right is None else at + right
        return {"left": left, "right": right}, lo, hi
    if kind == "documents":
        ends = torch.randint(20, 90, (batch, 1), device="cuda", dtype=torch.int32)
        lo, hi = at // ends * ends, at + 1
    elif kind == "left padding":
        pad = torch.arange(batch, device="cuda", dtype=torch.int32)[:, None] * 77
        lo, hi = pad.expand(batch, rows), torch.where(at >= pad, at + 1 + offset, pad)
    elif kind == "shared":
        lo, hi = (at[:1] - 40).clamp_min(0), (at[:1] + 9).clamp_max(keys)
    elif kind == "random":
        lo = torch.randint(-9, keys, (batch, rows), device="cuda", dtype=torch.int32)
        hi = torch.randint(0, keys + 9, (batch, rows), device="cuda", dtype=torch.int32)
    else:
        raise ValueError(kind)
    return {"edges": (lo, hi)}, lo, hi


def relative(value: Tensor, wanted: Tensor) -> float:
    """``|value - wanted| / |wanted|``; both zero counts as exact."""
    if not wanted.any():
        return float(value.double().abs().max())
    return float((value.double() - wanted).norm() / wanted.norm())


def check(case: Case, forward_error: float | None = None, backward_error: float | None = None) -> None:
    """Outputs and gradients against float64, rows and gradients that must be exactly 0 included."""
    q, k, v, grad, options, mask = case
    out, lse = forward(q, k, v, **options)
    grads = backward(grad, q, k, v, out, lse, **options)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    wanted, wanted_lse = reference.attention(*wide, mask, scale=options["scale"], softcap=options["softcap"])
    wanted_grads = torch.autograd.grad(wanted, wide, grad.double())
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    empty = torch.isinf(wanted_lse)
    assert torch.equal(torch.isinf(lse), empty)
    assert not out[empty].any()
    assert not grads[0][empty].any()
    assert torch.allclose(lse[~empty].double(), wanted_lse[~empty], atol=5e-4 if forward_error is None else 5e-2)
    assert relative(out, wanted.detach()) < (forward_error or FORWARD_ERROR[q.dtype])
    for name, value, want in zip(("dq", "dk", "dv"), grads, wanted_grads, strict=True):
        assert torch.isfinite(value).all(), name
        assert relative(value, want) < (backward_error or BACKWARD_ERROR[q.dtype]), name
    unseen = ~case.mask.any(1) if len(case.mask) == len(k) else ~case.mask.any(1).expand(len(k), -1)
    assert not grads[1].transpose(1, 2)[unseen].any()
    assert not grads[2].transpose(1, 2)[unseen].any()


@pytest.mark.parametrize(("dtype", "dim"), list(itertools.product((BF16, FP16, FP32), (64, 96, 128, 256))))
@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_every_dtype_and_head_dim(seed: int, dtype: torch.dtype, dim: int, kind: str) -> None:
    check(make(dtype=dtype, dim=dim, kind=kind))


# Few columns make little of bfloat16's rounding of out, from which the gradients start, average out.
@pytest.mark.parametrize(
    ("dtype", "dim"), [(BF16, 33), (BF16, 80), (BF16, 160), (FP32, 1), (FP32, 20), (FP32, 72), (FP32, 200)]
)
def test_tiles_wider_than_a_head(seed: int, dtype: torch.dtype, dim: int) -> None:
    check(make(dtype=dtype, dim=dim))
    check(make(dtype=dtype, dim=dim, kind="documents", rows=257, keys=257))
    check(make(dtype=dtype, dim=dim, rows=2, keys=1500))


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="the Gluon kernels are for compute capability 9.0")


@on_hopper
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_gluon_head_dims(seed: int, dim: int, kind: str) -> None:
    check(make(dim=dim, kind=kind, gluon=True))
    check(make(dim=dim, kind=kind, gluon=True, batch=1, rows=2050, keys=2050, heads=3, kv_heads=3))
    check(make(dim=dim, kind=kind, gluon=True, dtype=FP16))


@on_hopper
@pytest.mark.parametrize(
    "kind", ["full", "window", "two-sided", "nothing", "left padding", "shared", "random", "documents"]
)
@pytest.mark.parametrize(("rows", "keys"), [(200, 200), (129, 1030), (70, 333), (333, 70)])
def test_gluon_masks(seed: int, kind: str, rows: int, keys: int) -> None:
    for dim in (128, 256):
        check(make(kind=kind, rows=rows, keys=keys, dim=dim, gluon=True))


@on_hopper
@pytest.mark.parametrize("kind", ["causal", "window", "two-sided", "documents", "random"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gluon_holes(seed: int, dim: int, kind: str) -> None:
    """Blocks of edges and holes, of holes alone, and of neither; keys that are no multiple of a block."""
    for rows, keys in ((700, 700), (500, 1333), (1100, 1100)):
        for softcap, dtype, train in ((50.0, BF16, True), (50.0, FP16, True), (None, BF16, True), (50.0, BF16, False)):
            case = make(batch=3, dim=dim, kind=f"{kind} with holes", rows=rows, keys=keys, softcap=softcap,
                        dtype=dtype, gluon=True)  # fmt: skip
            case.options["train"] = train
            check(case)


@on_hopper
@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 64.0, 80.0, 1000.0, None])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gluon_softcaps(seed: int, softcap: float | None, dtype: torch.dtype) -> None:
    case = make(softcap=softcap, dtype=dtype, kind="window", dim=128, gluon=True)
    check(case)
    check(case._replace(options=case.options | {"train": False}))


@on_hopper
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e6, 1e8])
def test_gluon_scales(seed: int, scale: float) -> None:
    """Logits on both sides of where the series ends, from products of which float32 holds the powers or not."""
    case = make(dim=128, rows=700, keys=700, spread=3.0, gluon=True)
    q = (case.q.float() * (case.options["scale"] / scale)).to(BF16)
    case = case._replace(q=q, options=case.options | {"scale": scale})
    check(case)
    check(case._replace(options=case.options | {"train": False}))


@on_hopper
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_gluon_gqa(seed: int, heads: int, kv_heads: int) -> None:
    for dim in (128, 256):
        check(make(heads=heads, kv_heads=kv_heads, dim=dim, rows=700, keys=700, kind="window", gluon=True))


@on_hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gluon_layouts_written_elements_and_repeats(seed: int, dim: int) -> None:
    case = make(dim=dim, rows=257, keys=257, gluon=True)
    padded = torch.randn(2, 2, 270, dim, device="cuda").to(BF16)[:, :, 5:262]
    case = case._replace(k=padded, v=padded, q=case.q.contiguous())
    poison = [torch.full((2**n,), float("nan"), device="cuda") for n in range(8, 22) for _ in range(4)]
    del poison
    check(case)

    def run() -> list[Tensor]:
        out, lse = forward(*case[:3], **case.options)
        return [out, lse, *backward(case.grad, *case[:3], out, lse, **case.options)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@on_hopper
@pytest.mark.parametrize("softcap", [50.0, None])
def test_gluon_hides_no_nan(seed: int, softcap: float | None) -> None:
    case = make(softcap=softcap, dim=128, gluon=True)
    key = case.k.clone()
    key[0, 1, 150, 3] = float("nan")
    out, lse = forward(case.q, key, case.v, **case.options)
    assert out[0, 2, 199].isnan().all()
    assert lse[0, 2, 199].isnan()
    assert torch.isfinite(out[1]).all()
    grads = backward(case.grad, case.q, key, case.v, out, lse, **case.options)
    assert all(grad[0].isnan().any() for grad in grads)


@on_hopper
def test_gluon_tanh_instruction(seed: int) -> None:
    for dim in (128, 256):
        check(make(approx=True, dim=dim, gluon=True), 2e-2, 3e-2)


def eager_errors(case: Case, wanted: tuple[Tensor, ...]) -> list[float]:
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    out, _ = reference.attention(*leaves, case.mask, scale=case.options["scale"], softcap=case.options["softcap"])
    return [relative(x, y) for x, y in zip(torch.autograd.grad(out, leaves, case.grad), wanted, strict=True)]


@pytest.mark.parametrize("gluon", [False, pytest.param(True, marks=on_hopper)])
@pytest.mark.parametrize("dim", [128, 256])
def test_the_only_key_is_the_output_of_training(seed: int, dim: int, gluon: bool) -> None:
    """It is divided by the sum of the weights as they are rounded; by their own sum it would be off by up to 2**-8."""
    case = make(rows=257, keys=257, dim=dim, gluon=gluon)
    out, _ = forward(*case[:3], **case.options | {"left": 0, "right": 1})
    assert torch.equal(out, case.v.repeat_interleave(2, 1))


def stored_output_errors(case: Case, out: Tensor, wanted: tuple[Tensor, ...]) -> list[float]:
    """The errors of gradients that know the float64 output ``out`` only as it is stored, in the dtype of q.

    They take delta, rowsum(dO * O), from it (FlashAttention-2, Dao 2023): dp - delta is off by the rounding of O.
    """
    q, k = case.q.double(), case.k.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    tanh = torch.tanh(q @ k.mT * case.options["scale"] / case.options["softcap"])
    weights = (tanh * case.options["softcap"]).masked_fill(~case.mask[:, None], -torch.inf).softmax(-1)
    delta_error = (case.grad.double() * (out - out.to(case.q.dtype))).sum(-1, keepdim=True)
    ds_error = weights * (1 - tanh**2) * delta_error * case.options["scale"]
    dk_error = (ds_error.mT @ q).unflatten(1, (case.k.shape[1], -1)).sum(2)
    dq, dk, _ = wanted
    return [float((ds_error @ k).norm() / dq.norm()), float(dk_error.norm() / dk.norm()), 0.0]


@pytest.mark.parametrize("gluon", [False, pytest.param(True, marks=on_hopper)])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0, 30.0])
def test_gradients_at_saturated_logits(seed: int, spread: float, dim: int, gluon: bool) -> None:
    """All inputs times ``spread``: never worse than eager's, whose logits bfloat16 rounds, and a stored output's."""
    case = make(batch=1, rows=1024, keys=1024, dim=dim, gluon=gluon)
    case = case._replace(q=case.q / 3 * spread, k=case.k * spread, v=case.v * spread)
    wide = [x.double().requires_grad_() for x in case[:3]]
    out, _ = reference.attention(*wide, case.mask, scale=case.options["scale"], softcap=50.0)
    wanted = torch.autograd.grad(out, wide, case.grad.double())
    mine, lse = forward(*case[:3], **case.options)
    found = backward(case.grad, *case[:3], mine, lse, **case.options)
    assert relative(mine, out.detach()) < 2.5e-3
    errors = [relative(x, y) for x, y in zip(found, wanted, strict=True)]
    allowed = zip(eager_errors(case, wanted), stored_output_errors(case, out.detach(), wanted), strict=True)
    assert all(error < eager + stored for error, (eager, stored) in zip(errors, allowed, strict=True)), errors


@pytest.mark.parametrize("dim", [80, 200])
@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_tiles_wider_than_a_head_through_tensor_maps(seed: int, dim: int, kind: str) -> None:
    check(make(batch=1, heads=16, kv_heads=8, rows=2000, keys=2000, dim=dim, kind=kind))


@pytest.mark.parametrize(
    "kind", ["full", "window", "two-sided", "nothing", "left padding", "shared", "random", "documents"]
)
@pytest.mark.parametrize(("rows", "keys"), [(200, 200), (129, 130), (70, 333), (333, 70)])
def test_every_mask_kind(seed: int, kind: str, rows: int, keys: int) -> None:
    check(make(kind=kind, rows=rows, keys=keys))


@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 64.0, 80.0, 1000.0, 1e5, 1e9, None])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_softcaps_and_large_logits(seed: int, softcap: float | None, dtype: torch.dtype) -> None:
    check(make(softcap=softcap, dtype=dtype, kind="window"))
    if softcap is not None and softcap < 100 and dtype == BF16:
        check(make(softcap=softcap, spread=100.0), 2e-2, 1.0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_gqa(seed: int, heads: int, kv_heads: int) -> None:
    check(make(heads=heads, kv_heads=kv_heads, dim=128, rows=300, keys=300, kind="window"))


@pytest.mark.parametrize(("dim", "dtype"), [(64, BF16), (128, BF16), (256, BF16), (128, FP16), (128, FP32), (96, BF16)])
@pytest.mark.parametrize(("rows", "kind"), [(1, "causal"), (5, "window"), (3, "random"), (1, "left padding")])
def test_decoding(seed: int, dim: int, dtype: torch.dtype, rows: int, kind: str) -> None:
    check(make(heads=8, kv_heads=2, rows=rows, keys=2113, dim=dim, dtype=dtype, kind=kind, softcap=30.0))


def test_the_approximate_tanh_and_its_error(seed: int) -> None:
    # tanh.approx.f32 is off by 2**-11 of tanh, so a logit by up to 50 * 5e-4 = 0.024.
    check(make(approx=True, dim=128), 2e-2, 3e-2)
    case = make(approx=True, dim=128)
    exact, _ = forward(*case[:3], **(case.options | {"approx": False}))
    approximate, _ = forward(*case[:3], **case.options)
    assert not torch.equal(exact, approximate)


def test_strided_unaligned_and_expanded_inputs(seed: int) -> None:
    case = make(dim=64, rows=150, keys=150)
    wide = torch.randn(2, 150, 4, 200, device="cuda").to(BF16)
    odd = wide[..., 3:67].transpose(1, 2)  # 6 bytes off a 16-byte boundary, row stride 200
    check(case._replace(q=odd))
    padded = torch.randn(2, 2, 170, 64, device="cuda").to(BF16)[:, :, 5:155]
    check(case._replace(k=padded, v=padded))
    ones = torch.ones((), device="cuda", dtype=BF16).expand(2, 4, 150, 64)
    check(case._replace(grad=ones))
    check(case._replace(k=case.k[:1].expand(2, -1, -1, -1), v=case.v[:1].expand(2, -1, -1, -1)))
    transposed = torch.randn(2, 4, 64, 150, device="cuda").to(BF16).transpose(2, 3)
    check(case._replace(q=transposed))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_element_that_is_read_is_written(seed: int, dtype: torch.dtype, dim: int) -> None:
    """The allocator's free blocks are full of NaN, so what a kernel leaves out would show."""
    for rows in (200, 257):
        case = make(dim=dim, rows=rows, keys=rows, dtype=dtype)
        poison = [torch.full((2**n,), float("nan"), device="cuda") for n in range(8, 22) for _ in range(4)]
        del poison
        check(case)


@pytest.mark.parametrize("gluon", [False, pytest.param(True, marks=on_hopper)])
@pytest.mark.parametrize("kind", ["window", "documents"])
@pytest.mark.parametrize("rows", [300, 3000])  # fewer and more tiles than multiprocessors
def test_parts_of_an_output_beside_an_exchange(seed: int, gluon: bool, kind: str, rows: int) -> None:
    """Bit for bit as alone, wherever the output lies and however many programs there are."""
    case = make(dim=256, rows=rows, keys=rows, heads=8, kv_heads=4, kind=kind, gluon=gluon)
    q, k, v, grad, options, _ = case
    how = {**options, "kernels": Kernels(0), "beside": True}
    edges = how.pop("edges", ())
    out, lse = forward(q, k, v, **options)
    larger = torch.full((2, rows + 8, 10, 256), float("nan"), device="cuda", dtype=q.dtype)
    part = larger[:, 8:, 1:-1].transpose(1, 2)
    side_by_side = torch.stack([x.permute(2, 0, 1, 3) for x in (k, v)], 1)  # as they travel
    keys, values = (x.permute(1, 2, 0, 3) for x in side_by_side.unbind(1))
    run = bind_forward(q, keys, values, *edges, out=part, train=True, **how)
    _, found = run(q, keys, values, *edges, out=part)
    assert torch.equal(part, out)
    assert torch.equal(found, lse)
    assert int(larger.isnan().sum()) == larger.numel() - part.numel()
    want = backward(grad, q, k, v, out, lse, **options)
    done: list[Tensor] = []
    given = (grad, q, k, v, out, lse, *edges)
    grads = bind_backward(*given, **how)(*given, keys_done=lambda *x: done.extend(x.clone() for x in x))
    for mine, alone in zip((*grads, *done), (*want, *want[1:]), strict=True):
        assert torch.equal(mine, alone)


def test_expanded_keys_are_not_copied(seed: int) -> None:
    case = make(batch=1, rows=1, keys=4096, dim=128)
    q = case.q.expand(8, -1, -1, -1).contiguous()
    k, v = (x.expand(8, -1, -1, -1) for x in (case.k, case.v))
    run = bind_forward(q, k, v, kernels=Kernels(0), **case.options)
    run(q, k, v)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = run(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < case.k.numel() * case.k.element_size()
    assert torch.equal(out, run(q, k.contiguous(), v.contiguous())[0])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("softcap", [50.0, 1e5, None])
def test_nan_is_not_hidden(seed: int, dtype: torch.dtype, rows: int, softcap: float | None) -> None:
    case = make(dtype=dtype, rows=rows, keys=200, softcap=softcap)
    key, query = case.k.clone(), case.q.clone()
    key[0, 1, 150, 3], query[1, 2, rows - 1, 5] = float("nan"), float("nan")
    for q, k, spoilt in ((case.q, key, (0, 2, rows - 1)), (query, case.k, (1, 2, rows - 1))):
        out, lse = forward(q, k, case.v, **case.options)
        assert out[spoilt].isnan().all()
        assert lse[spoilt].isnan()
        grads = backward(case.grad, q, k, case.v, out, lse, **case.options)
        assert all(grad[spoilt[0]].isnan().any() for grad in grads)


def test_more_batch_entries_than_a_grid_is_high(seed: int) -> None:
    batch = 65_600
    small: dict[str, Any] = {"batch": batch, "heads": 1, "kv_heads": 1, "dtype": FP32}
    check(make(**small, rows=1, keys=2, dim=64, softcap=30.0))
    check(make(**small, rows=65, keys=65, dim=1, kind="shared"))
    check(make(**small, rows=3, keys=3, dim=8, kind="random"))


def test_two_runs_agree_bit_for_bit(seed: int) -> None:
    case = make(dim=128, rows=700, keys=700, kind="documents")

    def run() -> list[Tensor]:
        out, lse = forward(*case[:3], **case.options)
        return [out, lse, *backward(case.grad, *case[:3], out, lse, **case.options)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_decoding_in_a_cuda_graph(seed: int) -> None:
    case = make(heads=8, kv_heads=4, rows=1, keys=8192, dim=128, kind="left padding")
    want, _ = forward(*case[:3], **case.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = forward(*case[:3], **case.options)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want)


def test_training_in_a_cuda_graph(seed: int) -> None:
    case = make(dim=128, kind="documents")
    out, lse = forward(*case[:3], **case.options)
    want = backward(case.grad, *case[:3], out, lse, **case.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backward(case.grad, *case[:3], out, lse, **case.options)
    for value in got:
        value.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_host_synchronisation(seed: int) -> None:
    case = make(dim=64, kind="documents")
    check(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = forward(*case[:3], **case.options)
        backward(case.grad, *case[:3], out, lse, **case.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams(seed: int) -> None:
    cases = [make(dim=64, kind=kind) for kind in ("causal", "documents")]
    want = [forward(*case[:3], **case.options)[0] for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    got = []
    for stream, case in zip(streams, cases, strict=True):
        with torch.cuda.stream(stream):
            got.append(forward(*case[:3], **case.options)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_memory_is_linear_in_the_length(seed: int) -> None:
    def peak(length: int) -> int:
        case = make(batch=1, heads=2, kv_heads=1, rows=length, keys=length, dim=64)._replace(mask=None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = forward(*case[:3], **case.options)
        grads = backward(case.grad, *case[:3], out, lse, **case.options)
        results = sum(t.numel() * t.element_size() for t in (out, *grads))
        return torch.cuda.max_memory_allocated() - before - results

    assert peak(8192) < 2.2 * peak(4096)
    assert peak(8192) < 8 * 2 * 8192 * 4


def test_a_thread_that_has_not_used_the_device(seed: int) -> None:
    case = make(heads=16, kv_heads=8, rows=1500, keys=1500, dim=128)  # long enough for tensor maps
    want, _ = forward(*case[:3], **case.options)
    run = bind_forward(*case[:3], kernels=Kernels(0), train=True, **case.options)
    torch.cuda.synchronize()
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.append(run(*case[:3])[0]))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(got[0], want)
