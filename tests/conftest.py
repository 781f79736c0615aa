"""Shared fixtures: a printed seed, and one kernel cache for the whole session."""

from __future__ import annotations

import logging
import os
import random
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softcap_runtime import BuildFailed, EngineUnavailable, Runtime, RuntimeSettings
from softcap_runtime.compat import torch_features
from softcap_runtime.cpu.library import library

# What an older torch lacks, by the words in which it is refused.
LACKING = [
    words
    for there, *refusals in (
        (torch_features.FLEX_PACKAGES, "'flex' cannot serve", "cannot build flex_forward"),
        (torch_features.MASK_LENGTHS, "a BlockMask of your own needs"),
    )
    if not there
    for words in refusals
]


# The user's own settings are not under test.
for name, field in RuntimeSettings.model_fields.items():
    os.environ.pop(str(field.validation_alias or f"softcap_{name}").upper(), None)


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


@pytest.fixture(scope="session")
def warm_cache(cache_dir: Path) -> Path:
    """The session's cache with the CPU's library in it. A test that needs another kernel builds it, once for all."""
    Runtime(RuntimeSettings(cache_dir=cache_dir)).supply.get(library())
    return cache_dir


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
