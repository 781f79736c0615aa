"""Stress a cache: processes that build, load, evict and clear, are killed, and find random damage.

    python scripts/stress.py --seconds 600

Every answer is compared with the bytes that it must be; every call must end within 30 s; after the run and one
repair nothing bad may be left. Prints how many of each event it made; exit code 1 on any wrong answer, hang,
error, or bad entry.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from softcap_runtime.store import Key, Store

NAMES = 40
SIZES = (1_000, 400_000)
SIZE_LIMIT = 4_000_000  # about half of what all names need: entries are evicted all the time
FINGERPRINT = {"cpu": "any", "made by": "scripts/stress.py"}
LONGEST_CALL_S = 30.0


def key(name: int) -> Key:
    """The key of one of the things that are asked for."""
    return Key({"name": name}, FINGERPRINT)


def payload(name: int) -> bytes:
    """What must come back for it."""
    draw = random.Random(name)
    return draw.randbytes(draw.randint(*SIZES))


class Worker:
    """One process: actions at random, each noted before and after in a file that survives kill -9."""

    def __init__(self, folder: Path, events: Path, seed: int) -> None:
        self.store = Store(folder, SIZE_LIMIT)
        self.draw = random.Random(seed)
        self.events = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, event: str) -> None:
        """Append one event."""
        line = json.dumps([time.time(), os.getpid(), event])
        os.write(self.events, f"{line}\n".encode())

    def run(self, until: float) -> None:
        """Act until a time."""
        actions, weights = zip(*ACTIONS.items(), strict=True)
        while time.time() < until:
            name = self.draw.choices(actions, [weight for weight, _ in weights])[0]
            self.note(f"begin {name}")
            try:
                result = ACTIONS[name][1](self)
            except Exception as error:  # whatever it is, the run has failed: say what and go on
                result = f"ERROR {name}: {type(error).__name__}: {error}"
            self.note(result)
        self.store.close()
        self.note("end")

    def call(self) -> str:
        """Ask for one thing, building it if it is missing."""
        name = self.draw.randrange(NAMES)
        loaded = self.store.load_or_build(key(name), lambda: self.build(name))
        self.store.count_use(key(name).digest)
        return (
            loaded.source if loaded.data == payload(name) else f"WRONG bytes for {name} from {loaded.source}"
        )

    def build(self, name: int) -> bytes:
        """A build of up to 50 ms."""
        time.sleep(self.draw.uniform(0, 0.05))
        return payload(name)

    def look(self) -> str:
        """Look one thing up, without building."""
        name = self.draw.randrange(NAMES)
        data = self.store.load(key(name))
        if data is None:
            return "looked up: missing"
        return "looked up: found" if data == payload(name) else f"WRONG bytes for {name} from load"

    def clear(self) -> str:
        """Remove everything."""
        self.store.clear()
        return "cleared"

    def inspect(self) -> str:
        """List everything."""
        self.store.entries()
        self.store.status()
        return "inspected"

    def verify(self) -> str:
        """Check everything, repairing half of the time."""
        repair = self.draw.random() < 0.5
        return "verified: bad found" if self.store.verify(repair=repair) else "verified: all good"

    def reopen(self) -> str:
        """Close and come back, as a new process would."""
        self.store.close()
        self.store = Store(self.store.folder, SIZE_LIMIT)
        return "reopened"


ACTIONS: dict[str, tuple[float, Callable[[Worker], str]]] = {
    "call": (80, Worker.call),
    "look up": (40, Worker.look),
    "reopen": (5, Worker.reopen),
    "inspect": (2, Worker.inspect),
    "verify": (1, Worker.verify),
    "clear": (0.5, Worker.clear),
}


def work(folder: Path, events: Path, seed: int, until: float) -> None:
    """The life of one process."""
    Worker(folder, events, seed).run(until)


class Run:
    """The parent: starts, kills and watches workers, and damages the database under them."""

    def __init__(self, folder: Path, processes: int, seed: int, until: float) -> None:
        self.folder = folder
        self.events = folder.parent / "events"
        self.draw = random.Random(seed)
        self.until = until
        self.made: Counter[str] = Counter()
        self.hangs = 0
        self.workers: list[BaseProcess] = []
        for _ in range(processes):
            self.start()

    def start(self) -> None:
        """Start one worker; forked, so that none spends its life importing."""
        arguments = (self.folder, self.events, self.draw.randrange(2**31), self.until)
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
        for worker in self.workers:
            worker.join(LONGEST_CALL_S + 10)
            if worker.exitcode is None:
                self.hang(worker, "after the end")

    def kill(self) -> None:
        """kill -9 one worker, whatever it is doing, and start another."""
        worker = self.draw.choice(self.workers)
        worker.kill()
        worker.join()
        self.workers.remove(worker)
        self.made["kill -9"] += 1
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
        """Restart workers that are gone, and end those whose call takes too long."""
        last = {pid: (when, event) for when, pid, event in read(self.events)[-20_000:]}
        for worker in list(self.workers):
            when, event = last.get(worker.pid or 0, (time.time(), ""))
            if event.startswith("begin") and time.time() - when > LONGEST_CALL_S:
                self.hang(worker, event)
            elif worker.exitcode is not None and time.time() < self.until - 1:
                self.made["worker ended early"] += 1
                self.workers.remove(worker)
                self.start()

    def hang(self, worker: BaseProcess, event: str) -> None:
        """Count a hang and end it."""
        self.hangs += 1
        print(f"HANG: process {worker.pid} in {event!r}", file=sys.stderr)
        worker.kill()
        worker.join()


def read(events: Path) -> list[tuple[float, int, str]]:
    """The events so far; a line cut off by a kill is left out."""
    if not events.exists():
        return []
    found = []
    for line in events.read_text(encoding="utf-8").splitlines():
        try:
            when, pid, event = json.loads(line)
        except ValueError:
            continue
        found.append((when, pid, event))
    return found


def report(run: Run, left: list[str]) -> bool:
    """Print what was made and found; whether all went well."""
    from rich.console import Console
    from rich.table import Table

    events = read(run.events)
    done = Counter(event for _, _, event in events if not event.startswith(("begin", "WRONG", "ERROR")))
    wrong = Counter(event for _, _, event in events if event.startswith("WRONG"))
    errors = Counter(event for _, _, event in events if event.startswith("ERROR"))
    counters = Store(run.folder, SIZE_LIMIT).status().counters
    table = Table("event", "count", title="stress")
    for name, count in sorted((done + run.made).items()):
        table.add_row(name, f"{count:,}")
    table.add_section()
    for name, counter in counters.items():
        table.add_row(
            f"counter: {name}", f"{counter.value:,.3g}" if name.endswith("_s") else f"{counter.value:,.0f}"
        )
    table.add_section()
    bad = {"wrong answers": wrong.total(), "errors": errors.total(), "hangs": run.hangs}
    bad |= {"bad after the run": len(left), "workers that ended early": run.made["worker ended early"]}
    for name, count in bad.items():
        table.add_row(name, f"[{'red' if count else 'green'}]{count:,}")
    Console().print(table)
    for line in [*wrong, *errors, *left][:20]:
        print(line, file=sys.stderr)
    return not any(bad.values())


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Stress a cache of softcap_runtime.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    options = parser.parse_args()
    logging.disable()  # damage is the point: its warnings are counted, not read
    print(f"--seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="softcap_stress_") as scratch:
        folder = Path(scratch).resolve() / "cache"
        run = Run(folder, options.processes, options.seed, time.time() + options.seconds)
        run.go()
        store = Store(folder, SIZE_LIMIT)
        run.made["bad entries found by the last repair"] = len(store.verify(repair=True))
        left = [f"bad after the run: {problem.where}: {problem.what}" for problem in store.verify()]
        store.close()
        return 0 if report(run, left) else 1


if __name__ == "__main__":
    sys.exit(main())
