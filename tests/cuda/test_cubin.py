"""GPU kernels as data and their launches, with a driver of the test's own in the place of CUDA's."""

from __future__ import annotations

import ctypes
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from softcap_runtime import RuntimeSettings
from softcap_runtime.artifacts.sources import digest
from softcap_runtime.cuda import driver as cuda_driver
from softcap_runtime.cuda.cubin import Box, Cubin, CubinSpec
from softcap_runtime.cuda.kernel import SOURCES, GpuKernel
from softcap_runtime.cuda.parameters import Parameter, Pointer, Tile, spec_of
from softcap_runtime.cuda.triton import build as triton_build
from softcap_runtime.engines.engine import Problem
from softcap_runtime.errors import BuildFailed, KernelNotPrewarmed
from softcap_runtime.masks.intervals import band
from softcap_runtime.store import inspection
from softcap_runtime.supply import Supply

CUBIN = Cubin("a_kernel", 50_000, 128, (Box((1, 1, 64, 64), 3),), 2, b"code\n\0of a kernel")
TILE = Tile(torch.bfloat16, (2, 4, 300, 64), (76800, 64, 256, 1), (1, 1, 64, 64))
PROBLEM = Problem(
    torch.device("cuda", 0), torch.bfloat16, 1, 4, 2, 128, 0.25, 50.0, band(300, 300, causal=True, window=None), False
)


def spec(**changes: Any) -> CubinSpec:
    parameters: list[Parameter] = [TILE, Pointer(torch.float32), None]
    found = spec_of(
        "forward_kernel",
        parameters,
        [7, 2**40, 0.5],
        {"BAND": True, "FORM": 1, "D": 128, "PRECISION": "tf32"},
        capability=(9, 0),
        dtype=torch.bfloat16,
        aligned=True,
        warps=4,
        stages=2,
    )
    return found._replace(**changes)


def test_what_is_kept_is_what_was_made() -> None:
    assert Cubin.unpack(CUBIN.pack()) == CUBIN


@pytest.mark.parametrize("data", [b"", b"{}\ncode", b"[]\ncode", b"code", CUBIN.pack().replace(b"128", b'"many"')])
def test_other_bytes_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^cubin: .*clear, then prewarm$"):
        Cubin.unpack(data)


def test_a_key_in_words() -> None:
    fields = spec().fields()
    assert fields["tensors"] == "tensordesc<bf16[1,1,64,64]> *fp32 -"
    assert fields["numbers"] == "ilf"
    assert fields["op"] == "forward_kernel"
    assert (fields["band"], fields["d"], fields["capability"]) == (True, 128, 90)
    summary = GpuKernel(spec(), 0).describe()
    assert (summary.dtype, summary.head_dim, summary.capped, summary.mask) == ("bfloat16", 128, True, "band")


PTX = """
.visible .entry a_kernel(
\t.param .align 64 .b8 a_kernel_param_0[128],
\t.param .u32 a_kernel_param_1,
\t.param .u64 .ptr .global .align 1 a_kernel_param_2,
\t.param .f32 a_kernel_param_3
)
.reqntid 256
{ ld.param.b32 %r1, [a_kernel_param_1]; }
"""


def test_parameters_are_read_from_the_assembly() -> None:
    assert triton_build.parameter_bytes(PTX) == [128, 4, 8, 4]


def test_parameters_that_lie_otherwise_are_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        class metadata:
            tensordesc_meta = ()
            global_scratch_size = profile_scratch_size = 0
            num_ctas, num_warps, shared, name = 1, 4, 0, "a_kernel"

        asm: dict[str, Any] = {"ptx": PTX, "cubin": b"code"}  # noqa: RUF012

    monkeypatch.setattr(triton_build, "_compiler", lambda: "triton 99")
    monkeypatch.setattr(triton_build, "_compile", lambda spec: Compiled)
    monkeypatch.setattr(triton_build, "_check_machine_code", lambda spec, code: None)
    with pytest.raises(BuildFailed, match="triton 99 passes parameters in a way"):
        triton_build.build(spec())

    def fails(spec: CubinSpec) -> None:
        raise TypeError("no such argument\nand more")

    monkeypatch.setattr(triton_build, "_compile", fails)
    with pytest.raises(BuildFailed, match=r"TypeError: no such argument; a newer Triton may help$"):
        triton_build.build(spec())


class Driver:
    """Takes what CUDA's driver takes; ``status`` is what the next launch answers."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.entered = 0
        self.statuses: list[int] = []
        self.map_statuses: list[int] = []
        self.attributes: list[int] = []

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *shape, stream, table, _ = rest
        read = [(c, a) for c, a in zip("QiiiiqqqqQiqfQQ", table, strict=True)]
        types = {"Q": ctypes.c_uint64, "i": ctypes.c_int32, "q": ctypes.c_int64, "f": ctypes.c_float}
        self.launches.append((shape, stream, [types[code].from_address(at).value for code, at in read]))
        return self.statuses.pop() if self.statuses else 0

    def cuTensorMapEncodeTiled(self, target: Any, *rest: Any) -> int:
        assert target.value % cuda_driver.TENSOR_MAP_ALIGNMENT == 0
        kind, rank, address, sizes, steps, blocks, _, *modes = rest
        if self.map_statuses:
            return self.map_statuses.pop()
        self.maps.append((kind, rank, address.value, list(sizes), list(steps)[:-1], list(blocks), modes))
        ctypes.c_uint64.from_address(target.value).value = 4711
        return 0

    def cuFuncSetAttribute(self, function: Any, which: int, value: int) -> int:
        self.attributes.append(value)
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.entered += 1
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_OF_THE_TEST"
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: fake)
    monkeypatch.setattr(cuda_driver, "current_stream", lambda device: 99 + device)
    return fake


def test_a_launch_passes_what_the_kernel_reads(driver: Driver) -> None:
    loaded = cuda_driver.LoadedCubin(CUBIN, 1)
    assert driver.attributes == [50_000]
    run = loaded.bind((5, 6, 7), [TILE, Pointer(torch.float32), None], [7, 2**40, 0.5])
    q, out = torch.zeros(300 * 512, dtype=torch.bfloat16), torch.zeros(4)
    run(q, out, None)
    run(q, torch.zeros(8), None)
    shape, stream, values = driver.launches[0]
    assert shape == [5, 6, 7, 128, 1, 1, 50_000]
    assert stream == 100
    assert values == [4711, 2, 4, 300, 64, 76800, 64, 256, 1, out.data_ptr(), 7, 2**40, 0.5, 0, 0]
    assert driver.launches[1][2][9] != out.data_ptr()
    # Once for both launches: q lay where it lay. Innermost sizes come first, strides in bytes.
    (kind, rank, address, sizes, steps, blocks, modes) = driver.maps[0]
    assert len(driver.maps) == 1
    assert (kind, rank, address) == (9, 4, q.data_ptr())
    assert (sizes, steps, blocks) == ([64, 300, 4, 2], [512, 128, 153600], [64, 64, 1, 1])
    assert modes == [0, 3, 2, 0]
    run(q[64:], out, None)
    assert driver.maps[1][2] == q.data_ptr() + 128


def test_numbers_as_far_as_float32_goes(driver: Driver) -> None:
    """A cap near 0 leads beyond: the kernel gets infinity, as from any product in float32."""
    run = cuda_driver.LoadedCubin(CUBIN, 0).bind((1, 1, 1), [TILE, Pointer(torch.float32)], [-7, -(2**40), 1e39])
    run(torch.zeros(8), torch.zeros(8))
    assert driver.launches[0][2][10:13] == [-7, -(2**40), math.inf]


def test_a_thread_without_a_context_gets_one(driver: Driver) -> None:
    run = cuda_driver.LoadedCubin(CUBIN, 0).bind((1, 1, 1), [TILE, Pointer(torch.float32)], [7, 2**40, 0.5])
    driver.statuses = [0, cuda_driver.CUDA_ERROR_INVALID_CONTEXT]
    run(torch.zeros(8), torch.zeros(8))
    assert (driver.entered, len(driver.launches), len(driver.maps)) == (1, 2, 1)
    driver.map_statuses = [cuda_driver.CUDA_ERROR_INVALID_CONTEXT]
    run(torch.zeros(16), torch.zeros(8))
    assert (driver.entered, len(driver.launches), len(driver.maps)) == (2, 3, 2)
    driver.statuses = [719]
    with pytest.raises(RuntimeError, match=r"launching kernel a_kernel failed with CUDA_ERROR_OF_THE_TEST \(719\)"):
        run(torch.zeros(8), torch.zeros(8))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> list[CubinSpec]:
    specs: list[CubinSpec] = []

    def build(spec: CubinSpec) -> bytes:
        specs.append(spec)
        return CUBIN.pack()

    monkeypatch.setattr(GpuKernel, "build", lambda kernel: build(kernel.spec))
    monkeypatch.setattr(GpuKernel, "provenance", lambda kernel: {"compiler": "triton of the test"})
    return specs


def supply(folder: Path, **settings: Any) -> Supply:
    return Supply(RuntimeSettings(cache_dir=folder, **settings))


def test_it_is_built_once_and_kept(tmp_path: Path, built: list[CubinSpec]) -> None:
    first = supply(tmp_path)
    functions = [first.get(GpuKernel(spec(), 0)) for _ in range(2)]
    assert functions[0] is functions[1]
    assert first.get(GpuKernel(spec(), 1)) is not functions[0]
    assert built == [spec()]
    second = supply(tmp_path, jit="forbid")
    second.kernels(PROBLEM).get(GpuKernel(spec(), 0))
    assert built == [spec()]
    assert second.supplied[GpuKernel(spec(), 0)].source == "disk"
    (entry,) = inspection.entries(second.store)
    assert entry.fields == {**spec().fields(), "sources": digest(*SOURCES)}
    assert entry.provenance["compiler"] == "triton of the test"


def test_forbidden_it_names_the_command(tmp_path: Path, built: list[CubinSpec]) -> None:
    forbidding = supply(tmp_path, jit="forbid")
    with pytest.raises(KernelNotPrewarmed, match=r"--dtype bfloat16 --device cuda$") as caught:
        forbidding.kernels(PROBLEM).get(GpuKernel(spec(), 0))
    assert str(caught.value).startswith("kernel forward_kernel bfloat16 head_dim 128 band is not")
    approximate = supply(tmp_path, jit="forbid", softcap_approx=True)
    with pytest.raises(KernelNotPrewarmed, match=r"run: SOFTCAP_APPROX=1 SOFTCAP_CACHE_DIR=\S+ softcap-runtime"):
        approximate.kernels(PROBLEM._replace(softcap_approx=True)).get(GpuKernel(spec(), 0))
    assert not built
    forbidding.get(GpuKernel(spec(), 0))  # as prewarming does
    assert built == [spec()]
    with pytest.raises(KernelNotPrewarmed):
        forbidding.kernels(PROBLEM).get(GpuKernel(spec(stages=3), 0))


def test_a_warning_is_logged(tmp_path: Path, built: list[CubinSpec], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "softcap_runtime"):
        supply(tmp_path, jit="warn").kernels(PROBLEM).get(GpuKernel(spec(), 0))
    assert ["serving process: kernel forward_kernel" in record.message for record in caplog.records] == [True]
    assert built == [spec()]
