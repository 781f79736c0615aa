"""What the tests of a GPU need of the session: none of its CPU kernels."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def warm_cache(cache_dir: Path) -> Path:
    """The session's cache, in which nothing is built beforehand."""
    return cache_dir
