"""Stress a cache: processes that call attention, build, load, evict and clear, are killed, and find random damage.

    python tests/store/stress --seconds 600

Half of the work is real calls of ``Runtime.attention`` (engines flex and blocked, some with gradients), each
compared with the specification in float64; half is made-up bytes under made-up keys, compared with what they must
be. Real kernels are compiled once before the run (``--kernels FOLDER`` keeps them); a build in the run publishes
those bytes again, and one in a hundred compiles: see calls.py. The folder holds two thirds of what is
asked for.

Every call must end within 30 s (180 s while a kernel is compiled, as its callers wait for it); after the run and
one repair nothing bad may be left. Prints how many of each event it made; exit code 1 on any wrong answer, hang,
error, or bad entry.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from calls import ONE_COMPILES_IN, kernels
from events import Event, Reader
from worker import SIZE_LIMIT, Worker

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.store import Store, inspection

LONGEST_CALL_S = 30.0
LONGEST_COMPILE_S = 180.0  # with all processes busy beside it


def work(folder: Path, log: Path, known: dict[Artifact, bytes], seed: int, until: float) -> None:
    """The life of one process."""
    torch.manual_seed(seed)
    Worker(folder, log, known, seed, until).run()


class Run:
    """The parent: starts, kills and watches workers, and damages the database under them."""

    def __init__(self, folder: Path, known: dict[Artifact, bytes], processes: int, seed: int, until: float) -> None:
        self.folder = folder
        self.log = folder.parent / "events"
        self.reader = Reader(self.log)
        self.known = known
        self.draw = random.Random(seed)
        self.until = until
        self.made: Counter[str] = Counter()
        self.last: dict[int, Event] = {}
        self.compiling: set[int] = set()
        self.compiled_at = 0.0
        self.longest_call = 0.0, ""
        self.hangs = 0
        self.workers: list[BaseProcess] = []
        for _ in range(processes):
            self.start()

    def start(self) -> None:
        """Start one worker; forked, so that none spends its life importing."""
        arguments = (self.folder, self.log, self.known, self.draw.randrange(2**31), self.until)
        worker = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        worker.start()
        self.workers.append(worker)

    def go(self) -> None:
        """Make trouble until the time is up, then wait for the workers."""
        quiet = self.until - min(5.0, (self.until - time.time()) * 0.1)  # the last calls heal what is left
        while time.time() < self.until:
            time.sleep(self.draw.uniform(0.02, 0.4))
            if time.time() < quiet:
                self.draw.choice([self.kill, self.kill, self.damage])()
            self.watch()
        deadline = time.time() + (LONGEST_COMPILE_S if self.compiling else LONGEST_CALL_S) + 10
        for worker in list(self.workers):
            worker.join(max(deadline - time.time(), 0))
            if worker.exitcode is None:
                self.hang(worker, "after the end")
        self.watch()

    def kill(self) -> None:
        """kill -9 one worker, whatever it is doing, and start another; a compiler is mostly spared."""
        worker = self.draw.choice(self.workers)
        if worker.pid in self.compiling and self.draw.random() < 0.98:
            return
        worker.kill()
        worker.join()
        self.workers.remove(worker)
        self.made["kill -9"] += 1
        if worker.pid in self.compiling:
            self.made["kill -9 while compiling"] += 1
            self.compiled(worker.pid)
        self.start()

    def damage(self) -> None:
        """Overwrite some bytes of the database, or cut it, while it is in use."""
        try:
            size = (self.folder / "cache.db").stat().st_size
            with open(self.folder / "cache.db", "r+b") as file:
                kind = self.draw.choice(["bytes", "bytes", "bytes", "page", "cut"])
                file.seek(self.draw.randrange(max(size, 1)))
                if kind == "cut":
                    file.truncate(file.tell())
                else:
                    file.write(self.draw.randbytes(4096 if kind == "page" else self.draw.randint(1, 16)))
        except FileNotFoundError:
            return
        self.made[f"damage: {kind}"] += 1

    def watch(self) -> None:
        """Take in what workers did, restart those that are gone, and end those whose call takes too long."""
        for event in self.reader.new():
            self.take(event)
        longest = LONGEST_COMPILE_S if self.compiling else LONGEST_CALL_S
        for worker in list(self.workers):
            last = self.last.get(worker.pid or 0)
            if last is not None and last.what.startswith("begin") and time.time() - last.when > longest:
                self.hang(worker, last.what)
            elif worker.exitcode is not None and time.time() < self.until - 1:
                self.made["worker ended early"] += 1
                self.workers.remove(worker)
                self.start()

    def take(self, event: Event) -> None:
        """Count one event of a worker."""
        if event.what.startswith("made kernel: compiling"):
            self.compiling.add(event.pid)
        elif event.what == "made kernel: compiled" or event.what.startswith("ERROR"):
            self.compiled(event.pid)
        if event.what.startswith("made "):
            self.made[event.what.removeprefix("made ")] += 1
            return
        begun = self.last.get(event.pid)
        self.last[event.pid] = event
        if not event.what.startswith("begin"):
            self.made[event.what] += 1
            if begun is not None and not self.compiling and begun.when > self.compiled_at:
                self.longest_call = max(self.longest_call, (event.when - begun.when, event.what))

    def compiled(self, pid: int) -> None:
        """A process compiles no more, if it did."""
        if pid in self.compiling:
            self.compiling.remove(pid)
            self.compiled_at = time.time()

    def hang(self, worker: BaseProcess, event: str) -> None:
        """Count a hang and end it."""
        self.hangs += 1
        print(f"HANG: process {worker.pid} in {event!r}", file=sys.stderr)
        worker.kill()
        worker.join()
        self.workers.remove(worker)
        self.compiled(worker.pid or 0)


def report(run: Run, left: list[str]) -> bool:
    """Print what was made and found; whether all went well."""
    from rich.console import Console
    from rich.table import Table

    wrong = {what: count for what, count in run.made.items() if what.startswith("WRONG")}
    errors = {what: count for what, count in run.made.items() if what.startswith("ERROR")}
    table = Table("event", "count", title="stress")
    for what, count in sorted(run.made.items()):
        if what not in wrong and what not in errors:
            table.add_row(what, f"{count:,}")
    table.add_section()
    for name, value in inspection.status(Store(run.folder, SIZE_LIMIT)).counters.items():
        table.add_row(f"counter: {name}", f"{value:,}")
    seconds, what = run.longest_call
    table.add_row("longest call (nothing compiling), s", f"{seconds:.2f} ({what})")
    table.add_section()
    bad = {"wrong answers": sum(wrong.values()), "errors": sum(errors.values()), "hangs": run.hangs}
    bad |= {"bad after the run": len(left), "workers that ended early": run.made["worker ended early"]}
    for name, count in bad.items():
        table.add_row(name, f"[{'red' if count else 'green'}]{count:,}")
    Console().print(table)
    print(f"Kernels were compiled before the run; one build in {ONE_COMPILES_IN} compiled, others published again.")
    for line in [*wrong, *errors, *left][:20]:
        print(line, file=sys.stderr)
    return not any(bad.values())


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Stress a cache of softcap_runtime.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--kernels", type=Path, help="a cache folder for the kernels compiled before the run")
    options = parser.parse_args()
    logging.disable()  # damage is the point: its warnings are counted, not read
    torch.set_num_threads(1)
    print(f"--seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="softcap_stress_", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch).resolve() / "cache"
        known = kernels(options.kernels or folder.with_name("kernels"))
        # What killed compilers leave behind goes with it.
        tempfile.tempdir = os.environ["TMPDIR"] = scratch
        run = Run(folder, known, options.processes, options.seed, time.time() + options.seconds)
        run.go()
        store = Store(folder, SIZE_LIMIT)
        run.made["bad entries found by the last repair"] = len(inspection.verify(store, repair=True))
        left = [f"bad after the run: {problem.where}: {problem.what}" for problem in inspection.verify(store)]
        store.close()
        return 0 if report(run, left) else 1


if __name__ == "__main__":
    sys.exit(main())
