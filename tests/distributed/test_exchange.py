"""Rows put together before and after an exchange, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from softcap_runtime.distributed.exchange import cat, fill

Cat = Callable[[Sequence[Tensor], int], Tensor]


def pieces_of(x: Tensor, dim: int) -> list[Tensor]:
    """Views of ``[B, S, H, D]`` as the methods make them: heads by rank, rows outside, some of them."""
    by_rank = x.transpose(1, 2).unflatten(1, (2, -1)).permute(1, 2, 0, 3, 4)
    return list(by_rank.split([2, 0, 3] if dim == 3 else 1, dim))


@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.parametrize("head_dim", [1, 3, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_as_torch_cat(dim: int, head_dim: int, dtype: torch.dtype, shift: int, seed: int) -> None:
    """Words of 16 bytes or not, at multiples of 16 bytes or not: values, and both derivatives."""
    shape = (3, 5, 4, head_dim)
    x = torch.randn(shift + 3 * 5 * 4 * head_dim).to(dtype)[shift:].view(shape).requires_grad_()
    weights = torch.randn_like(torch.cat(pieces_of(x, dim), dim))

    def derivatives(join: Cat) -> tuple[Tensor, ...]:
        made = join(pieces_of(x, dim), dim)
        first = torch.autograd.grad((made**2 * weights).sum(), x)[0]
        (again,) = torch.autograd.grad((join(pieces_of(x, dim), dim) ** 2 * weights).sum(), x, create_graph=True)
        return made, first, torch.autograd.grad(again.pow(2).sum(), x)[0]

    for found, wanted in zip(derivatives(cat), derivatives(torch.cat), strict=True):
        assert torch.equal(found, wanted)


def test_a_gradient_lies_as_its_tensor(seed: int) -> None:
    x = torch.randn(1, 5, 4, 8, requires_grad=True)
    view = pieces_of(x, 3)[2]  # [rank, heads, B, rows, D], of memory [B, S, rank x heads, D]
    grads = torch.autograd.grad(cat([view, view], 1), view, torch.randn(2, 4, 1, 3, 8))
    assert grads[0].permute(2, 3, 0, 1, 4).is_contiguous()


@pytest.mark.parametrize("head_dim", [7, 8])
def test_fill_leaves_the_rest(head_dim: int, seed: int) -> None:
    whole = torch.zeros(6, 2, 3, head_dim)
    pieces = list(torch.randn(3, 6, head_dim).transpose(0, 1).split([4, 2]))
    fill(whole[:, 1], pieces)
    assert torch.equal(whole[:, 1], torch.cat(pieces))
    assert not whole[:, 0].any()
