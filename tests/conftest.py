"""Shared fixtures: a printed seed, and one kernel cache for the whole session."""

from __future__ import annotations

import logging
import os
import random
import subprocess
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HEAD_DIM

from softcap_runtime import BuildFailed, EngineUnavailable, Runtime, RuntimeSettings, torch_features
from softcap_runtime.kernels import products
from softcap_runtime.kernels.package import Package

# What an older torch lacks, by the words in which it is refused.
LACKING = [
    words
    for there, *refusals in (
        (torch_features.FLEX_PACKAGES, "'flex' cannot serve", "cannot build flex_forward"),
        (torch_features.PACKAGES, "'blocked' cannot serve", "cannot build block_"),
        (torch_features.MASK_LENGTHS, "a BlockMask of your own needs"),
    )
    if not there
    for words in refusals
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that asks for what an older torch lacks is skipped, with the package's own refusal."""
    try:
        return (yield)
    except (EngineUnavailable, BuildFailed) as error:
        if any(words in str(error) for words in LACKING):
            pytest.skip(str(error))
        raise


pytest_runtest_setup = pytest_runtest_call  # what a test asks for, its fixtures may ask for first


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On a busy machine, threads that wait for each other make small tensor operations 10 times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_tiles() -> Iterator[None]:
    """The same products, and so the same error bounds, on every CPU.

    ``bf16_tiles`` in kernels/test_gradients.py has the products of a CPU with bf16 tiles (AMX), which round more often.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "cpu_has_amx", lambda: False)
        yield


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The command line sets it for its process; here the next test runs in the same one."""
    yield
    logging.getLogger("softcap_runtime").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def base_seed() -> int:
    return int(os.environ.get("SOFTCAP_TEST_SEED", random.SystemRandom().randrange(2**31)))


@pytest.fixture
def seed(base_seed: int, request: pytest.FixtureRequest) -> int:
    """Seed torch and random for one test; printed, so a failure can be repeated with SOFTCAP_TEST_SEED."""
    print(f"\nSOFTCAP_TEST_SEED={base_seed}  # {request.node.nodeid}")
    torch.manual_seed(base_seed)
    random.seed(base_seed)
    return base_seed


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("SOFTCAP_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kernel cache for the session and all its workers, so each kernel is compiled once.

    SOFTCAP_TEST_CACHE keeps it.
    """
    if kept := os.environ.get("SOFTCAP_TEST_CACHE"):
        return Path(kept)
    if "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent / "kernels"
    return tmp_path_factory.mktemp("kernels")


# Kernels that many tests share; anything else is compiled by the test that needs it.
SHARED_KERNELS = [
    Package("flex_forward", "cpu", dtype, HEAD_DIM, capped, mask)
    for dtype, capped, mask in (
        ("float32", True, "band"),
        ("float32", True, "intervals"),
        ("float32", False, "band"),
        ("float32", False, "intervals"),
        ("bfloat16", True, "band"),
        ("bfloat16", True, "intervals"),
        ("float16", True, "band"),
    )
] + [
    Package(op, "cpu", dtype, 0, capped, "")
    for op, dtype, capped in (
        ("block_forward", "float32", True),
        ("block_softmax", "float32", True),
        ("block_softmax", "float32", False),
        ("block_backward", "float32", True),
        ("block_backward", "float32", False),
        ("block_forward_half", "float32", True),
        ("block_forward_half", "bfloat16", True),
        ("block_backward_half", "float32", True),
        ("block_backward_half", "bfloat16", True),
    )
]


@pytest.fixture(scope="session")
def builds(cache_dir: Path) -> Iterator[list[Future[Any]]]:
    """The shared kernels, being built in the background."""
    supply = Runtime(RuntimeSettings(cache_dir=cache_dir)).supply
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        there = {"flex_forward": torch_features.FLEX_PACKAGES}
        specs = [spec for spec in SHARED_KERNELS if there.get(spec.op, torch_features.PACKAGES)]
        yield [pool.submit(supply.get, spec) for spec in specs]
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def warm_cache(cache_dir: Path, builds: list[Future[Any]]) -> Path:
    """The session's cache. A test that needs a kernel which is not there yet waits for it, or builds it itself."""
    return cache_dir


@pytest.fixture(scope="session")
def all_kernels(builds: list[Future[Any]]) -> None:
    """Waits for the shared kernels: for tests that count builds, or put something else in the compiler's place."""
    wait(builds)


@pytest.fixture(scope="session")
def runtimes(warm_cache: Path) -> dict[str, Runtime]:
    """One runtime per engine over the session's cache."""
    names = ("auto", "flex", "blocked", "dense", "eager")
    return {name: Runtime(RuntimeSettings(cache_dir=warm_cache, engine=name)) for name in names}


@pytest.fixture(scope="session")
def runtime(runtimes: dict[str, Runtime]) -> Runtime:
    """The runtime that picks its engines itself."""
    return runtimes["auto"]


@pytest.fixture
def own_runtime(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """``Runtime.get()`` gives the session's runtime."""
    monkeypatch.setattr(Runtime, "_own", runtime)
    return runtime


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small filesystems; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mount{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(place)],
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip("mounting a tmpfs is not allowed here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graph of another test, nor one for the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
