"""Gradients of every engine that trains, against autograd through the specification in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import (
    GRADIENT_TOLERANCE,
    LAYOUTS,
    Case,
    Sizes,
    cases,
    expected,
    gradients,
    hf_eager,
    make_qkv,
    masks,
    relative_error,
    visible,
)
from support.rounding import gradient_errors

from softcap_runtime import AttentionConfig, Runtime

TRAINS = ["blocked", "eager"]


def check(
    runtime: Runtime, case: Case, dtype: torch.dtype, tolerance: float, factor: float = 1.0, layout: str | None = None
) -> None:
    inputs = case.inputs(dtype, factor)
    grad_out = make_qkv(case.sizes, dtype, layout or "transposed")[0]
    out, got = gradients(lambda *x: runtime.attention(*x, case.config, **case.masks), inputs, grad_out)
    want_out, want = gradients(case.expected, inputs, grad_out)
    assert relative_error(out, want_out) <= tolerance
    for name, mine, _, x in zip("qkv", got, want, inputs, strict=True):
        assert mine.shape == x.shape
        assert mine.dtype == dtype
        assert bool(torch.isfinite(mine).all()), name
    # Over all three together: the gradient of q and k may be zero but for rounding (one visible key, or a cap
    # so low that its slope is 0), where a relative error of its own says nothing.
    assert relative_error(torch.cat([x.flatten() for x in got]), torch.cat([x.flatten() for x in want])) <= tolerance


@pytest.mark.parametrize("engine", TRAINS)
@settings(max_examples=100, deadline=None)
@given(case=cases(max_len=200), layout=st.sampled_from(LAYOUTS[:3]))
def test_any_mask_on_any_layout(runtimes: dict[str, Runtime], engine: str, case: Case, layout: str) -> None:
    check(runtimes[engine], case, torch.float32, GRADIENT_TOLERANCE[torch.float32], layout=layout)


@pytest.mark.parametrize("softcap", [50.0, None])
@pytest.mark.parametrize("q_len", [1, 65, 641])
def test_a_last_block_of_one_row(runtimes: dict[str, Runtime], q_len: int, softcap: float | None, seed: int) -> None:
    """A vector with one row of each head is easily a view with gaps, and no kernel checks that."""
    config = AttentionConfig(softcap=softcap, scale=0.125)
    case = Case(Sizes(2, 4, 2, q_len, q_len + 3, 64), config, {}, "fused", seed)
    check(runtimes["blocked"], case, torch.float32, GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30, deadline=None)
@given(case=cases(max_len=200))
def test_half_precision(runtimes: dict[str, Runtime], dtype: torch.dtype, case: Case) -> None:
    # A gradient of a few elements is as far off as its worst one: out is rounded once (it enters through delta) and
    # the gradient once, each by half an eps.
    tolerance = max(GRADIENT_TOLERANCE[dtype], torch.finfo(dtype).eps)
    for engine in TRAINS:
        check(runtimes[engine], case, dtype, tolerance)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), causal=st.booleans(), seed=st.integers(0, 2**31))
def test_the_dense_engine(runtimes: dict[str, Runtime], data: Any, causal: bool, seed: int) -> None:
    # It compiles in the process, seconds for each class of shapes: one class, with a mask for each batch row.
    sizes = Sizes(3, 4, 2, 91, 96)
    softcap = data.draw(st.sampled_from([0.1, 50.0, 1000.0]))
    config = AttentionConfig(softcap=softcap, scale=0.125, causal=causal)
    made = {"cache_lengths": torch.tensor([96, 96, 96]), **data.draw(masks(sizes))}
    batched = {
        name: x.expand(3, -1) if name == "query_positions" else x.expand(3, *x.shape[1:]) for name, x in made.items()
    }
    case = Case(sizes, config, batched, "transposed", seed)
    check(runtimes["dense"], case, torch.float32, GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("engine", TRAINS)
@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 50.0, 64.0, 64.1, 1000.0, None])
def test_softcaps_and_realistic_sizes(
    runtimes: dict[str, Runtime], engine: str, softcap: float | None, seed: int
) -> None:
    for window, lengths in ((None, (700, 700)), (150, (500, 1300))):
        config = AttentionConfig(softcap=softcap, scale=0.125, window=window)
        check(runtimes[engine], Case(Sizes(1, 4, 2, *lengths), config, {}, "fused", seed), torch.float32, 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_figures(runtimes: dict[str, Runtime], dtype: torch.dtype, seed: int) -> None:
    """The stated limits for each gradient by itself, and not above autograd through eager model code."""
    stated = {torch.float32: 7e-7, torch.bfloat16: 3.5e-3}.get(dtype, GRADIENT_TOLERANCE[dtype])
    for head_dim in (64, 256):
        config = AttentionConfig(softcap=50.0, scale=head_dim**-0.5)
        inputs = make_qkv(Sizes(1, 8, 4, 512, 512, head_dim), dtype)
        grad_out = torch.randn(inputs[0].shape).to(dtype)
        mask = visible(512, 512, causal=True, window=None)
        _, want = gradients(lambda *x, c=config: expected(*x, c), inputs, grad_out)
        _, theirs = gradients(lambda *x, c=config, m=mask: hf_eager(*x, c, m), inputs, grad_out)
        for engine in TRAINS:
            runtime, limit = runtimes[engine], GRADIENT_TOLERANCE[dtype] if engine == "eager" else stated
            _, got = gradients(lambda *x, c=config, r=runtime: r.attention(*x, c), inputs, grad_out)
            for name, mine, exact, other in zip("qkv", got, want, theirs, strict=True):
                error, model = relative_error(mine, exact), relative_error(other, exact)
                figures = f"{engine} D{head_dim} d{name}: {error:.2e}, eager model code {model:.2e}"
                assert error <= limit, figures
                # The eager engine is the same formula, its sums in another order.
                assert error <= model * (1.1 if engine == "eager" else 1.0), figures


@pytest.mark.parametrize("engine", TRAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_nothing_have_no_gradient(
    runtimes: dict[str, Runtime], engine: str, dtype: torch.dtype, seed: int
) -> None:
    mask = torch.tensor([[0] * 32 + [1] * 64, [0] * 96, [1] * 40 + [0] * 56])
    config = AttentionConfig(softcap=50.0, scale=0.125)
    inputs = make_qkv(Sizes(3, 4, 2, 91, 96), dtype)
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    _, (grad_q, grad_k, grad_v) = gradients(lambda *x: runtimes[engine].attention(*x, config, mask), inputs, grad_out)
    assert not grad_q[1].any()
    assert not grad_q[0, :, :27].any()
    for grad in (grad_k, grad_v):
        assert not grad[1].any()
        assert not grad[0, :, :32].any()
        assert not grad[2, :, 40:].any()
        assert bool(torch.isfinite(grad).all())
    assert bool(grad_k[0, :, 32:].any())


@pytest.mark.parametrize("softcap", [0.1, 1.0, 50.0, 1000.0, None])
@pytest.mark.parametrize("engine", TRAINS)
def test_large_inputs(runtimes: dict[str, Runtime], engine: str, softcap: float | None, seed: int) -> None:
    """Inputs scaled by 100: the cap saturates, its slope vanishes, the softmax is one-hot and dq may cancel to 0."""
    config = AttentionConfig(softcap=softcap, scale=0.125)
    mask = visible(150, 150, causal=True, window=None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make_qkv(Sizes(1, 4, 2, 150, 150), dtype, factor=100.0)
        grad_out = torch.randn(inputs[0].shape).to(dtype)
        _, got = gradients(lambda *x: runtimes[engine].attention(*x, config), inputs, grad_out)
        _, want = gradients(lambda *x: expected(*x, config), inputs, grad_out)
        # The eager engine rounds its logits to the input's dtype, as its formula does; the others keep float32.
        logits_in = dtype if engine == "eager" else torch.float32
        eps = torch.finfo(logits_in).eps
        bounds = gradient_errors(inputs, grad_out, config, mask, eps, GRADIENT_TOLERANCE[dtype])
        for name, mine, exact, bound in zip("qkv", got, want, bounds, strict=True):
            assert bool(torch.isfinite(mine).all()), name
            error = (mine.detach().double() - exact).norm()
            print(f"{engine} {softcap} {dtype} d{name}: {error / bound.norm():.1e} of its bound")
            assert error <= bound.norm(), name


@pytest.mark.parametrize("engine", TRAINS)
def test_weights_of_large_logits_stay_normalised(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    """Without a cap the backward's logits must be the forward's to the last bit, or ``exp(logit - lse)`` sums to more
    or less than 1: 3e-3 at logits of 5e4 when their sums were rounded in another order, 3e-5 now."""
    config = AttentionConfig(scale=0.125)
    inputs = make_qkv(Sizes(1, 4, 2, 200, 200), factor=120.0)
    grad_out = torch.randn(inputs[0].shape)
    _, got = gradients(lambda *x: runtimes[engine].attention(*x, config), inputs, grad_out)
    _, want = gradients(lambda *x: expected(*x, config), inputs, grad_out)
    assert relative_error(got[2], want[2]) <= 3e-4


def errors_beside_eager_code(
    runtime: Runtime, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> list[tuple[str, float, float]]:
    """Of each gradient under a cap of 50: its name, its error and that of eager code."""
    config = AttentionConfig(softcap=50.0, scale=0.125)
    q_len, kv_len = inputs[0].shape[2], inputs[1].shape[2]
    mask, grad_out = visible(q_len, kv_len, causal=True, window=None), torch.randn(inputs[0].shape)
    _, got = gradients(lambda *x: runtime.attention(*x, config), inputs, grad_out)
    _, peer = gradients(lambda *x: hf_eager(*x, config, mask), inputs, grad_out)
    _, want = gradients(lambda *x: expected(*x, config), inputs, grad_out)
    return [
        (name, relative_error(mine, exact), relative_error(theirs, exact))
        for name, mine, theirs, exact in zip("qkv", got, peer, want, strict=True)
    ]


@pytest.mark.parametrize("factor", [3.0, 30.0])
@pytest.mark.parametrize("engine", TRAINS)
def test_large_capped_logits_cost_no_more_than_in_eager_code(
    runtimes: dict[str, Runtime], engine: str, factor: float, seed: int
) -> None:
    """Logits of 10 and of 1,000 under a cap of 50: weights made from a logsumexp of logits that were rounded otherwise
    take 1.9 times eager code's error in dq and dk, 3 and 14 times in dv."""
    q, k, v = make_qkv(Sizes(1, 4, 2, 200, 200), factor=factor)
    for name, *errors in errors_beside_eager_code(runtimes[engine], (q, k, v / factor)):
        print(f"{engine} {factor} d{name}: {errors[0]:.1e}, eager {errors[1]:.1e}")
        # Where a softmax is one-hot, dq and dk are what does not quite cancel.
        if name == "v" or factor == 3.0:
            assert errors[0] <= max(1.5 * errors[1], 2e-6), name


def test_the_eager_engine_is_as_exact_as_eager_code_at_its_cap(runtimes: dict[str, Runtime], seed: int) -> None:
    """Made from the forward's logsumexp and rounded output its gradients were off by 1.35 to 2.9 times as much; the
    same formula may differ by the order of its sums: at most 1.06 in three seeds."""
    inputs = make_qkv(Sizes(1, 4, 2, 200, 200), factor=30.0)
    for name, mine, theirs in errors_beside_eager_code(runtimes["eager"], inputs):
        assert mine <= 1.2 * theirs, name


@pytest.mark.parametrize("engine", TRAINS)
def test_fp16_does_not_overflow_on_the_way(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    # Products of q and k reach 1e6, above float16's 65504, and so do those of grad_out and v before their sum.
    config = AttentionConfig(softcap=50.0, scale=1e-4)
    inputs = make_qkv(Sizes(1, 4, 2, 130, 130), torch.float16, factor=120.0)
    grad_out = torch.randn(inputs[0].shape).half()
    out, got = gradients(lambda *x: runtimes[engine].attention(*x, config), inputs, grad_out)
    want_out, want = gradients(lambda *x: expected(*x, config), inputs, grad_out)
    assert relative_error(out, want_out) <= 1e-3
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) <= 1e-3


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("engine", TRAINS)
def test_two_runs_are_bit_equal(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    ids = (torch.rand(2, 300) < 0.02).cumsum(1)
    config = AttentionConfig(softcap=50.0, scale=0.125, window=100)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_qkv(Sizes(2, 4, 2, 300, 300), dtype)
        grad_out = torch.randn(inputs[0].shape).to(dtype)
        runs = [
            gradients(lambda *x: runtimes[engine].attention(*x, config, document_ids=ids), inputs, grad_out)
            for _ in range(2)
        ]
        assert torch.equal(runs[0][0], runs[1][0])
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_only_some_inputs_need_gradients(runtime: Runtime, seed: int) -> None:
    config = AttentionConfig(softcap=50.0, scale=0.125)
    inputs = make_qkv(Sizes(1, 4, 2, 60, 60))
    _, want = gradients(lambda *x: expected(*x, config), inputs, torch.ones_like(inputs[0]))
    for place in range(3):
        leaves = [x.detach().requires_grad_(index == place) for index, x in enumerate(inputs)]
        runtime.attention(*leaves, config).sum().backward()
        assert relative_error(leaves[place].grad, want[place]) <= 3e-6
        assert all(x.grad is None for index, x in enumerate(leaves) if index != place)


def test_expanded_gradient(runtime: Runtime, seed: int) -> None:
    # sum() hands back one element seen as a whole tensor: strides of 0, the last one too.
    config = AttentionConfig(softcap=50.0, scale=0.125)
    q, k, v = (x.requires_grad_() for x in make_qkv(Sizes(2, 4, 2, 60, 60)))
    runtime.attention(q, k, v, config).sum().backward()
    _, want = gradients(lambda *x: expected(*x, config), (q, k, v), torch.ones_like(q))
    for x, exact in zip((q, k, v), want, strict=True):
        assert relative_error(x.grad, exact) <= 3e-6
