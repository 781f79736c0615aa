"""Which calls the Gluon kernels take, and with which blocks: nothing here imports Triton or touches a GPU.

What decided (one H200, torch 2.11, Triton 3.6, causal, cap 50, bf16, 2026-11-29 and 2026-12-01; milliseconds; a line's
pairs are of one run each; B2 S8192, Hq16 Hkv8 at head_dim 256, Hq32 Hkv16 below; a training forward also sums its
rounded weights):

=========================================  ===================  ===================
forward                                    Triton               Gluon
=========================================  ===================  ===================
D256; window 4096; training                2.37; 1.92; 2.54     1.55; 1.25; 1.71
D256 without a cap; fp16; D192             2.41; 2.65; 2.27     1.56; 1.96; 1.44
D128; window 4096; training                2.40; 1.88; 3.20     2.02; 1.59; 2.15
D128 approximate; without a cap; fp16      2.18; 2.51; 2.99     1.95; 1.99; 2.56
D64; approximate; without a cap; fp16      1.79; 1.61 1.47 2.18 1.48; 1.64 1.54 2.10
32,768 packed: D256; D128; D64             1.19; 1.37; 0.90     0.82; 1.45; 1.06
B8 Hq8 Hkv4 D256 S1024; one of 512         0.127; 0.042         0.076; 0.033
B16 S512: D128; D64                        0.143; 0.099         0.145; 0.121
a tenth of the keys hidden, D128: 512      0.029                0.032
2,048; D64: 512; 2,048; 8,192              0.24; 0.023 0.19 2.4 0.19; 0.028 0.16 1.7
left padding of up to half, D128: 2,048    0.24                 0.31
8,192; D64: 2,048; 8,192                   1.6; 0.19 1.2        1.5; 0.27 1.1
=========================================  ===================  ===================

Since then the first step of a tile is one of a loop's: D64 1.44 -> 1.35, D128 1.89 -> 1.83, D256 1.53 -> 1.50, but
1.03 of the time up to 1,024 tokens, where its product of nothing counts.

Padding gains less than it hides at head_dim 64 and 128: beside programs at work on short tiles those of a long one take
twice as many cycles (head_dim 64, 1,920 keys: 112,519 in place of 54,920). With two warpgroups they do not, but are
slower on long rows. Three hold the forward's code three times, then 190 KB with intervals, and programs share a cache
of instructions; but 119 KB, with one loop for edges and holes and the blocks of a tile told by the producer, changed
nothing for padding, and took 1.1 to 1.5 of the time where keys are hidden.

The card is power capped: a kernel's time moves by a tenth from run to run. Backward, Triton and Gluon: D256 10.1 and
7.0 to 7.7, window 4096 7.7 and 5.5; D128 7.7 and 7.0, window 6.0 and 5.4; D64 5.1 and 4.8; packed D256 6.8 and 4.5 to
4.9, D128 5.1 and 4.6 to 4.9. A third warpgroup for dq is 0.25 of D128's, 0.12 of D64's; with intervals it spills 730
bytes a thread and takes longer. Tried: 128 keys a block for D128's dq took 3.2 in place of 3.0; q and grad_out from
registers, as long. One kernel for all three gradients, with 5 products a tile in place of 7, a third warpgroup for dq
and its float32 sums added in a fixed order, took 6.5 to 6.9 in place of 6.7, and 52 in place of 54 at B1 S32768: 0.7 of
it waits for the order, 0.7 adds to memory. Shorter calls were slower.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from softcap_runtime.cuda.options import DeviceLimits, Direction, tile_width, triton_version
from softcap_runtime.cuda.triton.call import Factors, Mask

# What compiles the kernels: warp specialisation as they use it. The forms of a softcap that they know.
OLDEST_TRITON = (3, 6)
FORMS = (0, 1, 2)
# Keys from which it is the faster one in inference at head_dim 64, and at 128 where some may not be kept.
LONG = 1024
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
    """Rows or keys a block that streams by holds, how many such blocks are in flight, and warpgroups that compute."""

    block: int
    stages: tuple[int, int]
    warpgroups: int = 2

    @property
    def own(self) -> int:
        """Query rows of a program of dq, keys of one of dk and dv."""
        return WARPGROUP_ROWS * self.warpgroups


_FORWARD = {64: ForwardOptions(64, 3, 4), 128: ForwardOptions(64, 3, 4), 256: ForwardOptions(64, 2, 2)}
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
# For dq of a band; with intervals a third warpgroup has too few registers.
_BAND_DQ = {64: BackwardOptions(64, (4, 4), 3), 128: BackwardOptions(64, (3, 3), 3)}


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
    if keys < LONG and (width == 64 or mask.kept):
        return False
    return mask.band or mask.kept or call.online


def forward_options(head_dim: int) -> ForwardOptions:
    """The blocks of the forward kernel."""
    return _FORWARD[tile_width(head_dim)]


def backward_options(direction: Direction, head_dim: int, band: bool) -> BackwardOptions:
    """The blocks of a backward kernel."""
    width = tile_width(head_dim)
    if direction == "dq" and band and width in _BAND_DQ:
        return _BAND_DQ[width]
    return _BACKWARD[direction, width]


def programs(limits: DeviceLimits, tiles: int, alike: bool, beside: bool) -> tuple[int, int, int]:
    """The grid for a number of tiles.

    A program a multiprocessor, which takes tiles until none is left; where they are not ``alike`` a program a tile,
    since they then differ in ways that no fixed order balances (packed, head_dim 256: 0.87 and 0.82 ms forward, 4.63
    and 4.52 backward). So too ``beside`` an exchange, which holds some multiprocessors: those of a program each would
    only start when it ends, or it would wait for them all.
    """
    return (min(tiles, limits.multiprocessors) if alike and not beside else tiles), 1, 1
