"""One process of the stress run: actions at random, each noted before and after."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import events
from calls import Calls

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.store import Key, Store, inspection

NAMES = 40
SIZES = (1_000, 400_000)
SIZE_LIMIT = 10_000_000  # about two thirds of what names and kernels need: entries are evicted all the time
FINGERPRINT = {"cpu": "any", "made by": "tests/store/stress"}


def key(name: int) -> Key:
    """The key of one of the made-up things that are asked for."""
    return Key({"name": name}, FINGERPRINT)


def payload(name: int) -> bytes:
    """What must come back for it."""
    draw = random.Random(name)
    return draw.randbytes(draw.randint(*SIZES))


class Worker:
    """A store and runtimes over one folder, and what may be done with them."""

    def __init__(self, folder: Path, log: Path, known: dict[Artifact, bytes], seed: int, until: float) -> None:
        self.store = Store(folder, SIZE_LIMIT)
        self.draw = random.Random(seed)
        self.note = events.writer(log)
        self.until = until
        settings = {"cache_dir": folder, "cache_size_limit": SIZE_LIMIT}
        self.calls = Calls(settings, known, self.draw, self.note, until)

    def run(self) -> None:
        """Act until the time is up."""
        names = list(ACTIONS)
        weights = [weight for weight, _ in ACTIONS.values()]
        while time.time() < self.until:
            name = self.draw.choices(names, weights)[0]
            self.note(f"begin {name}")
            try:
                result = ACTIONS[name][1](self)
            except Exception as error:  # whatever it is, the run has failed: say what and go on
                result = f"ERROR {name}: {type(error).__name__}: {error}"
            self.note(result)
        self.store.close()
        self.note("end")

    def attention(self) -> str:
        """A real call of ``Runtime.attention``."""
        return self.calls.attention()

    def ask(self) -> str:
        """Ask for one made-up thing, building it if it is missing."""
        name = self.draw.randrange(NAMES)
        loaded = self.store.load_or_build(key(name), lambda: self.build(name))
        self.store.counters.use(key(name).digest)
        right = loaded.data == payload(name)
        return f"bytes: {loaded.source}" if right else f"WRONG bytes for {name} from {loaded.source}"

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
        inspection.entries(self.store)
        inspection.status(self.store)
        return "inspected"

    def verify(self) -> str:
        """Check everything, repairing half of the time."""
        repair = self.draw.random() < 0.5
        return "verified: bad found" if inspection.verify(self.store, repair=repair) else "verified: all good"

    def reopen(self) -> str:
        """Close and come back, as a new process would."""
        self.store.close()
        self.store = Store(self.store.folder, SIZE_LIMIT)
        return "reopened"


ACTIONS: dict[str, tuple[float, Callable[[Worker], str]]] = {
    "attention": (70, Worker.attention),
    "ask": (40, Worker.ask),
    "look up": (25, Worker.look),
    "reopen": (5, Worker.reopen),
    "inspect": (2, Worker.inspect),
    "verify": (1, Worker.verify),
    "clear": (0.5, Worker.clear),
}
