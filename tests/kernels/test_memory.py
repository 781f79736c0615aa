"""The blocked engine holds blocks, never S x S of anything, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Sizes, make_qkv
from softcap_runtime.kernels.blocked_walk import block_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softcap_runtime import Runtime
from softcap_runtime.kernels.blocked import CHUNK
from softcap_runtime.kernels.engine import Call
from softcap_runtime.masks.intervals import RowIntervals, band, row_intervals

SIZES = Sizes(1, 4, 2, 2048, 2048)


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *found])
        return result


def masks() -> dict[str, RowIntervals]:
    ids = (torch.arange(SIZES.kv_len) // 700)[None]
    return {
        "causal": band(SIZES.q_len, SIZES.kv_len, causal=True, window=None),
        "packed": row_intervals(SIZES.q_len, SIZES.kv_len, causal=True, window=None, document_ids=ids),
    }


@pytest.mark.parametrize("softcap", [50.0, None])
@pytest.mark.parametrize("mask", ["causal", "packed"])
def test_no_tensor_is_as_large_as_the_logits(
    runtimes: dict[str, Runtime], mask: str, softcap: float | None, seed: int
) -> None:
    runtime = runtimes["blocked"]
    q, k, v = make_qkv(SIZES)
    call = Call(masks()[mask], 0.125, softcap, "blocked", True)
    runtime.forward(q, k, v, call)  # kernels and plan
    with Largest() as seen:
        out, lse = runtime.forward(q, k, v, call)
        assert lse is not None
        runtime.backward(torch.ones_like(out), q, k, v, out, lse, call)
    # A block of rows against one chunk of keys; without a bounded cap against all keys at once.
    keys = CHUNK if softcap is not None else SIZES.kv_len
    assert seen.elements <= max(q.numel(), SIZES.heads * block_rows(SIZES.q_len, torch.float32) * keys)
    assert seen.elements <= SIZES.heads * SIZES.q_len * SIZES.kv_len // 16
