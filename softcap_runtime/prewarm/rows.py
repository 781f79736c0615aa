"""What prewarming shows: a result for each kernel, and a progress bar meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

from softcap_runtime.engines.spec import KernelSpec, kernel_name

Outcome = Literal["built", "loaded", "ready", "failed"]
# A context manager around the work on one kernel, which shows it in the progress bar.
Shown = Callable[[KernelSpec], AbstractContextManager[None]]


class PrewarmResult(NamedTuple):
    """The result of preparing one kernel.

    ``outcome``: ``built`` here, ``loaded`` from the cache (another process may just have built it), ``ready`` in this
    process already, or ``failed``. ``seconds``: wall time, including the wait for another builder. ``bytes``: of its
    package; 0 if torch compiles it in each process. ``error``: one line if it failed.
    """

    spec: KernelSpec
    outcome: Outcome
    seconds: float
    bytes: int
    error: str | None


def row_of(spec: KernelSpec, shown: Shown, work: Callable[[], tuple[Outcome, int]]) -> PrewarmResult:
    """Run ``work`` on a kernel, which returns its outcome and bytes; an error becomes a failed result."""
    started = time.perf_counter()
    with shown(spec):
        try:
            outcome, size = work()
        except Exception as error:  # an error of one kernel is its result
            line = (str(error).splitlines() or [type(error).__name__])[0]
            return PrewarmResult(spec, "failed", time.perf_counter() - started, 0, line)
    return PrewarmResult(spec, outcome, time.perf_counter() - started, size, None)


@contextlib.contextmanager
def shown_work(total: int, progress: bool) -> Iterator[Shown]:
    """A progress bar over ``total`` kernels, with a line and the elapsed time for each one in progress."""
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
                bar.advance(overall)  # skipped if it was interrupted
            finally:
                bar.remove_task(task)

        yield line
