"""Many processes on one cache: real kernels built once, and calls in workers."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, NEEDS_FLEX, Sizes, expected, make_qkv, package_of, relative_error
from support.workers import results_of
from torch.utils.data import DataLoader, Dataset

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.engines.package import Package
from softcap_runtime.store import inspection

CONFIG = AttentionConfig(softcap=50.0, scale=0.125)
SPECS = [Package("flex_forward", "cpu", "float32", HEAD_DIM, True), library()]
PROCESSES, BUILD_S = 8, 0.5


def need_both(folder: str, packages: dict[Artifact, bytes], record: str, barrier: Any, results: Any) -> None:
    def build(spec: Artifact) -> bytes:
        with open(record, "a") as file:
            file.write(f"{SPECS.index(spec)}\n")
        time.sleep(BUILD_S)
        return packages[spec]

    Package.build = CpuLibrary.build = build  # type: ignore[method-assign]
    flex, blocked = (Runtime(RuntimeSettings(cache_dir=folder, engine=name)) for name in ("flex", "blocked"))
    inputs = make_qkv(Sizes(2, 4, 2, 40, 40))
    ids = torch.arange(40)[None] // 7
    barrier.wait(60)
    errors = [
        relative_error(flex.attention(*inputs, CONFIG), expected(*inputs, CONFIG)),
        relative_error(flex.attention(*inputs, CONFIG, document_ids=ids), expected(*inputs, CONFIG, document_ids=ids)),
        relative_error(blocked.attention(*inputs, CONFIG), expected(*inputs, CONFIG)),
    ]
    for runtime in (flex, blocked):
        runtime.supply.store.close()
    results.put(max(errors))


@NEEDS_FLEX
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_start_at_once_build_each_kernel_once(runtime: Runtime, tmp_path: Path, seed: int) -> None:
    packages = {spec: package_of(runtime, spec) for spec in SPECS}
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    record = tmp_path / "record"
    arguments = (str(tmp_path / "cache"), packages, str(record), barrier, results)
    workers = [context.Process(target=need_both, args=arguments) for _ in range(PROCESSES)]
    errors = results_of(workers, results)
    assert max(errors) <= 2e-6
    assert sorted(record.read_text().split()) == ["0", "1"]
    counters = inspection.status(Runtime(RuntimeSettings(cache_dir=tmp_path / "cache")).supply.store).counters
    assert counters["builds"] == 2
    assert counters["longest_lock_wait_ms"] <= 1000 * (BUILD_S + 2)


class Attended(Dataset):
    """A data set that runs attention: what a DataLoader's workers do with a runtime of their parent or their own."""

    def __init__(self, cache_dir: str) -> None:
        self.cache_dir = cache_dir
        self.runtime: Runtime | None = None

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> float:
        if self.runtime is None:
            torch.set_num_threads(1)
            self.runtime = Runtime(RuntimeSettings(cache_dir=self.cache_dir, jit="forbid"))
        inputs = make_qkv(Sizes(1, 4, 2, 10 + number, 10 + number))
        return relative_error(self.runtime.attention(*inputs, CONFIG), expected(*inputs, CONFIG))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader(runtime: Runtime, method: str, workers: int, seed: int) -> None:
    attended = Attended(str(runtime.settings.cache_dir))
    if method == "fork":
        attended[0]  # the workers inherit a runtime with its kernel loaded
    loader = DataLoader(
        attended, num_workers=workers, multiprocessing_context=method, persistent_workers=True, timeout=60
    )
    errors = [float(batch) for _ in range(2) for batch in loader]
    assert len(errors) == 12
    assert max(errors) <= 2e-6
