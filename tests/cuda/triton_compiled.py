"""Compiles the GPU kernels of calls for cards that need not be here, and prints a line of JSON for each.

The calls are bound as on a GPU, with tensors that have no memory: keys and parameters are the real ones.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stand_in
import torch
from torch import Tensor

from softcap_runtime.cuda import options as gpu_options
from softcap_runtime.cuda.cubin import Cubin, CubinSpec
from softcap_runtime.cuda.intervals import bind_intervals
from softcap_runtime.cuda.parameters import Number, Parameter
from softcap_runtime.cuda.triton import build as triton_build
from softcap_runtime.cuda.triton.attention import bind_forward
from softcap_runtime.cuda.triton.gradient import bind_backward


class Wanted:
    """Collects the keys that calls ask for."""

    def __init__(self, limits: gpu_options.DeviceLimits) -> None:
        self.specs: dict[CubinSpec, None] = {}
        self.limits = limits

    def function(self, spec: CubinSpec) -> Wanted:
        self.specs[spec] = None
        return self

    def options(self, q: Tensor, direction: gpu_options.Direction) -> gpu_options.BlockOptions:
        return gpu_options.choose(self.limits, q.dtype, q.shape[-1], direction)

    def bind(
        self, grid: tuple[int, int, int], parameters: Sequence[Parameter], numbers: Sequence[Number]
    ) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return lambda *tensors: None


def wanted(case: dict[str, Any], limits: gpu_options.DeviceLimits) -> list[CubinSpec]:
    """The kernels of a call's forward and backward, and of its intervals."""
    dtype, rows, keys = getattr(torch, case["dtype"]), case["rows"], case["keys"]

    def tensor(length: int, heads: int) -> Tensor:
        return torch.empty(1, length, heads, case["head_dim"], dtype=dtype, device="meta").transpose(1, 2)

    kernels = Wanted(limits)
    how: dict[str, Any] = {"kernels": kernels, "scale": 0.1, "softcap": case.get("softcap", 50.0)}
    how |= {"approx": case.get("approx", False), "gluon": case.get("gluon")}
    edges: list[Tensor] = []
    if case["band"]:
        how["right"] = keys - rows + 1
    else:
        edges = [torch.zeros(1, rows, dtype=torch.int32, device="meta")] * 2
        if case.get("holes"):
            edges.append(torch.zeros(1, keys, dtype=torch.int32, device="meta"))
    q, k, v = tensor(rows, 4), tensor(keys, 2), tensor(keys, 2)
    bind_forward(q, k, v, *edges, train=case["train"], **how)
    if case["train"]:
        lse = torch.empty(1, 4, rows, device="meta")
        bind_backward(q, q, k, v, q, lse, *edges, **how)
    if edges:
        bind_intervals(torch.device("cuda", 0), kernels)
    return list(kernels.specs)


def built(spec: CubinSpec) -> tuple[dict[str, Any], Cubin]:
    """What ``build`` gives, and what its ptxas says: of serialised products, and of the bytes that a thread spills."""
    logs = []
    run = subprocess.run

    def keeping(command: Any, *rest: Any, **how: Any) -> Any:
        done = run(command, *rest, **how)
        if "-v" in command:
            logs.append(Path(how["stderr"].name).read_text())
        return done

    # Triton asks for its kernels in the cache otherwise, where no ptxas runs.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"], subprocess.run = folder, keeping  # type: ignore[assignment]
        try:
            made = Cubin.unpack(triton_build.build(spec))
        finally:
            subprocess.run = run
    (text,) = logs
    spilled = re.findall(r"(\d+) bytes spill stores", text)
    return {"serialised": re.findall(r"C75\d\d", text), "spilled": max(map(int, spilled))}, made


if __name__ == "__main__":
    once = functools.cache(built)  # calls share kernels
    for number, case in enumerate(json.loads(sys.argv[1])):
        shared, capability, multiprocessors = case["card"]
        limits = gpu_options.DeviceLimits(shared, tuple(capability), multiprocessors)
        stand_in.tell_of(limits)
        for spec in wanted(case, limits):
            told, made = once(spec)
            line = {
                "case": number,
                **told,
                "shared": made.shared,
                "boxes": len(made.boxes),
                "threads": made.threads,
                "elf": made.code[:4].hex(),
            }
            print(json.dumps({**line, "spec": spec.fields()}), flush=True)
