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

from softcap_runtime.artifacts import build
from softcap_runtime.cuda.cubin import Cubin
from softcap_runtime.cuda.kernel import BUILDER
from softcap_runtime.cuda.machine_code import overwritten_operands
from softcap_runtime.cuda.options import DeviceLimits, choose, shared_bytes
from softcap_runtime.cuda.parameters import Pointer, spec_of

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
    # Half precision takes another form of tanh for caps where the usual one would cancel.
    ((1, 2, 1, 70, 70, 64), "window", 1e7, "float16"),
    # Tiles wider than a head, of any size.
    ((1, 2, 1, 40, 50, 20), "window", 50.0, "float32"),
    ((1, 2, 1, 70, 70, 33), "documents", 50.0, "float32"),
    ((2, 2, 1, 50, 50, 72), "window", 50.0, "float32"),
    ((1, 2, 1, 33, 50, 192), "documents", 50.0, "float32"),
    ((1, 4, 2, 2, 90, 40), "window", 50.0, "float32"),
    ((3, 2, 1, 3, 150, 64), "kept", 50.0, "float32"),
    ((3, 2, 1, 150, 150, 64), "kept", 50.0, "float32"),
    ((2, 1, 1, 90, 170, 128), "kept", None, "float16"),
    ((2, 4, 2, 1, 90, 40), "kept", None, "float16"),
]
CARDS = {"sm 8.9, 99 KB": DeviceLimits(99 * 1024, (8, 9), 128), "sm 9.0, 227 KB": DeviceLimits(227 * 1024, (9, 0), 132)}
# Card, dtype, head_dim, rows, keys, a band or intervals, with the backward or not; and the kernels of such a call.
CALLS = [
    ("sm 9.0, 227 KB", "bfloat16", 256, 2048, 2048, True, True, ["forward", "dq", "dk", "dv"]),
    (
        "sm 9.0, 227 KB",
        "float16",
        64,
        3000,
        3000,
        False,
        True,
        ["forward", "dq", "dkdv", "query_hull", "row_intervals"],
    ),
    ("sm 9.0, 227 KB", "bfloat16", 128, 1, 300, False, False, ["decode", "combine", "row_intervals"]),
    ("sm 8.9, 99 KB", "float32", 128, 200, 200, True, True, ["forward", "dq", "dkdv"]),
]
KERNELS = [(call, name) for call in range(len(CALLS)) for name in CALLS[call][-1]]


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


# (heads, key heads, head_dim, page size, window), keys and new rows of each sequence, ragged or not, softcap, dtype.
PAGED_CASES = [
    ((4, 2, 64, 16, None), [1, 40, 130], [1, 1, 1], False, 50.0, "float32"),
    ((4, 2, 64, 64, 20), [70, 40, 130], [4, 4, 4], False, None, "float32"),
    ((2, 1, 40, 16, 20), [70, 3, 33, 5], [1, 3, 20, 0], True, 50.0, "float32"),
    ((4, 1, 64, 256, None), [300, 20], [7, 20], True, 100.0, "float16"),
]


@pytest.mark.timeout(600)
def test_a_paged_cache_in_the_interpreter(base_seed: int, seed: int) -> None:
    names = ("sizes", "lengths", "counts", "ragged", "softcap", "dtype")
    cases = [dict(zip(names, case, strict=True)) for case in PAGED_CASES]
    found = run("triton_paged_interpreted.py", json.dumps(cases), str(base_seed), TRITON_INTERPRET="1")
    for case, error in zip(PAGED_CASES, found, strict=True):
        assert error <= TOLERANCE[case[-1]], case


@pytest.mark.timeout(600)
def test_row_intervals_in_the_interpreter(base_seed: int, seed: int) -> None:
    """As ``masks.row_intervals`` makes them, number for number; and wrong values fail an assertion that names them."""
    assert run("triton_intervals_interpreted.py", "40", str(base_seed), TRITON_INTERPRET="1") == [40]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, str], dict[str, Any]]:
    names = ("card", "dtype", "head_dim", "rows", "keys", "band", "train")
    cases = [dict(zip(names, (CARDS[call[0]], *call[1:]), strict=False)) | {"gluon": False} for call in CALLS]
    found = run("triton_compiled.py", json.dumps(cases))
    assert len(found) == len(KERNELS)
    return dict(zip(KERNELS, found, strict=True))


# What sm 9.0 takes by its rule: head_dim, mask, training, more; and the kernels of such a call.
BACKWARD = ["statistics", "gluon_dq", "gluon_dkdv"]
GLUON = [
    (256, "band", True, {}, ["gluon_forward", *BACKWARD, "gluon_dkdv"]),
    (256, "intervals", True, {}, ["gluon_forward", *BACKWARD, "gluon_dkdv", "query_hull", "row_intervals"]),
    (128, "band", True, {}, ["gluon_forward", *BACKWARD]),
    (128, "intervals", True, {}, ["gluon_forward", *BACKWARD, "query_hull", "row_intervals"]),
    (128, "band", False, {}, ["gluon_forward"]),
    (128, "intervals", False, {}, ["forward", "row_intervals"]),
]
REST = [
    (256, "band", False, {}, ["gluon_forward"]),
    (256, "intervals", False, {}, ["gluon_forward", "row_intervals"]),
    (64, "intervals", True, {}, ["gluon_forward", *BACKWARD, "query_hull", "row_intervals"]),
    (128, "intervals", True, {"softcap": None}, ["gluon_forward", *BACKWARD, "query_hull", "row_intervals"]),
    (128, "band", False, {"approx": True}, ["gluon_forward"]),
    (256, "intervals", False, {"dtype": "float16"}, ["gluon_forward", "row_intervals"]),
    (256, "band", False, {"softcap": None}, ["gluon_forward"]),
    (128, "holes", False, {}, ["gluon_forward", "row_intervals"]),
    (64, "holes", False, {"rows": 600, "keys": 600}, ["forward", "row_intervals"]),
    (64, "holes", False, {}, ["gluon_forward", "row_intervals"]),
    (64, "band", False, {}, ["gluon_forward"]),
    (64, "intervals", False, {}, ["forward", "row_intervals"]),
    (256, "band", False, {"softcap": 2000.0}, ["forward"]),
    (256, "band", False, {"card": "sm 8.9, 99 KB"}, ["forward"]),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("calls", [GLUON, pytest.param(REST, marks=pytest.mark.every_kernel)], ids=["usual", "rest"])
def test_what_hopper_takes_compiles_without_loss(calls: list[Any]) -> None:
    cases = [
        {
            "head_dim": head_dim,
            "band": mask == "band",
            "holes": mask == "holes",
            "train": train,
            "dtype": "bfloat16",
            "rows": 3000,
            "keys": 3000,
        }
        | more
        | {"card": CARDS[more.get("card", "sm 9.0, 227 KB")]}
        for head_dim, mask, train, more, _ in calls
    ]
    found = run("triton_compiled.py", json.dumps(cases))
    for number, call in enumerate(calls):
        kernels = [made["spec"]["op"].removesuffix("_kernel") for made in found if made["case"] == number]
        assert kernels == call[-1], call
    for made in found:
        call = calls[made["case"]]
        # ptxas's C7510 to C7518: products that it had to put one after the other.
        assert made["serialised"] == [], call
        # What a thread keeps in memory of blocks that need a mask, and of a tile as a whole; an accumulator of a
        # product would be 512 bytes.
        assert made["spilled"] <= 384, call
        assert made["shared"] <= 227 * 1024, call
        if made["spec"]["op"] == "forward_kernel" and call[0] == 128:
            # Two programs fit on a multiprocessor, of which each takes a kilobyte more.
            assert 2 * (made["shared"] + 1024) <= 228 * 1024, call
        assert made["elf"] == b"\x7fELF".hex()
        if made["spec"]["op"] == "gluon_forward_kernel":
            # Four warps a warpgroup, and four of which one loads.
            assert made["threads"] == 128 * (made["spec"]["warpgroups"] + 1), call


LISTING = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR40], RZ, !UPT, gsb0 ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24 ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, R188, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0040*/                   {} ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/                   {} ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R184, R1, R2 ;
"""


@pytest.mark.parametrize(
    ("one", "other", "many"),
    [
        ("FADD R1, R184, R188", "STG.E.64 [R184.64], R2", 0),
        ("FADD R192, R1, R2", "ISETP.GE.AND P0, PT, R184, R1, PT", 0),
        ("FADD R191, R1, R2", "MUFU.EX2 R3, R4", 1),
        ("LDS.128 R180, [R1]", "@!P0 MOV R187, R4", 1),
        ("LDS.64 R183, [R1]", "@P3 IMAD.WIDE R190, R4, R5, R6", 2),
    ],
)
def test_operands_that_are_overwritten_are_found(one: str, other: str, many: int) -> None:
    assert len(overwritten_operands(LISTING.format(one, other))) == many


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{CALLS[kernel[0]][:3]}-{kernel[1]}")
def test_a_kernel_of_a_call_compiles_ahead_of_time(
    compiled: dict[tuple[int, str], dict[str, Any]], kernel: tuple[int, str]
) -> None:
    card, dtype, head_dim, rows, keys, *_ = CALLS[kernel[0]]
    made, limits, name = compiled[kernel], CARDS[card], kernel[1]
    spec = made["spec"]
    assert made["elf"] == b"\x7fELF".hex()
    assert made["threads"] == 32 * spec["warps"]
    assert spec["capability"] == 10 * limits.capability[0] + limits.capability[1]
    wanted = {"dk": (True, False), "dv": (False, True), "dkdv": (True, True)}.get(name)
    assert spec["op"] == ("dkdv_kernel" if wanted else f"{name}_kernel")
    assert wanted is None or (spec["want_dk"], spec["want_dv"]) == wanted
    # Long calls on Hopper take their tiles through the tensor memory accelerator, and no others do.
    assert (made["boxes"] > 0) == (min(rows, keys) > 1000 and name not in ("query_hull", "row_intervals"))
    if name in ("combine", "query_hull", "row_intervals"):
        return
    direction: Any = name
    options = choose(limits, getattr(torch, dtype), head_dim, direction)
    assert (spec["block_n"], spec["warps"], spec["stages"]) == options[1:]
    assert made["shared"] <= shared_bytes(options, getattr(torch, dtype), head_dim, direction)
    assert shared_bytes(options, getattr(torch, dtype), head_dim, direction) <= limits.shared_bytes


IN_A_CHILD = """
import sys, torch
from softcap_runtime import BuildFailed
from softcap_runtime.cuda.cubin import Cubin
from softcap_runtime.cuda.parameters import Pointer, spec_of
from softcap_runtime.cuda.kernel import GpuKernel
single = Pointer(torch.float32)
constants = {"D": 64, "DPAD": 64, "SPLITS": 8, "ALIGN": 8}
how = {"capability": (9, 0), "dtype": torch.float32, "aligned": True, "warps": 4, "stages": 1}
spec = spec_of("combine_kernel", [single] * 4, [1, 2, 3, 4, 5, 6], constants, **how)
made = Cubin.unpack(GpuKernel(spec, 0).build())
assert made.code[:4] == b"\\x7fELF" and made.threads == 128
try:
    GpuKernel(spec._replace(constants=()), 0).build()
    raise AssertionError("it was built")
except BuildFailed as error:
    assert "combine_kernel" in str(error) and "\\n" not in str(error), error
assert not {"triton", "torch._inductor", "torch._dynamo"} & set(sys.modules)
"""


@pytest.mark.timeout(300)
def test_the_process_that_wants_a_kernel_imports_no_triton(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(PLACE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "no")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [], "nothing is left, nor kept where another process would trust it"


def test_a_builder_does_not_import_torch(tmp_path: Path) -> None:
    """It would take longer than most kernels."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    wanted = spec_of(
        "row_intervals_kernel", [Pointer(torch.int32)] * 5, [0] * 12, {"BLOCK": 128},
        capability=(9, 0), dtype=torch.int32, aligned=False, warps=4, stages=1,
    )  # fmt: skip
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, PLACE)))}
    data = build.built_by_module("a kernel", BUILDER, json.dumps(wanted), "kernel.cubin", environment)
    assert Cubin.unpack(data).code[:4] == b"\x7fELF"
