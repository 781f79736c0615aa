"""Real attention calls for the stress run, each compared with the specification in float64.

Compiling a kernel takes 5 to 20 s, so the packages are compiled once before the run; from then on a build
publishes their bytes again, and one build in ``ONE_COMPILES_IN`` runs the compiler, at most one at a time.
Everything else is as in service: kernels are looked up, locked, published, verified, loaded and evicted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from events import Note
from torch import Tensor

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime, RuntimeSettings, reference
from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.cpu.library import CpuLibrary
from softcap_runtime.engines.package import Package
from softcap_runtime.prewarm.prewarm import artifacts_of
from softcap_runtime.supply import Supply

HEAD_DIM = 64
ENGINES = ("flex", "blocked")
ONE_COMPILES_IN = 100
LAST_COMPILE_S = 20.0  # before the end: the run should not wait for it
TOLERANCE = 1e-5  # relative, in float32; a kernel or a mask that is not the right one is off by 1e-2 or more

KINDS = (Package, CpuLibrary)
COMPILE = {kind: kind.build for kind in KINDS}


def artifacts() -> list[Artifact]:
    """The kernels that the calls need."""
    config = AttentionConfig(softcap=50.0, scale=HEAD_DIM**-0.5)
    request = PrewarmRequest(
        config=config, num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, dtype="float32", train=False
    )
    trained = request.model_copy(update={"train": True})
    flex, blocked = (Supply(RuntimeSettings(engine=name)) for name in ENGINES)
    return [*artifacts_of(flex, request), *artifacts_of(blocked, trained)]


def kernels(folder: Path) -> dict[Artifact, bytes]:
    """The bytes of all kernels, from the cache in ``folder`` or compiled into it."""
    supply = Supply(RuntimeSettings(cache_dir=folder))

    def bytes_of(one: Artifact) -> bytes:
        key = one.key()
        assert key is not None
        return supply.store.load_or_build(key, lambda: COMPILE[type(one)](one)).data

    wanted = artifacts()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(bytes_of, wanted), strict=True))


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Whether no other process is in here."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(file)


class Calls:
    """The runtimes of one worker, over the folder under stress."""

    def __init__(
        self, settings: dict[str, object], known: dict[Artifact, bytes], draw: random.Random, note: Note, until: float
    ) -> None:
        self.settings, self.known, self.draw, self.note, self.until = settings, known, draw, note, until
        self.compiling = Path(str(settings["cache_dir"])).parent / "compiling"
        self.runtimes: dict[str, Runtime] = {}
        for kind in KINDS:
            kind.build = lambda one: self.build(one)  # type: ignore[method-assign]

    def build(self, artifact: Artifact) -> bytes:
        """The bytes of a kernel: those from before the run, now and then compiled for real."""
        late = time.time() > self.until - LAST_COMPILE_S
        if not late and self.draw.randrange(ONE_COMPILES_IN) == 0:
            with only_one(self.compiling) as alone:
                if alone:
                    self.note(f"made kernel: compiling {artifact.describe().op}")
                    data = COMPILE[type(artifact)](artifact)
                    self.note("made kernel: compiled")
                    return data
        time.sleep(self.draw.uniform(0, 0.05))
        self.note("made kernel: published again")
        return self.known[artifact]

    def attention(self) -> str:
        """One call, half of the time by a runtime that has nothing loaded."""
        engine = self.draw.choice(ENGINES)
        if engine not in self.runtimes or self.draw.random() < 0.5:
            self.runtimes[engine] = Runtime(RuntimeSettings(engine=engine, **self.settings))
        runtime = self.runtimes[engine]
        before = set(runtime.supply.supplied)
        train = engine == "blocked" and self.draw.random() < 0.3
        error = self.error_of(runtime, train)
        what = f"attention {engine}{' with gradients' if train else ''}"
        for spec, supplied in runtime.supply.supplied.items():
            if spec not in before:
                self.note(f"made kernel: loaded, {supplied.source}")
        return f"{what}: right" if error <= TOLERANCE else f"WRONG {what}: relative error {error:.1e}"

    def error_of(self, runtime: Runtime, train: bool) -> float:
        """The largest relative error of a small random call's output and, for training, gradients."""
        draw = self.draw
        batch, kv_len = draw.randint(1, 2), draw.randint(1, 150)
        q_len = draw.choice([kv_len, draw.randint(1, kv_len)])
        config = AttentionConfig(
            softcap=draw.choice([1.0, 30.0, 50.0]),
            scale=HEAD_DIM**-0.5,
            window=draw.choice([None, draw.randint(1, 100)]),
        )
        inputs = [torch.randn(batch, heads, n, HEAD_DIM) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len))]
        masks = self.masks(batch, kv_len)
        mask = visible(q_len, kv_len, config.window, masks)
        exact = [x.double().requires_grad_(train) for x in inputs]
        want = reference.attention(*exact, mask, scale=config.scale, softcap=config.softcap)[0]
        leaves = [x.requires_grad_(train) for x in inputs]
        q, k, v = leaves
        got = runtime.attention(q, k, v, config, **masks)
        pairs = [(got, want)]
        if train:
            grad = torch.randn_like(got)
            grads = torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, exact, grad.double())
            pairs += zip(*grads, strict=True)
        return max(relative_error(got, want) for got, want in pairs)

    def masks(self, batch: int, kv_len: int) -> dict[str, Tensor]:
        """No mask, padding, packed documents, or both."""
        kind = self.draw.choice(["none", "none", "padding", "documents", "both"])
        found = {}
        if kind in ("padding", "both"):
            hidden = torch.tensor([[self.draw.randint(0, kv_len - 1)] for _ in range(batch)])
            found["attention_mask"] = torch.arange(kv_len) >= hidden
        if kind in ("documents", "both"):
            found["document_ids"] = torch.randint(0, 2, (batch, kv_len)).cumsum(1)
        return found


def visible(q_len: int, kv_len: int, window: int | None, masks: dict[str, Tensor]) -> Tensor:
    """Who sees whom, element by element: bool ``[B or 1, Sq, Skv]``."""
    rows, keys = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    seen = (keys <= rows)[None]
    if window is not None:
        seen = seen & (rows - keys < window)
    if "attention_mask" in masks:
        seen = seen & masks["attention_mask"][:, None]
    if "document_ids" in masks:
        ids = masks["document_ids"]
        seen = seen & (ids[:, kv_len - q_len :, None] == ids[:, None])
    return seen


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius, over at least 1 an element: gradients of rows that see one key cancel to 0, but for rounding.

    What is not a number is infinitely wrong.
    """
    got, want = got.detach().double(), want.detach()
    error = float((got - want).norm() / max(float(want.norm()), want.numel() ** 0.5))
    return error if error == error else float("inf")
