"""What a call tells the Triton kernels besides its tensors: the mask's edges, and the softcap as constants."""

from __future__ import annotations

from collections.abc import Sequence
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
# The logistic form's logits are off by about cap * 3e-7: past this cap by more than half precision's own rounding.
LOGISTIC_CAP = 1024.0
LOG2E = 1.4426950408889634


class Mask(NamedTuple):
    """A band (``left``, ``right``) or intervals of ``batch`` entries, 1 when all share one; what is in them comes with
    each call, and with ``kept`` which keys are kept."""

    left: int
    right: int
    batch: int | None
    kept: bool = False

    @property
    def band(self) -> bool:
        """Whether it is a band."""
        return self.batch is None

    def width(self, rows: int, keys: int) -> int:
        """Keys a row may see at most, as far as the host knows."""
        return max(1, min(keys, rows + self.right - self.left)) if self.band else keys

    def kept_len(self, keys: int) -> int:
        """How many numbers of a row of ``kept`` kernels read."""
        return keys if self.kept else 0

    def batch_stride(self, rows: int) -> int:
        """Elements from one batch entry's intervals to the next; 0 when they share one."""
        return 0 if self.batch is None or self.batch == 1 else rows


class Factors(NamedTuple):
    """How a raw product becomes a logit in log2 units: ``common.capped``'s arguments and its form."""

    form: int
    inner: float
    coef: float
    bias: float
    reference: float
    gain: float
    online: bool


@lru_cache(maxsize=256)
def factors(dtype: torch.dtype, scale: float, softcap: float | None, approx: bool) -> Factors:
    """The form of the softcap and its constants; see ``common`` for the identities."""
    scale = float(scale)  # all of them are floats: a kernel is compiled for the types of its numbers
    if softcap is None:
        return Factors(0, scale * LOG2E, 0.0, 0.0, 0.0, scale, True)
    # float16 weights underflow against a fixed reference (its smallest is exp(-16.6)), so they follow a maximum.
    online = softcap > FIXED_REFERENCE_CAP or dtype == torch.float16
    reference = 0.0 if online else max(0.0, softcap - REFERENCE_FROM) * LOG2E
    outer = softcap * LOG2E
    if approx or dtype == torch.float32 or softcap > LOGISTIC_CAP:
        form = 2 if approx else 3
        return Factors(form, scale / softcap, outer, 0.0, reference, scale, online)
    return Factors(1, 2 * scale * LOG2E / softcap, -2 * outer, outer, reference, 4 * scale, online)


def multiply_adds(products: int, q: Tensor, k: Tensor, mask: Mask) -> int:
    """Of ``products`` between all query rows and the keys that they may see, at most."""
    batch, heads, rows, dim = q.shape
    return products * batch * heads * rows * mask.width(rows, k.shape[2]) * dim


def make_mask(left: int | None, right: int | None, edges: Sequence[Tensor]) -> Mask:
    """The mask of a call; None bounds are none. ``edges``: ``RowIntervals.vectors``."""
    if edges:
        return Mask(0, 0, edges[0].shape[0], len(edges) == 3)
    return Mask(
        -UNBOUNDED if left is None else max(-UNBOUNDED, min(left, UNBOUNDED)),
        UNBOUNDED if right is None else max(-UNBOUNDED, min(right, UNBOUNDED)),
        None,
    )
