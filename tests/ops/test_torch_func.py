"""The operator under torch.func and in derivatives beyond the first gradient: right, or refused, never 0 in silence."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support.helpers import NEEDS_FLEX, Sizes, expected, gradients, make_qkv, relative_error
from torch import Tensor
from torch.autograd import forward_ad

from softcap_runtime import AttentionConfig, Runtime

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)


def expected_by(config: AttentionConfig, *inputs: Tensor) -> Tensor:
    return expected(*inputs, config)


def test_torch_func(runtime: Runtime, seed: int) -> None:
    inputs = make_qkv(Sizes(2, 4, 2, 25, 25))
    grad_out = torch.randn(inputs[0].shape)
    want_out, want = gradients(partial(expected_by, CONFIG), inputs, grad_out)
    out, pull = torch.func.vjp(lambda *x: runtime.attention(*x, CONFIG), *inputs)
    assert relative_error(out, want_out) <= 2e-6
    for mine, exact in zip(pull(grad_out), want, strict=True):
        assert relative_error(mine, exact) <= 3e-6
    got = torch.func.grad(lambda *x: (runtime.attention(*x, CONFIG) * grad_out).sum(), argnums=(0, 1, 2))(*inputs)
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) <= 3e-6


@pytest.mark.parametrize("engine", ["blocked", "eager"])
def test_levels_of_torch_func(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    """A gradient at one level is one at all levels around it: 0 in silence when an inner level switched them off."""
    inputs = make_qkv(Sizes(2, 4, 2, 9, 9))
    many = torch.stack([inputs[0], 2 * inputs[0]])
    grad = torch.func.grad

    def outer_of_vjp(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grad(lambda q: torch.func.vjp(run, q, k, v)[0].pow(2).sum())(q)

    def autograd_of_vjp(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        leaf = q.clone().requires_grad_()
        return torch.autograd.grad(torch.func.vjp(run, leaf, k, v)[0].pow(2).sum(), leaf)[0]

    def other_input(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = torch.func.grad_and_value(lambda q, k: run(q, k, v).pow(2).sum())
        return grad(lambda k: both(q, k)[1])(k)

    def of_vmap(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grad(lambda many: torch.func.vmap(run, (0, None, None))(many, k, v).pow(2).sum())(many.to(q))

    def autograd_of_vmap(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        leaf = many.to(q).clone().requires_grad_()
        return torch.autograd.grad(torch.func.vmap(run, (0, None, None))(leaf, k, v).pow(2).sum(), leaf)[0]

    def without_gradients(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():  # of the outer levels alone
            return grad(lambda q: run(q, k, v).pow(2).sum())(q)

    def batch_of_gradients(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda q: run(q, k, v)[0, 0, -3:], q, vectorize=True)

    for case in (
        outer_of_vjp,
        autograd_of_vjp,
        other_input,
        of_vmap,
        autograd_of_vmap,
        without_gradients,
        batch_of_gradients,
    ):
        got = case(lambda *x: runtimes[engine].attention(*x, CONFIG), *inputs)
        want = case(partial(expected_by, CONFIG), *(x.double() for x in inputs))
        assert relative_error(got, want) <= 5e-6, case.__name__


@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="this torch runs sample by sample")
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, None, None), (None, 1, 4), (-1, 0, None)])
@pytest.mark.parametrize("shared", [None, [4], [3, 4]])
def test_samples_of_vmap_are_one_call(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, in_dims: Any, shared: list[int] | None, seed: int
) -> None:
    inputs = [
        x if dim is None else torch.stack([x, -x, 2 * x], dim)
        for x, dim in zip(make_qkv(Sizes(len(shared or [1]), 4, 2, 9, 9)), in_dims, strict=True)
    ]
    ids = None if shared is None else torch.arange(9) // torch.tensor(shared)[:, None]
    calls = []
    served = runtime.forward
    monkeypatch.setattr(runtime, "forward", lambda *call: calls.append(call) or served(*call))

    def loss(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v, CONFIG, document_ids=ids).pow(2).sum()

    mapped = torch.func.vmap(torch.func.grad(partial(loss, runtime.attention), (0, 1, 2)), in_dims)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it runs samples one by one
        got = mapped(*inputs)
    assert len(calls) == 1
    want = torch.func.vmap(torch.func.grad(partial(loss, expected), (0, 1, 2)), in_dims)(*(x.double() for x in inputs))
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) <= 5e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_torch_func_inside_a_graph(runtime: Runtime, backend: str, seed: int) -> None:
    """The compiler shows no tensor of a transform as one that requires gradients."""
    inputs = make_qkv(Sizes(2, 4, 2, 9, 9))
    mask = torch.arange(9) >= torch.tensor([[2], [4]])
    grad, vmap = torch.func.grad, torch.func.vmap

    def of_grad(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack(grad(lambda k, v: run(q, k, v).pow(2).sum(), (0, 1))(k, v))

    def of_vjp(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, pull = torch.func.vjp(partial(run, attention_mask=mask), q, k, v)
        return pull(out)[0]

    def of_jacobian(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Of rows that see many keys: over one or two, gradients cancel to almost nothing.
        return torch.func.jacrev(lambda q: run(q, k, v)[0, 0, -2:, :3])(q)

    def grad_in_vmap(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vmap(grad(lambda q: run(q, k, v).pow(2).sum()))(torch.stack([q, 2 * q]))

    def vmap_in_autograd(run: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vmap(lambda q: run(q, k, v))(torch.stack([q, 2 * q]))

    for case in (of_grad, of_vjp, of_jacobian, grad_in_vmap, vmap_in_autograd):
        leaf, exact = (x.clone().requires_grad_(case is vmap_in_autograd) for x in (inputs[0], inputs[0].double()))
        attend = partial(case, lambda *x, **masks: runtime.attention(*x, CONFIG, **masks))
        got = torch.compile(attend, backend=backend, fullgraph=True)(leaf, *inputs[1:])
        attend_exact = partial(case, lambda *x, **masks: expected(*x, CONFIG, **masks))
        want = attend_exact(exact, *(x.double() for x in inputs[1:]))
        assert relative_error(got, want) <= 5e-6, case.__name__
        if case is vmap_in_autograd:
            got, want = torch.autograd.grad(got.sum(), leaf)[0], torch.autograd.grad(want.sum(), exact)[0]
            assert relative_error(got, want) <= 5e-6, case.__name__


@pytest.mark.parametrize("name", ["attention_mask", "document_ids", "cache_lengths", "prefix_lengths"])
def test_a_mask_for_each_sample_of_vmap(runtime: Runtime, name: str, seed: int) -> None:
    inputs = [torch.stack([x, x.flip(0)]) for x in make_qkv(Sizes(2, 4, 2, 9, 9))]
    masks = {
        "attention_mask": (torch.arange(9) >= torch.tensor([[2], [4]])) ^ (torch.arange(9) == 6),
        "document_ids": torch.arange(9) // torch.tensor([[2], [4]]),
        "cache_lengths": torch.tensor([[9], [9]]),
        "prefix_lengths": torch.tensor([[2], [4]]),
    }
    each = masks[name].unsqueeze(1) if masks[name].shape[1] > 1 else masks[name]

    def loss(run: Any, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v, **{name: mask}).pow(2).sum()

    def run(q: Tensor, k: Tensor, v: Tensor, **masks: Tensor) -> Tensor:
        return runtime.attention(q, k, v, CONFIG, **masks)

    got = torch.func.vmap(torch.func.grad(partial(loss, run), 1))(each, *inputs)
    for sample, (mine, mask) in enumerate(zip(got, each, strict=True)):
        q, k, v = (x[sample].double() for x in inputs)
        want = torch.func.grad(lambda q, k, v, mask: expected(q, k, v, CONFIG, **{name: mask}).pow(2).sum())(
            q, k, v, mask
        )
        assert relative_error(mine, want) <= 5e-6


@pytest.mark.parametrize("engine", ["auto", "blocked", "eager"])
def test_no_second_derivative(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(Sizes(1, 2, 1, 9, 9)))
    out = runtimes[engine].attention(q, k, v, CONFIG)
    (grad_q,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad_q.sum().backward()

    def attend(q: Tensor) -> Tensor:
        return runtimes[engine].attention(q, k.detach(), v.detach(), CONFIG).pow(2).sum()

    # torch.func would give 0.
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(attend)(q).sum())(q.detach())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(attend)(q).sum().backward()


@pytest.mark.parametrize("engine", ["auto", pytest.param("flex", marks=NEEDS_FLEX), "blocked", "eager"])
def test_no_forward_mode_derivative(runtimes: dict[str, Runtime], engine: str, seed: int) -> None:
    q, k, v = make_qkv(Sizes(1, 2, 1, 9, 9))

    def attend(q: Tensor) -> Tensor:
        return runtimes[engine].attention(q, k, v, CONFIG)

    for _ in range(2):  # the second time there is a shortcut
        attend(q)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            attend(forward_ad.make_dual(q, torch.ones_like(q)))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(attend, (q,), (q,))
    if engine != "flex":
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(torch.func.grad(lambda q: attend(q).sum()), (q,), (q,))
