"""Tuning as a part of prewarming: which GPU kernels to measure, with which calls, and the results."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

from softcap_runtime.checks import device_of
from softcap_runtime.config import PrewarmRequest
from softcap_runtime.cuda.options import Direction, directions
from softcap_runtime.cuda.tune import Shape, trials
from softcap_runtime.cuda.tuned import measured_once
from softcap_runtime.engines.blocked_cuda import MANY_KEYS, MANY_ROWS
from softcap_runtime.engines.spec import KernelSpec, dtype_of
from softcap_runtime.prewarm.rows import Outcome, PrewarmResult, Shown, row_of
from softcap_runtime.supply import Supply


def to_tune(requests: Iterable[PrewarmRequest]) -> dict[tuple[str, str, int, Direction], Shape]:
    """The kernels to tune, and the shape of the calls to measure each with; the first request decides."""
    found: dict[tuple[str, str, int, Direction], Shape] = {}
    for one in requests:
        device = device_of(one.device)
        shape = Shape(
            device,
            dtype_of(one.dtype),
            one.num_heads,
            one.num_kv_heads,
            one.head_dim,
            max(MANY_ROWS, *one.seq_lens) if one.seq_lens else MANY_KEYS,
            one.config.scale,
            one.config.softcap,
        )
        for direction in directions(one.head_dim, one.train):
            found.setdefault((str(device), one.dtype, one.head_dim, direction), shape)
    return found


def measure(
    supply: Supply, key: tuple[str, str, int, Direction], shape: Shape, pool: Executor, shown: Shown
) -> PrewarmResult:
    """Measure the best options of a kernel, or find earlier results."""
    direction = key[3]
    capped = shape.softcap is not None
    spec = KernelSpec(f"tuned {direction}", "cuda", key[1], shape.head_dim, capped)

    def work() -> tuple[Outcome, int]:
        done = measured_once(
            supply.store,
            shape.device.index,
            shape.dtype,
            shape.head_dim,
            direction,
            lambda: trials(shape, direction, pool),
        )
        return ("built" if done.source == "built" else "loaded"), len(done.data)

    return row_of(spec, shown, work)
