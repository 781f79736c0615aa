"""The torch operator: what torch's own machinery asks of it, outside of compilation."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from support.helpers import (
    HEAD_DIM,
    NEEDS_FLEX,
    UNCAPPED_HEAD_DIM,
    Block,
    Sizes,
    Wrapped,
    expected,
    gradients,
    in_model_order,
    make_qkv,
    relative_error,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from softcap_runtime import AttentionConfig, Runtime
from softcap_runtime.masks.intervals import band, row_intervals

OP = torch.ops.softcap_runtime.attention
CONFIG = AttentionConfig(softcap=50.0, scale=0.125)


def arguments(runtime: Runtime, engine: str, masked: bool, train: bool, softcap: float | None = 50.0) -> tuple:
    """Of the operator: q, k, v, lo, hi, left, right, scale, softcap, engine, train, runtime."""
    head_dim = UNCAPPED_HEAD_DIM if softcap is None else HEAD_DIM
    q, k, v = (x.requires_grad_(train) for x in make_qkv(Sizes(2, 4, 2, 19, 23, head_dim)))
    mask = band(19, 23, causal=True, window=7)
    if masked:
        padding = torch.ones(2, 23, dtype=torch.int64)
        padding[0, :9] = 0
        mask = row_intervals(19, 23, causal=True, window=7, attention_mask=padding)
    return (q, k, v, mask.lo, mask.hi, mask.left or 0, mask.right or 0, 0.125, softcap, engine, train, runtime.number)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("engine", ["auto", pytest.param("flex", marks=NEEDS_FLEX), "blocked", "eager"])
def test_opcheck(runtime: Runtime, engine: str, masked: bool, train: bool, seed: int) -> None:
    if engine == "flex" and train:  # refused, see test_checks
        return
    for softcap in (50.0, None):
        inputs = arguments(runtime, engine, masked, train, softcap)
        torch.library.opcheck(OP, inputs)
        if train:
            *head, _, number = (x.detach() if isinstance(x, Tensor) else x for x in inputs)
            out, lse = OP(*head, True, number)
            torch.library.opcheck(
                torch.ops.softcap_runtime.attention_backward,
                (torch.randn_like(out), *head[:3], out, lse, *head[3:], number),
            )


def test_the_fake_implementation_tells_the_truth(runtime: Runtime, seed: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for masked, train, dtype in itertools.product([False, True], [False, True], [torch.float32, torch.float64]):
        inputs = tuple(
            x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in arguments(runtime, "eager", masked, train)
        )
        real = OP(*inputs)
        with FakeTensorMode() as mode:
            fake = OP(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs))
        for mine, theirs in zip(real, fake, strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_no_grad_and_inference_mode(runtime: Runtime, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 4, 2, 30, 30))
    want = expected(q, k, v, CONFIG)
    q.requires_grad_()
    with torch.no_grad():
        out = runtime.attention(q, k, v, CONFIG)
    assert not out.requires_grad
    assert relative_error(out, want) <= 2e-6
    with torch.inference_mode():
        out = runtime.attention(q, k, v, CONFIG)
        assert out.is_inference()
        assert relative_error(out, want) <= 2e-6
        made_inside = [x.clone() for x in (q, k, v)]
        assert relative_error(runtime.attention(*made_inside, CONFIG), want) <= 2e-6
    assert runtime.attention(q, k, v, CONFIG).requires_grad


def test_a_call_by_name_trains_where_gradients_are_wanted(runtime: Runtime, seed: int) -> None:
    """``train`` asks for the logsumexp where nothing requires gradients; a program exported for inference may train."""
    inputs = arguments(runtime, "auto", False, True)
    inference = (*inputs[:-2], False, inputs[-1])
    got = torch.autograd.grad(OP(*inference)[0].pow(2).sum(), inputs[:3])
    want = torch.autograd.grad(OP(*inputs)[0].pow(2).sum(), inputs[:3])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        assert OP(*inference)[1].numel() == 0


def test_flops(runtime: Runtime, seed: int) -> None:
    """As torch counts its own attention: two products forward, five backward, every query and every key."""
    q, k, v = (x.requires_grad_() for x in make_qkv(Sizes(2, 4, 2, 33, 65)))
    product = 2 * 2 * 4 * 33 * 65 * 64
    with FlopCounterMode(display=False) as counter:
        out = runtime.attention(q, k, v, CONFIG)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        runtime.attention(q, k, v, CONFIG)  # a shape that was served before takes no shortcut past the counter
    assert counter.get_total_flops() == 2 * product


@pytest.mark.parametrize(
    "code",
    [
        "import softcap_runtime, sys; assert COUNTER not in sys.modules; import torch.utils.flop_counter as counter",
        "import torch.utils.flop_counter as counter; import softcap_runtime",
        "import softcap_runtime, importlib.util; importlib.util.find_spec(COUNTER); "
        "import torch.utils.flop_counter as counter",
    ],
)
def test_the_formulas_are_there_when_somebody_counts(code: str) -> None:
    """Whichever comes first; our own import does not bring the counter, which brings Triton."""
    code = f"import sys, torch; COUNTER = 'torch.utils.flop_counter'; {code}; known = counter.flop_registry; "
    code += "print(sum('softcap_runtime' in str(op) for op in known), len(sys.meta_path))"
    assert printed_by(code) == ["2", *printed_by("import sys, torch, pydantic; print(len(sys.meta_path))")]


@functools.cache
def printed_by(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


@pytest.mark.parametrize("inputs", ["float32", "mixed", "bfloat16", "float64"])
def test_autocast(runtime: Runtime, inputs: str, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 4, 2, 40, 40), torch.float64 if inputs == "float64" else torch.float32)
    if inputs == "mixed":
        k = k.bfloat16()
    if inputs == "bfloat16":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    for grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            leaves = [x.detach().requires_grad_(grad) for x in (q, k, v)]
            out = runtime.attention(*leaves, CONFIG)
        assert out.dtype == theirs.dtype
        same = tuple(x.to(theirs.dtype) for x in (q, k, v))
        assert relative_error(out, expected(*same, CONFIG)) <= 4e-3  # bf16
        if grad:
            out.float().sum().backward()
            for leaf, x in zip(leaves, (q, k, v), strict=True):
                assert leaf.grad.dtype == x.dtype
    with torch.autocast("cpu", torch.bfloat16):
        mask = band(40, 40, causal=True, window=None)
        how = (None, None, mask.left, mask.right, 0.125, 50.0, "auto", False, runtime.number)
        assert OP(q, k, v, *how)[0].dtype == theirs.dtype  # the raw operator
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert runtime.attention(*same, CONFIG).dtype == theirs.dtype


def test_autocast_after_the_same_call_without(runtime: Runtime, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 4, 2, 41, 41))
    for _ in range(3):  # the third finds a shortcut
        assert runtime.attention(q, k, v, CONFIG).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert runtime.attention(q, k, v, CONFIG).dtype == torch.bfloat16
    assert runtime.attention(q, k, v, CONFIG).dtype == torch.float32


@pytest.mark.parametrize("how", ["not reentrant", "reentrant", "selective"])
def test_activation_checkpointing(runtime: Runtime, how: str, seed: int) -> None:
    ids = (torch.rand(2, 70) < 0.05).cumsum(1)
    calls = []

    def run(*qkv: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return runtime.attention(*qkv, CONFIG, document_ids=ids)

    plain = Block(run)
    saved = copy.deepcopy(plain)
    x = torch.randn(2, 70, 128, requires_grad=True)
    plain(x).square().sum().backward()
    want = [x.grad.clone(), *(p.grad for p in plain.parameters())]
    x.grad = None
    calls.clear()
    if how == "selective":
        contexts = partial(create_selective_checkpoint_contexts, [OP.default])
        out = checkpoint(saved, x, use_reentrant=False, context_fn=contexts)
    else:
        out = checkpoint(saved, x, use_reentrant=how == "reentrant")
    out.square().sum().backward()
    assert len(calls) == 2  # once forward, once again for the backward
    got = [x.grad, *(p.grad for p in saved.parameters())]
    # The reentrant kind runs forward without gradients, where another engine may serve: sums in another order.
    limit = 1e-5 if how == "reentrant" else 0.0
    assert all(relative_error(a, b) <= limit for a, b in zip(got, want, strict=True))


def test_the_output_is_free_to_reshape(runtime: Runtime, seed: int) -> None:
    for engine, train in itertools.product(["auto", "blocked", "eager"], [False, True]):
        inputs = arguments(runtime, engine, False, train)
        out = OP(*inputs)[0]
        assert in_model_order(out)
        assert out.transpose(1, 2).reshape(2, 19, 256).data_ptr() == out.data_ptr()


def test_a_runtime_that_is_gone_is_replaced_by_the_process_own(
    own_runtime: Runtime, runtimes: dict[str, Runtime], seed: int
) -> None:
    # A program exported in another process brings the number of a runtime that does not exist here.
    inputs = arguments(own_runtime, "eager", False, False)
    assert torch.equal(OP(*inputs[:-1], 10**9)[0], OP(*inputs)[0])


def test_it_follows_none_of_torchs_defaults(runtimes: dict[str, Runtime], seed: int) -> None:
    """Kernels read memory as the dtype they were built for, whatever dtype and device are the process's own."""
    inputs = {size: make_qkv(Sizes(2, 4, 2, 70, 140, size)) for size in (HEAD_DIM, UNCAPPED_HEAD_DIM)}
    grads_out = {size: torch.randn(2, 4, 70, size) for size in inputs}
    padding = torch.ones(2, 140, dtype=torch.int64)
    padding[0, :90] = 0

    def results(engine: str) -> list[Tensor]:
        runtime = Runtime(runtimes[engine].settings)  # no plan is made yet
        found = []
        for softcap, masks in ((50.0, {}), (50.0, {"attention_mask": padding}), (None, {})):
            config = AttentionConfig(softcap=softcap, scale=0.125, window=99)
            size = UNCAPPED_HEAD_DIM if softcap is None else HEAD_DIM
            qkv, grad_out = inputs[size], grads_out[size]
            found.append(runtime.attention(*qkv, config, **masks))
            if engine != "flex":
                out, grads = gradients(lambda *x, c=config, m=masks: runtime.attention(*x, c, **m), qkv, grad_out)
                found += [out, *grads]
        return found

    for engine in ("flex", "blocked", "eager"):
        want = results(engine)
        for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
            torch.set_default_dtype(dtype)
            try:
                with torch.device(device):
                    got = results(engine)
            finally:
                torch.set_default_dtype(torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (engine, dtype, device)


@pytest.mark.parametrize("engine", ["flex", "blocked", "eager", "auto"])
def test_a_call_by_name_is_checked(runtime: Runtime, engine: str, seed: int) -> None:
    q, k, v, _, _, *rest = arguments(runtime, engine, masked=False, train=False)
    lo = torch.zeros(1, 19, dtype=torch.int32)
    for words, call in (
        ("v: head_dim 3, expected q's 64", (q, k, v[..., :3], None, None)),
        ("v: shape", (q, k, v[:, :, :9], None, None)),
        ("k: batch 1, expected q's 2", (q, k[:1], v[:1], None, None)),
        ("k.dtype: torch.bfloat16, expected q's", (q, k.bfloat16(), v, None, None)),
        ("hi: None, expected both edges", (q, k, v, lo, None)),
        (r"mask.lo: torch.int64 \(1, 19\) on cpu, expected int32", (q, k, v, lo.long(), lo.long())),
        (r"mask.lo: torch.int32 \(1, 18\) on cpu, expected", (q, k, v, lo[:, 1:], lo[:, 1:])),
        (r"mask.hi: torch.int32 \(1, 19\) on cpu, expected int32 \(2, 19\)", (q, k, v, lo.repeat(2, 1), lo)),
        ("lo: .*on meta, expected .* cpu", (q, k, v, lo.to("meta"), lo.to("meta"))),
        ("v: on meta, expected q's cpu", (q, k, v.to("meta"), None, None)),
    ):
        for below_autograd in (False, True):
            with torch.inference_mode(below_autograd), pytest.raises(ValueError, match=words) as caught:
                OP(*call, *rest)
            assert "\n" not in str(caught.value)
    # Edges past the keys show the keys that are there; their strides may be any.
    wide = torch.stack([lo[0] - 5, lo[0] + 10**6], 1)
    out = OP(q, k, v, wide[None, :, 0], wide[None, :, 1], *rest)[0]
    assert relative_error(out, expected(q, k, v, CONFIG.model_copy(update={"causal": False}))) <= 2e-6


def test_an_engine_that_is_none(runtime: Runtime, seed: int) -> None:
    *head, _, train, number = arguments(runtime, "auto", masked=False, train=False)
    with pytest.raises(ValueError, match="engine: 'xx', expected auto or one of flex, blocked, dense, eager"):
        OP(*head, "xx", train, number)


def test_a_backward_by_name_is_checked(runtime: Runtime, seed: int) -> None:
    *head, _, number = (x.detach() if isinstance(x, Tensor) else x for x in arguments(runtime, "auto", True, True))
    out, lse = OP(*head, True, number)
    backward = torch.ops.softcap_runtime.attention_backward
    for name, (grad_out, saved, logsumexp) in {
        "grad_out": (out[:, :, :7], out, lse),
        "out": (out, out.bfloat16(), lse),
        "lse": (out, out, lse[:, :, :7]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: .* expected .* as the forward with train=True gave it"):
            backward(grad_out, *head[:3], saved, logsumexp, *head[3:], number)


def test_a_backward_by_name(runtime: Runtime, seed: int) -> None:
    """Over more keys than a head has elements, as the checks of its edges count the former."""
    inputs = [x.requires_grad_() for x in make_qkv(Sizes(1, 2, 1, 90, 90))]
    ids = (torch.arange(90) // 40)[None]
    mask = row_intervals(90, 90, causal=True, window=None, document_ids=ids)
    want_out = runtime.attend(*inputs, CONFIG, mask)
    grad_out = torch.randn_like(want_out)
    want = torch.autograd.grad(want_out, inputs, grad_out)
    head = [*(x.detach() for x in inputs), mask.lo, mask.hi, 0, 0, 0.125, 50.0, "auto"]
    out, lse = OP(*head, True, runtime.number)
    grads = torch.ops.softcap_runtime.attention_backward(grad_out, *head[:3], out, lse, *head[3:], runtime.number)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip((out, *grads), (want_out, *want), strict=True))


def test_a_backward_runs_where_its_forward_ran(runtime: Runtime, seed: int) -> None:
    inputs = [x.requires_grad_() for x in make_qkv(Sizes(1, 2, 1, 40, 40))]
    passing = Runtime(runtime.settings)
    out = passing.attention(*inputs, CONFIG)
    alive = weakref.ref(passing)
    del passing
    gc.collect()
    assert alive() is not None
    out.sum().backward()
    plans = [plan for key, plan in alive().plans.items() if key.train]
    assert [plan.hits for plan in plans] == [1]
    del out, plans
    gc.collect()
    assert alive() is None


def test_tensors_that_are_negated_when_read(runtimes: dict[str, Runtime], seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 4, 2, 90, 90))
    for engine in ("flex", "blocked", "eager"):
        for _ in range(3):  # the third finds the short way
            out = runtimes[engine].attention(torch._neg_view(q), k, torch._neg_view(v), CONFIG)
            assert relative_error(out, expected(-q, k, -v, CONFIG)) <= 2e-6


def test_meta_tensors(runtime: Runtime, seed: int) -> None:
    q, k, v = (x.to("meta") for x in make_qkv(Sizes(2, 4, 2, 30, 40)))
    mask = torch.ones(2, 40, dtype=torch.int64, device="meta")
    with torch.no_grad():
        out = runtime.attention(q, k, v, CONFIG)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = runtime.attention(q, k, v, CONFIG, mask)
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_fake_tensors_and_fake_masks(runtime: Runtime, seed: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(2, heads, 40, 64) for heads in (4, 2, 2))
        for masks in (
            {"attention_mask": torch.ones(2, 40, dtype=torch.bool)},
            {"document_ids": torch.zeros(2, 40, dtype=torch.int64)},
            {"prefix_lengths": torch.ones(2, dtype=torch.int64)},
            {"spans": torch.zeros(2, 1, 2, dtype=torch.int64)},
            {"cache_lengths": torch.full((2,), 40)},
        ):
            assert runtime.attention(q, k, v, CONFIG, **masks).shape == q.shape


@pytest.mark.parametrize("engine", ["auto", pytest.param("flex", marks=NEEDS_FLEX), "blocked", "eager"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_tensors_that_wrap_others(runtimes: dict[str, Runtime], engine: str, place: int, seed: int) -> None:
    """Their class sees the operator; a kernel that was given one read no memory of its, and crashed or was wrong."""
    inputs, padding = make_qkv(Sizes(2, 4, 2, 30, 30)), torch.arange(30) >= torch.tensor([[3], [0]])
    tensors = [Wrapped(x) if at == place else x for at, x in enumerate((*inputs, padding))]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        # The third call without a mask finds a shortcut.
        mask = mask if place == 3 else None
        return [runtimes[engine].attention(q, k, v, CONFIG, mask) for _ in range(3)][-1]

    masks = {"attention_mask": padding} if place == 3 else {}
    grad_out = torch.randn(inputs[0].shape)
    want_out, want = gradients(lambda *x: expected(*x, CONFIG, **masks), inputs, grad_out)
    attend(*inputs, padding)
    out = attend(*tensors)
    assert relative_error(out.inner, want_out) <= 2e-6
    if engine != "flex":
        _, got = gradients(lambda *x: attend(*x, tensors[3]), tuple(tensors[:3]), grad_out)
        assert all(relative_error(a.inner, b) <= 3e-6 for a, b in zip(got, want, strict=True))


def test_an_output_that_is_changed_in_place(runtime: Runtime, seed: int) -> None:
    """The backward reads it, so torch says so, in its own words; an inference output is the caller's."""
    inputs = make_qkv(Sizes(1, 2, 1, 20, 20))
    runtime.attention(*inputs, CONFIG).mul_(2)
    out = runtime.attention(*(x.requires_grad_() for x in inputs), CONFIG)
    out[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
