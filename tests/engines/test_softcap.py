"""The softcap of the compiled CPU kernels against tanh in float64."""

from __future__ import annotations

import torch

from softcap_runtime.engines.graphs.softcap import HALF_LIMIT, capped, tanh, tanh_half


def test_every_size_of_argument(seed: int) -> None:
    y = torch.cat([torch.randn(200_000) * 10.0**power for power in range(-8, 5)])
    y = torch.cat([y, torch.linspace(-10, 10, 400_001)])
    want = y.double().tanh()
    error = (tanh(y).double() - want).abs() / want.abs().clamp(min=1e-300)
    # A rounding of float32 is 6e-8 at most: two in the worst place, less than one on average.
    assert float(error.max()) <= 2e-7
    assert float(error.square().mean().sqrt()) <= 6e-8


def test_special_arguments() -> None:
    y = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3e38, -3e38])
    got = tanh(y)
    assert got.isnan().tolist() == y.isnan().tolist()
    seen = ~y.isnan()
    assert torch.equal(got[seen], y[seen].tanh())


def test_saturation_leaves_no_slope() -> None:
    y = torch.linspace(9.1, 1e5, 100_000)
    for bounded in (tanh(y), tanh(-y)):
        assert not (1 - bounded * bounded).any()


def test_bounds_and_symmetry(seed: int) -> None:
    y = torch.randn(100_000) * 5
    assert torch.equal(tanh(-y), -tanh(y))
    for cap in (0.1, 50.0, 1000.0):
        one = torch.tensor(cap)
        assert bool((capped(y * cap, one, 1 / one).abs() <= one).all())


def test_the_one_for_half_precision(seed: int) -> None:
    y = torch.cat([torch.randn(200_000) * 10.0**power for power in range(-8, 5)])
    y = torch.cat([y, torch.linspace(-10, 10, 400_001)])
    want = y.double().tanh()
    error = (tanh_half(y).double() - want).abs() / want.abs().clamp(min=1e-300)
    assert float(error.max()) <= 5e-6  # the fit's 4.6e-6 and float32's roundings
    assert torch.equal(tanh_half(-y), -tanh_half(y))
    saturated = tanh_half(torch.tensor([HALF_LIMIT, 30.0, torch.inf]))
    assert float((1 - saturated * saturated).abs().max()) <= 2.4e-7  # two of float32's steps below 1
    assert tanh_half(torch.tensor(torch.nan)).isnan()
