"""Which calls the Gluon kernels serve, and with which blocks: nothing here imports Triton or touches a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from softcap_runtime.kernels.gpu_options import DeviceLimits, Direction, tile_width, triton_version
from softcap_runtime.kernels.triton_call import Factors

# What compiles the kernels: warp specialisation as they use it. The forms of a softcap that they know.
OLDEST_TRITON = (3, 6)
FORMS = (0, 1, 2)
# Rows that a warpgroup takes: those of one matrix instruction.
WARPGROUP_ROWS = 64


class GluonOptions(NamedTuple):
    """Keys a block holds, warpgroups that compute (64 query rows each), tiles of keys and of values in flight."""

    block_n: int
    warpgroups: int
    stages: int
    persistent: bool = True

    @property
    def block_m(self) -> int:
        """Query rows of a program."""
        return WARPGROUP_ROWS * self.warpgroups


_FORWARD = {64: GluonOptions(128, 3, 3), 128: GluonOptions(64, 3, 4), 256: GluonOptions(64, 2, 2)}


def serves(limits: DeviceLimits, dtype: torch.dtype, call: Factors, tma: bool) -> bool:
    """Whether the kernels can compute a call whose tensors come through tensor maps or not."""
    return (
        tma
        and limits.capability == (9, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and call.form in FORMS
        and triton_version() >= OLDEST_TRITON
    )


def forward_options(head_dim: int) -> GluonOptions:
    """The blocks of the forward kernel."""
    return _FORWARD[tile_width(head_dim)]


class BackwardOptions(NamedTuple):
    """Rows or keys a block that streams by holds (those that stay are 128), and how many such blocks are in flight."""

    block: int
    stages: tuple[int, int]

    @property
    def own(self) -> int:
        """Query rows of a program of dq, keys of one of dk and dv."""
        return 2 * WARPGROUP_ROWS


# Tiles of keys and values for dq; tiles of q and grad_out for the others. At head_dim 256 four tiles stay.
_BACKWARD: dict[tuple[Direction, int], BackwardOptions] = {
    ("dq", 64): BackwardOptions(64, (4, 4)),
    ("dq", 128): BackwardOptions(64, (4, 3)),
    ("dq", 256): BackwardOptions(64, (2, 1)),
    ("dkdv", 64): BackwardOptions(64, (4, 4)),
    ("dkdv", 128): BackwardOptions(64, (3, 3)),
    ("dk", 256): BackwardOptions(64, (2, 1)),
    ("dv", 256): BackwardOptions(64, (2, 2)),
}


def backward_options(direction: Direction, head_dim: int) -> BackwardOptions:
    """The blocks of a backward kernel."""
    return _BACKWARD[direction, tile_width(head_dim)]
