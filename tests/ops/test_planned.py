"""A training call that was made before just so: the short way round the operator gives what the long one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import Sizes, expected, gradients, make_qkv, relative_error

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
from softcap_runtime.ops import planned

attend = planned.attend
CONFIG = AttentionConfig(softcap=50.0, scale=0.2, window=30)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_made_before_is_computed_by_its_plan(
    tmp_path: Path, packed: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="eager"))
    taken: list[Any] = []
    monkeypatch.setattr(planned, "attend", lambda *call: taken.append(call) or attend(*call))
    for step in range(3):
        q, k, v = make_qkv(Sizes(2, 4, 2, 40, 40, 64))
        given = {"document_ids": (torch.rand(2, 40) < 0.2).cumsum(1)} if packed else {}
        # Rows that lie apart, in the way a sum's gradient does: the plan's engine reads no such tensor.
        grad_out = torch.randn(2, 4, 64, 40).mT
        out, grads = gradients(lambda *x: runtime.attention(*x, CONFIG, **given), (q, k, v), grad_out)  # noqa: B023
        want, exact = gradients(lambda *x: expected(*x, CONFIG, **given), (q, k, v), grad_out)  # noqa: B023
        for mine, true in zip((out, *grads), (want, *exact), strict=True):
            assert relative_error(mine, true) <= 3e-6  # of float32, as in test_blocked_cuda
        assert len(taken) == step  # the first goes the long way, and leaves its plan
    batch = torch.randn(3, *q.shape)
    leaf = q.detach().requires_grad_()
    out = runtime.attention(leaf, k, v, CONFIG, **given)
    (many,) = torch.autograd.grad(out, leaf, batch, is_grads_batched=True, retain_graph=True)
    for one, grad_out in zip(many, batch, strict=True):
        assert torch.equal(one, torch.autograd.grad(out, leaf, grad_out, retain_graph=True)[0])
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    assert len(taken) == 3
