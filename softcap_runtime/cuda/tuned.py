"""The block options of GPU kernels that were measured on this machine, as entries of the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from softcap_runtime.artifacts.sources import digest
from softcap_runtime.cuda.kernel import SOURCES
from softcap_runtime.cuda.options import BlockOptions, DeviceLimits, Direction, variants
from softcap_runtime.engines.spec import dtype_name
from softcap_runtime.store import Key, Store, fingerprint
from softcap_runtime.store.store import Loaded

if TYPE_CHECKING:
    from softcap_runtime.cuda.tune import Trial

log = logging.getLogger(__name__)

# Two measurements of one kernel differ by so much.
NOISE = 0.97


def _key(device: int, dtype: torch.dtype, head_dim: int, direction: Direction) -> Key:
    fields: dict[str, str | int | bool] = {
        "op": "tuned_options",
        "device": "cuda",
        "kernel": direction,
        "dtype": dtype_name(dtype),
        "head_dim": head_dim,
        "sources": digest(*SOURCES),
    }
    return Key(fields, fingerprint("cuda", device))


def read(
    store: Store, limits: DeviceLimits, device: int, dtype: torch.dtype, head_dim: int, direction: Direction
) -> BlockOptions | None:
    """What was measured for a kernel on a device with ``limits``; None where nothing was, or nothing that may run."""
    found = store.find(_key(device, dtype, head_dim, direction).digest)
    if found is None:
        return None
    try:
        options = BlockOptions(*json.loads(found[0]))
        if options in variants(limits, dtype, head_dim, direction):
            return options
    except (TypeError, ValueError):
        pass
    log.warning("the tuned options of %s (%s, head_dim %d) are not used: not what this version writes", direction,
                dtype_name(dtype), head_dim)  # fmt: skip
    return None


def measured_once(
    store: Store,
    device: int,
    dtype: torch.dtype,
    head_dim: int,
    direction: Direction,
    measure: Callable[[], Sequence[Trial]],
) -> Loaded:
    """Have the best of ``measure()``'s trials kept, once per machine: a later call finds it and measures nothing."""
    trials: list[Trial] = []

    def build() -> bytes:
        trials.extend(measure())
        best = min(trials, key=lambda trial: trial.milliseconds)
        # The first are what the limits suggest: measured by hand, and not given up for noise.
        kept = best if best.milliseconds < NOISE * trials[0].milliseconds else trials[0]
        return json.dumps(kept.options).encode()

    def describe() -> dict[str, str]:
        return {"{} x {}, {} warps, {} stages".format(*one.options): f"{one.milliseconds:.4g} ms" for one in trials}

    return store.load_or_build(_key(device, dtype, head_dim, direction), build, describe)
