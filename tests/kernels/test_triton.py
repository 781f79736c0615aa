"""The Triton kernels without a GPU: run by Triton's interpreter, compiled for cards that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from softcap_runtime.kernels.gpu_options import DeviceLimits, Direction, choose, shared_bytes, splits_backward

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Beside the environment and not in it (see scripts/test.sh), or wherever it is installed.
PLACE = Path(os.environ.get("SOFTCAP_TEST_TRITON", Path(sys.prefix) / "triton"))
INSTALLED = importlib.util.find_spec("triton") is not None or (PLACE / "triton").is_dir()
pytestmark = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed, nor in $SOFTCAP_TEST_TRITON")

# float32 is computed in float32; float16 rounds the weights, and in the backward their gradients, to 2**-12. No
# bfloat16: the interpreter multiplies its bits (Triton 3.7).
TOLERANCE = {"float32": 2e-6, "float16": 1e-3}
# (sizes B Hq Hkv Sq Skv D), mask, softcap, dtype: lengths off the blocks, each kind of mask, each head_dim and form.
CASES = [
    ((2, 4, 2, 70, 70, 64), "window", 50.0, "float32"),
    ((2, 4, 2, 40, 40, 64), "a row of nothing", 50.0, "float32"),
    ((2, 2, 1, 70, 70, 128), "documents", 50.0, "float32"),
    ((1, 2, 1, 70, 90, 96), "window", 100.0, "float32"),
    ((2, 2, 2, 50, 50, 64), "shared", None, "float32"),
    ((1, 2, 2, 33, 50, 256), "window", 50.0, "float32"),
    ((1, 4, 2, 2, 90, 64), "window", 50.0, "float32"),
    ((1, 2, 1, 70, 70, 256), "window", 50.0, "float16"),
    ((1, 2, 1, 70, 70, 64), "documents", 50.0, "float16"),
]
CARDS = {
    "sm 8.9, 99 KB": DeviceLimits(99 * 1024, (8, 9), 128),
    "sm 9.0, 227 KB": DeviceLimits(227 * 1024, (9, 0), 132),
}
Compiled = tuple[str, str, int, Direction, bool]
KERNELS: list[Compiled] = [
    (card, dtype, head_dim, direction, band)
    for card, dtype, head_dim in (
        ("sm 9.0, 227 KB", "bfloat16", 256),
        ("sm 8.9, 99 KB", "float32", 128),
    )
    for band, directions in (
        (True, ("forward", "dq", *(("dk", "dv") if splits_backward(head_dim) else ("dkdv",)))),
        (False, ("decode",)),
    )
    for direction in directions
]


def run(script: str, *arguments: str, **variables: str) -> list[dict[str, Any]]:
    path = os.pathsep.join([str(ROOT), str(PLACE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted(base_seed: int) -> list[dict[str, Any]]:
    cases = [dict(zip(("sizes", "mask", "softcap", "dtype"), case, strict=True)) for case in CASES]
    return run("triton_interpreted.py", json.dumps(cases), str(base_seed), TRITON_INTERPRET="1")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", range(len(CASES)), ids=str)
def test_errors_in_the_interpreter(interpreted: list[dict[str, Any]], place: int, seed: int) -> None:
    found = interpreted[place]
    assert found.pop("lse") <= {"float32": 5e-6, "float16": 1e-3}[CASES[place][3]]
    assert found.pop("lse of nothing") == 0
    assert found.pop("layout") == 0
    for name, error in found.items():
        assert error <= TOLERANCE[CASES[place][3]], name


@pytest.fixture(scope="module")
def compiled() -> dict[Compiled, dict[str, Any]]:
    cases = [
        {
            "direction": direction,
            "head_dim": head_dim,
            "dtype": dtype,
            "band": band,
            "capability": CARDS[card].capability,
            "options": choose(CARDS[card], getattr(torch, dtype), head_dim, direction),
        }
        for card, dtype, head_dim, direction, band in KERNELS
    ]
    return dict(zip(KERNELS, run("triton_compiled.py", json.dumps(cases)), strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_a_kernel_compiles_within_its_shared_memory(
    compiled: dict[Compiled, dict[str, Any]], kernel: Compiled
) -> None:
    card, dtype, head_dim, direction, _ = kernel
    limits = CARDS[card]
    options = choose(limits, getattr(torch, dtype), head_dim, direction)
    taken = compiled[kernel]["shared"]
    assert taken <= shared_bytes(options, getattr(torch, dtype), head_dim, direction) <= limits.shared_bytes
