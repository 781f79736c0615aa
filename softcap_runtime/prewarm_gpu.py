"""Prewarming on a GPU: its kernels follow from a call's layout, so calls are made; their options may be measured."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.checks import device_of
from softcap_runtime.config import PrewarmRequest
from softcap_runtime.kernels.cubin import CubinSpec
from softcap_runtime.kernels.gpu_options import FEW_SPLITS, Direction, decode_rows, directions
from softcap_runtime.kernels.gpu_tune import Shape, trials
from softcap_runtime.kernels.key import KernelSpec, MaskKind, dtype_of
from softcap_runtime.kernels.triton_launch import TMA_FROM
from softcap_runtime.prewarm_rows import Outcome, PrewarmResult, Shown, row_of
from softcap_runtime.tuned import measured_once

if TYPE_CHECKING:
    from softcap_runtime.runtime import Runtime

MASKS: tuple[MaskKind, MaskKind] = ("band", "intervals")
# Keys of the calls: few, yet more rows than decoding takes; and so many that decoding cuts them into more than a few
# shares, of four blocks of 128 at least.
SHORT, MANY_KEYS = 128, 2 * FEW_SPLITS * 4 * 128


def to_tune(requests: Iterable[PrewarmRequest]) -> dict[tuple[str, str, int, Direction], Shape]:
    """What options are kept for, and the calls to measure them by: the first request decides."""
    found: dict[tuple[str, str, int, Direction], Shape] = {}
    for one in requests:
        device = device_of(one.device)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        shape = Shape(
            device,
            dtype_of(one.dtype),
            one.num_heads,
            one.num_kv_heads,
            one.head_dim,
            max(SHORT, *one.seq_lens) if one.seq_lens else MANY_KEYS,
            one.config.scale,
            one.config.softcap,
        )
        for direction in directions(one.head_dim, one.train):
            found.setdefault((str(device), one.dtype, one.head_dim, direction), shape)
    return found


def tune(
    runtime: Runtime, key: tuple[str, str, int, Direction], shape: Shape, pool: Executor, shown: Shown
) -> PrewarmResult:
    """Have the best options of a kernel measured, or find those that were."""
    direction = key[3]
    capped = shape.softcap is not None
    spec = KernelSpec(f"tuned {direction}", "cuda", key[1], shape.head_dim, capped, "")

    def work() -> tuple[Outcome, int]:
        done = measured_once(
            runtime.supply.store,
            shape.device.index,
            shape.dtype,
            shape.head_dim,
            direction,
            lambda: trials(shape, direction, pool),
        )
        return ("built" if done.source == "built" else "loaded"), len(done.data)

    return row_of(spec, shown, work)


class GpuCall(NamedTuple):
    """A call of zeros: query ``rows`` over ``keys`` under one kind of masks."""

    request: PrewarmRequest
    rows: int
    keys: int
    mask: MaskKind

    @property
    def spec(self) -> KernelSpec:
        """What progress bars and tables call it."""
        kind = "decoding" if self.rows < self.keys else "training" if self.request.train else "forward"
        capped = self.request.config.softcap is not None
        return KernelSpec(f"gpu {kind}", "cuda", self.request.dtype, self.request.head_dim, capped, self.mask)


def calls_of(request: PrewarmRequest) -> list[GpuCall]:
    """The calls that meet every GPU kernel which calls like ``request`` may need, at the lengths that it names too.

    Kernels differ between short and long calls, and those of decoding in how many query rows they take together.
    """
    group = request.num_heads // request.num_kv_heads
    most = decode_rows(dtype_of(request.dtype))
    rows = {1, *(size // group for size in (32, 64) if size <= most)} - {0}
    long = SHORT
    while 2 * request.num_heads * request.head_dim * long**2 < TMA_FROM:
        long *= 2
    shapes = [(keys, keys) for keys in (*request.seq_lens, SHORT, long)]
    shapes += [(count, keys) for keys in (SHORT, MANY_KEYS) for count in sorted(rows)]
    return [GpuCall(request, *shape, mask) for shape in dict.fromkeys(shapes) for mask in MASKS]


def _make(runtime: Runtime, call: GpuCall, shown: Shown) -> PrewarmResult:
    def work() -> tuple[Outcome, int]:
        _run(runtime, call)
        if torch.device(call.request.device).type == "cuda":
            torch.cuda.synchronize(call.request.device)
        return "ready", 0

    return row_of(call.spec, shown, work)


def _run(runtime: Runtime, call: GpuCall) -> None:
    request, device = call.request, device_of(call.request.device)

    def zeros(length: int, heads: int) -> Tensor:
        shape = (1, length, heads, request.head_dim)
        return torch.zeros(shape, dtype=dtype_of(request.dtype), device=device).transpose(1, 2)

    q, k, v = zeros(call.rows, request.num_heads), *(zeros(call.keys, request.num_kv_heads) for _ in range(2))
    ids = torch.zeros(1, call.keys, dtype=torch.int32, device=device) if call.mask == "intervals" else None
    with torch.no_grad():
        runtime.attention(q, k, v, request.config, document_ids=ids)
    if request.train and call.rows == call.keys:
        with torch.enable_grad():
            inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
            out = runtime.attention(*inputs, request.config, document_ids=ids)
            torch.autograd.grad(out, inputs, torch.zeros_like(out))


def make_calls(runtime: Runtime, calls: list[GpuCall], pool: Executor, shown: Shown) -> list[PrewarmResult]:
    """Make ``calls``; a row for each kernel that they brought here, and for each call that failed or brought none."""
    known = set(runtime.supply.supplied)
    with runtime.supply.prewarming():
        made = list(pool.map(lambda call: _make(runtime, call, shown), calls))
    new = [
        PrewarmResult(
            spec.summary(), "built" if one.source == "built" else "loaded", one.seconds, one.bytes, None
        )
        for spec, one in list(runtime.supply.supplied.items())
        if spec not in known and isinstance(spec, CubinSpec)
    ]
    return new + [row for row in made if row.outcome == "failed" or not new]
