"""Shared fixtures: a printed seed, and one kernel cache for the whole session."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def base_seed() -> int:
    return int(os.environ.get("SOFTCAP_TEST_SEED", random.SystemRandom().randrange(2**31)))


@pytest.fixture()
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
    """One kernel cache for the session, so each kernel is compiled once; SOFTCAP_TEST_CACHE keeps it."""
    kept = os.environ.get("SOFTCAP_TEST_CACHE")
    return Path(kept) if kept else tmp_path_factory.mktemp("kernels")
