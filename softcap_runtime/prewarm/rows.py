"""How prewarming shows itself: a row for each kernel, and a bar while they are made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

from softcap_runtime.engines.spec import KernelSpec, kernel_name

Outcome = Literal["built", "loaded", "ready", "failed"]
# Called around the work on one kernel: what shows it to people.
Shown = Callable[[KernelSpec], AbstractContextManager[None]]


class PrewarmResult(NamedTuple):
    """How one kernel was prepared.

    ``outcome``: ``built`` here, ``loaded`` from the cache (another process may have built it meanwhile),
    ``ready`` in this process before, or ``failed``. ``seconds``: wall time, waiting for another builder
    included. ``bytes``: of its package; 0 where torch compiles it in each process anew. ``error``: one line when
    it failed.
    """

    spec: KernelSpec
    outcome: Outcome
    seconds: float
    bytes: int
    error: str | None


def row_of(spec: KernelSpec, shown: Shown, work: Callable[[], tuple[Outcome, int]]) -> PrewarmResult:
    """How ``work`` on a kernel went: its outcome and bytes."""
    started = time.perf_counter()
    with shown(spec):
        try:
            outcome, size = work()
        except Exception as error:  # whatever went wrong with one kernel is that kernel's row
            line = (str(error).splitlines() or [type(error).__name__])[0]
            return PrewarmResult(spec, "failed", time.perf_counter() - started, 0, line)
    return PrewarmResult(spec, outcome, time.perf_counter() - started, size, None)


@contextlib.contextmanager
def shown_work(total: int, progress: bool) -> Iterator[Shown]:
    """A bar over ``total`` kernels, with a line and the elapsed time for each one in work."""
    if not progress:
        yield lambda spec: contextlib.nullcontext()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        overall = bar.add_task("kernels", total=total)

        @contextlib.contextmanager
        def line(spec: KernelSpec) -> Iterator[None]:
            task = bar.add_task(f"  {kernel_name(spec)}", total=None)
            try:
                yield
                bar.advance(overall)  # not for one that was interrupted
            finally:
                bar.remove_task(task)

        yield line
