"""The series that takes the place of tanh on Hopper. ``tests/gpu`` runs it as part of the kernels."""

from __future__ import annotations

import re

import torch

from softcap_runtime.cuda.gluon import series


def test_it_is_tanh_where_it_is_used() -> None:
    """To 2.9e-7, as ``series`` says, and past the limit no more: the terms are those of this limit."""
    t = torch.linspace(0, series.LIMIT**0.5, 10_001, dtype=torch.float64)
    for end, most in ((1.0, 2.9e-7), (1.1, 1e-5)):
        square = (t * end) ** 2 - series.LIMIT
        found = t * end * sum(factor * square**i for i, factor in enumerate(series.FACTORS))
        error = float((found - torch.tanh(t * end)).abs().max())
        assert error < most
    assert error > 2.9e-7


def test_every_operand_is_read_or_written() -> None:
    for text, constraints in (series.logistic(), series.weights()):
        operands = constraints.split(",")
        used = {int(number) for number in re.findall(r"\$(\d+)", text)}
        vectors = {number // series.ELEMENTS for number in used}
        assert vectors == set(range(len(operands) // series.ELEMENTS))
        assert set(range(2 * series.ELEMENTS)) <= used  # the others are one value, repeated
        assert max(used) < len(operands)
