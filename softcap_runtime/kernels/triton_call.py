"""What a call tells the Triton kernels besides its tensors: the mask's edges, and the softcap as constants."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# No bound: far enough for any length, and no sum with a row leaves int32.
UNBOUNDED = 1 << 29
# Fixed-reference weights span exp(-cap - reference) to exp(cap - reference); past this cap float32 cannot hold
# both ends, a sum over the keys and the values' own size.
FIXED_REFERENCE_CAP = 64.0
# exp(50) * 2**20 keys * values of 1e9 is still finite in float32.
REFERENCE_FROM = 50.0
LOG2E = 1.4426950408889634


class Mask(NamedTuple):
    """A band (``left``, ``right``; no tensors) or intervals (``lo``, ``hi`` int32 ``[B or 1, Sq]``)."""

    left: int
    right: int
    lo: Tensor | None
    hi: Tensor | None

    def width(self, rows: int, keys: int) -> int:
        """Keys a row may see at most, as far as the host knows."""
        return keys if self.lo is not None else max(1, min(keys, rows + self.right - self.left))

    @property
    def batch_stride(self) -> int:
        """Elements from one batch entry's intervals to the next; 0 when they share one."""
        return 0 if self.lo is None or self.lo.shape[0] == 1 else self.lo.stride(0)


class Factors(NamedTuple):
    """How a raw product becomes a logit in log2 units: ``triton_common.capped``'s arguments and its form."""

    form: int
    inner: float
    coef: float
    bias: float
    reference: float
    gain: float
    online: bool


@lru_cache(maxsize=256)
def factors(dtype: torch.dtype, scale: float, softcap: float | None, approx: bool) -> Factors:
    """The form of the softcap and its constants; see ``triton_common`` for the identities."""
    scale = float(scale)  # all of them are floats: a kernel is compiled for the types of its numbers
    if softcap is None:
        return Factors(0, scale * LOG2E, 0.0, 0.0, 0.0, scale, True)
    # float16 weights underflow against a fixed reference (its smallest is exp(-16.6)), so they follow a maximum.
    online = softcap > FIXED_REFERENCE_CAP or dtype == torch.float16
    reference = 0.0 if online else max(0.0, softcap - REFERENCE_FROM) * LOG2E
    outer = softcap * LOG2E
    if approx or dtype == torch.float32:
        form = 2 if approx else 3
        return Factors(form, scale / softcap, outer, 0.0, reference, scale, online)
    return Factors(1, 2 * scale * LOG2E / softcap, -2 * outer, outer, reference, 4 * scale, online)


def make_mask(left: int | None, right: int | None, lo: Tensor | None, hi: Tensor | None) -> Mask:
    """The mask of a call; None bounds are none. Intervals are made contiguous along the rows."""
    if lo is not None and hi is not None:
        lo, hi = lo.to(torch.int32), hi.to(torch.int32)
        if lo.stride(-1) != 1 or hi.stride() != lo.stride():
            lo, hi = lo.contiguous(), hi.contiguous()
        if (lo.data_ptr() | hi.data_ptr()) % 16:  # kernels are compiled for aligned addresses
            lo, hi = lo.clone(), hi.clone()
        return Mask(0, 0, lo, hi)
    return Mask(
        -UNBOUNDED if left is None else max(-UNBOUNDED, min(left, UNBOUNDED)),
        UNBOUNDED if right is None else max(-UNBOUNDED, min(right, UNBOUNDED)),
        None,
        None,
    )
