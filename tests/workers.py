"""Processes of a test. Without torch: a spawned one imports this anew."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any


def results_of(workers: Sequence[BaseProcess], results: Any, timeout: float = 120) -> list[Any]:
    """Start all, take what each puts on the queue ``results``, and see that each ends well."""
    for worker in workers:
        worker.start()
    found = [results.get(timeout=timeout) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return found
