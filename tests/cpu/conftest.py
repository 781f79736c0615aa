"""The builds of the CPU library, in the session's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cpu.kernels import Libraries
from softcap_runtime.artifacts.lifecycle import Artifacts
from softcap_runtime.store import Store


@pytest.fixture(scope="session")
def libraries(warm_cache: Path) -> Libraries:
    return Libraries(Artifacts(Store(warm_cache, 2**40)))


@pytest.fixture
def threads_back() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
