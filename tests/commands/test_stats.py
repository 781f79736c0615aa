"""What ``Runtime.stats()`` counts."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from support.helpers import HEAD_DIM, NEEDS_FLEX

from softcap_runtime import AttentionConfig, BuildFailed, Runtime, RuntimeSettings
from softcap_runtime.artifacts.lifecycle import Supplied
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.cuda.cubin import CubinSpec
from softcap_runtime.cuda.kernel import GpuKernel
from softcap_runtime.engines.package import Package
from softcap_runtime.report.stats import EngineStats

CONFIG = AttentionConfig(softcap=50.0, scale=HEAD_DIM**-0.5)


def call(runtime: Runtime, length: int, config: AttentionConfig = CONFIG, **masks: torch.Tensor) -> None:
    q, k, v = (torch.randn(1, heads, length, HEAD_DIM) for heads in (4, 2, 2))
    runtime.attention(q, k, v, config, **masks)


@NEEDS_FLEX
def test_calls_are_hits_or_misses_and_kernels_are_shared(
    runtimes: dict[str, Runtime], warm_cache: Path, seed: int
) -> None:
    runtimes["flex"].supply.get(Package("flex_forward", "cpu", "float32", HEAD_DIM, True))
    runtime = Runtime(RuntimeSettings(cache_dir=warm_cache, engine="flex"))
    empty = runtime.stats()
    assert (empty.hits, empty.misses, empty.kernels, empty.engines, empty.bytes) == (0, 0, [], [], 0)
    lengths = random.sample(range(1, 200), 5)
    for length in lengths:
        for _ in range(3):
            call(runtime, length)
    stats = runtime.stats()
    assert (stats.misses, stats.hits) == (5, 10)
    assert (stats.builds, stats.loads, stats.cache_fault) == (0, 1, None)
    (kernel,) = stats.kernels
    assert (kernel.op, kernel.head_dim, kernel.mask) == ("flex_forward", HEAD_DIM, "")
    assert (kernel.source, kernel.plans) == ("disk", 5)
    (engine,) = stats.engines
    assert (engine.engine, engine.plans, engine.calls) == ("flex", 5, 10)
    assert stats.package_bytes == kernel.bytes > 0
    assert stats.bytes == stats.package_bytes + stats.mask_bytes > stats.package_bytes
    assert stats.load_seconds == kernel.seconds > 0

    for ids in (torch.zeros(1, 7, dtype=torch.int32), torch.arange(7, dtype=torch.int32)[None]):
        call(runtime, 7, document_ids=ids)
    more = runtime.stats()
    assert (more.misses - stats.misses, more.hits - stats.hits) == (1, 1), "its contents are no part of a plan"
    assert [row.plans for row in more.kernels] == [6], "one kernel serves every mask"


def test_each_engine_has_its_row(warm_cache: Path, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=warm_cache))
    for length in (1, 20, 1024):
        call(runtime, length)
    q = torch.randn(1, 1, 4, HEAD_DIM, dtype=torch.float64)
    runtime.attention(q, q, q, CONFIG)
    rows = {row.engine: row for row in runtime.stats().engines}
    assert {name: row.plans for name, row in rows.items()} == {"blocked": 3, "eager": 1}
    assert all(row.reason for row in rows.values())


def test_background_builds_are_pending_then_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()

    def build(artifact: CpuLibrary) -> bytes:
        started.set()
        go_on.wait(60)
        raise BuildFailed("cannot build attention: no luck")

    monkeypatch.setattr(CpuLibrary, "build", build)
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, build="background", engine="blocked"))
    call(runtime, 8)
    assert started.wait(60)
    assert (runtime.stats().background_pending, runtime.stats().background_failed) == (1, {})
    meanwhile = EngineStats(engine="eager", reason="until its kernel is built", plans=1, calls=0)
    assert runtime.stats().engines == [meanwhile]
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "softcap-build":
            thread.join(60)
    stats = runtime.stats()
    assert stats.background_pending == 0
    ((name, error),) = stats.background_failed.items()
    assert name == "attention"
    assert error == "cannot build attention: no luck"
    for length in (8, 9):
        call(runtime, length)
    after = EngineStats(engine="eager", reason="its kernel could not be built", plans=2, calls=1)
    assert runtime.stats().engines == [after]


def test_a_folder_that_cannot_be_used_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(CpuLibrary, "build", lambda artifact: b"library")
    monkeypatch.setattr(CpuLibrary, "load", lambda artifact, data: data)
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path / "file"))
    runtime.supply.get(library())
    stats = runtime.stats()
    assert stats.cache_dir == str(tmp_path / "file")
    assert "is a file" in (stats.cache_fault or "")
    assert (stats.builds, stats.kernels[0].source, stats.kernels[0].plans) == (1, "built", 0)
    assert stats.build_seconds == stats.kernels[0].seconds


@pytest.mark.parametrize(
    ("folder", "words"),
    [("file", "file is a file"), ("file/cache", "file is a file"), ("open", "chmod go-w"), ("new/cache", None)],
)
def test_a_folder_is_looked_at_before_it_is_needed(tmp_path: Path, folder: str, words: str | None) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path / folder, engine="eager"))
    call(runtime, 8)
    fault = runtime.stats().cache_fault
    assert fault is None if words is None else words in (fault or "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "open"]


def test_gpu_kernels_are_shown_in_the_words_of_all_others(tmp_path: Path) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path))
    constants = (("BAND", False), ("FORM", 1), ("D", 128))
    for stages, source in ((2, "built"), (3, "disk")):
        spec = CubinSpec("forward_kernel", 90, "bfloat16", ("*bf16",), "if", True, constants, 4, stages)
        runtime.supply.supplied[GpuKernel(spec, 0)] = Supplied(source, 1.5, 1000)
    stats = runtime.stats()
    assert [(one.op, one.device, one.dtype, one.head_dim, one.capped, one.mask) for one in stats.kernels] == [
        ("forward_kernel", "cuda", "bfloat16", 128, True, "intervals")
    ] * 2
    assert (stats.builds, stats.loads, stats.package_bytes) == (1, 1, 2000)
