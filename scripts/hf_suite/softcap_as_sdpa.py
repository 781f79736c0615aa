"""A pytest plugin for the tests of a checkout of transformers: "sdpa", and what is the default, mean softcap.

    python -m pytest -p softcap_as_sdpa tests/models/gemma2/test_modeling_gemma2.py

``scripts/hf_suite.sh`` runs it. Models whose attention sdpa does not do, as it has no cap, then take it too, so tests
that compare eager attention with sdpa compare it with softcap, for them as well. What asks for eager stays eager.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Here, not at import: the checkout's own conftest must have put its transformers on the path."""
    from softcap_runtime.integrations.transformers import register

    register(name="sdpa")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from transformers import PreTrainedModel

    waiting: list[Any] = [PreTrainedModel]
    while waiting:
        model = waiting.pop()
        model._supports_sdpa = True
        waiting.extend(model.__subclasses__())


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A file of tests that never comes to softcap says nothing of it."""
    from softcap_runtime import Runtime

    stats = Runtime.get().stats()
    print(f"\nsoftcap served {stats.hits + stats.misses} calls of attention")
    if not stats.hits + stats.misses and session.testscollected > 20:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
