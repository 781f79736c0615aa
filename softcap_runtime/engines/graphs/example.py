"""What is exported: a module with example inputs, and examples that tie no two numbers of a kernel together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Graph(NamedTuple):
    """What is exported: a module, example inputs, and torch.export's ``dynamic_shapes`` for them."""

    module: nn.Module
    example: tuple[Tensor, ...]
    dynamic: tuple[Any, ...]


def distinct(sizes: tuple[int, ...], taken: set[int], dtype: torch.dtype) -> Tensor:
    """An example tensor, last stride 1, whose other strides are like no number of the graph so far.

    torch.export gives equal numbers one symbol, and a stride that is size times stride of another dimension that
    expression: a kernel would then read with the wrong one. ``taken`` holds the numbers that symbols have already,
    the dynamic sizes first; the strides and those products are added to it. Strides are multiples of 8.
    """
    strides = [1]
    for size in reversed(sizes[1:]):
        product = size * strides[0]
        taken.add(product)
        step = product + 8 - product % 8
        while step in taken:
            step += 8
        taken.add(step)
        strides.insert(0, step)
    return torch.empty_strided(sizes, strides, dtype=dtype)
