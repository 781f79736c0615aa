"""Which calls the Gluon kernels take, and with which blocks: nothing here imports Triton or touches a GPU.

What decided (one H200, torch 2.11, Triton 3.6, causal, cap 50, bf16, 2026-11-29; milliseconds; a line's pairs are of
one run each; B2 S8192, Hq16 Hkv8 at head_dim 256, Hq32 Hkv16 below; a training forward also sums its rounded weights):

=========================================  ===================  ===================
forward                                    Triton               Gluon
=========================================  ===================  ===================
D256; window 4096; training                2.17; 1.92; 2.54     1.51; 1.25; 1.71
D256 without a cap; fp16; D192             2.41; 2.65; 2.27     1.56; 1.96; 1.44
D128 exact in four runs                    2.57 2.51 2.28 2.23  2.34 2.34 2.44 2.42
D128 window 4096; training                 1.88; 3.20           1.83; 2.41
D128 approximate; without a cap; fp16      2.18; 2.51; 3.02     2.04; 1.99; 2.79
D64 exact; training                        1.81; 2.48           1.88; 1.94
32,768 packed: D256; D128; D128 training   1.19; 1.08; 1.34     0.82; 1.12; 1.17
B8 Hq8 Hkv4 D256 S1024; one of 512         0.148; 0.042         0.096; 0.033
=========================================  ===================  ===================

The card is power capped: a kernel's time moves by a tenth from run to run. Backward, Triton and Gluon: D256 10.1 and
7.0 to 7.7, window 4096 7.7 and 5.5; D128 7.7 and 7.3, window 6.0 and 5.6; D64 5.1 and 4.9; packed D256 6.8 and 4.5 to
4.9, D128 5.1 and 4.6 to 4.9. 128 keys a block for D128's dq took 3.2 in place of 3.0. Not measured: head_dim 64 without
a cap, in float16 and by the tanh instruction, which is taken to be as its exact form.

With keys that are not kept Triton's blocks took 2.3 to 3.2 times a causal call's time at D128, these 1.1 to 1.2 in
training (2026-11-30). One kernel for all three gradients of D128, with 5 products a tile in place of 7, a third
warpgroup for dq and its float32 sums added in a fixed order, took 6.5 to 6.9 in place of 6.7, and 52 in place of 54 at
B1 S32768: 0.7 of it waits for the order, 0.7 adds to memory. Shorter calls were slower.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from softcap_runtime.cuda.options import DeviceLimits, Direction, tile_width, triton_version
from softcap_runtime.cuda.triton.call import Factors, Mask

# What compiles the kernels: warp specialisation as they use it. The forms of a softcap that they know.
OLDEST_TRITON = (3, 6)
FORMS = (0, 1, 2)
# Keys from which it is the faster one in inference where some may not be kept, by tile width.
KEPT_FROM = {64: 4096, 128: 2048}
# Rows that a warpgroup takes: those of one matrix instruction.
WARPGROUP_ROWS = 64


class ForwardOptions(NamedTuple):
    """Keys a block holds, warpgroups that compute (64 query rows each), tiles of keys and of values in flight."""

    block_n: int
    warpgroups: int
    stages: int

    @property
    def block_m(self) -> int:
        """Query rows of a program."""
        return WARPGROUP_ROWS * self.warpgroups


class BackwardOptions(NamedTuple):
    """Rows or keys a block that streams by holds (those that stay are 128), and how many such blocks are in flight."""

    block: int
    stages: tuple[int, int]

    @property
    def own(self) -> int:
        """Query rows of a program of dq, keys of one of dk and dv."""
        return 2 * WARPGROUP_ROWS


_FORWARD = {64: ForwardOptions(128, 3, 3), 128: ForwardOptions(64, 3, 4), 256: ForwardOptions(64, 2, 2)}
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


def serves(limits: DeviceLimits, dtype: torch.dtype, call: Factors, tma: bool) -> bool:
    """Whether the kernels can compute a call whose tensors come through tensor maps or not."""
    return (
        tma
        and limits.capability == (9, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and call.form in FORMS
        and triton_version() >= OLDEST_TRITON
    )


def faster_forward(head_dim: int, keys: int, mask: Mask, call: Factors, total: bool) -> bool:
    """Whether the forward kernel is the faster one where it serves; the backward kernels always are.

    ``total``: it sums the rounded weights, for training.
    """
    width = tile_width(head_dim)
    if width == 256 or total:
        return True
    if mask.kept:
        return keys >= KEPT_FROM[width]
    exact = call.form == 1 and not call.online
    return width == 128 and (mask.band or not exact)


def forward_options(head_dim: int, call: Factors, total: bool) -> ForwardOptions:
    """The blocks of the forward kernel."""
    if tile_width(head_dim) == 128 and call.form == 1 and not call.online and not total:
        return ForwardOptions(128, 2, 2)  # two blocks' exponentials at a time
    return _FORWARD[tile_width(head_dim)]


def backward_options(direction: Direction, head_dim: int) -> BackwardOptions:
    """The blocks of a backward kernel."""
    return _BACKWARD[direction, tile_width(head_dim)]


def programs(limits: DeviceLimits, tiles: int, alike: bool, beside: bool) -> tuple[int, int, int]:
    """The grid for a number of tiles.

    A program a multiprocessor, which takes tiles until none is left; where they are not ``alike`` a program a tile,
    since they then differ in ways that no fixed order balances (packed, head_dim 256: 0.87 and 0.82 ms forward, 4.63
    and 4.52 backward). So too ``beside`` an exchange, which holds some multiprocessors: those of a program each would
    only start when it ends, or it would wait for them all.
    """
    return (min(tiles, limits.multiprocessors) if alike and not beside else tiles), 1, 1
