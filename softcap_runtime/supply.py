"""Where kernels come from: this process, the store, the compiler, and what the settings allow of it."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from softcap_runtime import tuned
from softcap_runtime.config import RuntimeSettings
from softcap_runtime.errors import KernelNotPrewarmed
from softcap_runtime.kernels import package, triton_build
from softcap_runtime.kernels.children import Stopped
from softcap_runtime.kernels.choose import choose, engine_named
from softcap_runtime.kernels.cubin import CubinSpec
from softcap_runtime.kernels.engine import Engine, Problem
from softcap_runtime.kernels.gpu_options import BlockOptions, Direction, device_limits
from softcap_runtime.kernels.jit import compiles_in_process
from softcap_runtime.kernels.key import KernelSpec, dtype_name
from softcap_runtime.kernels.table import KernelTable
from softcap_runtime.prewarm_rows import kernel_name
from softcap_runtime.store import Key, Store, fingerprint
from softcap_runtime.store.processes import abandon

log = logging.getLogger(__name__)


class Supplied(NamedTuple):
    """How this process came by a kernel: ``source`` is built, disk, memory or compiled (in this process)."""

    source: str
    seconds: float
    bytes: int


class Chosen(NamedTuple):
    """An engine for a problem, why, and whether the choice lasts (or a kernel is still being built)."""

    engine: Engine
    reason: str
    lasting: bool


class Supply:
    """The kernels of one runtime. ``supplied`` says how each came here, ``failed`` which background builds did."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self.settings = settings
        self._settings_given = _settings_given(settings)
        self.store = Store(settings.cache_dir, settings.cache_size_limit, auth_key=_auth_key(settings))
        weakref.finalize(self, abandon, self.store)  # it has counts that it has not written yet
        self.table = KernelTable(self._fetch, self._fetch_cubin, self._tuned)
        self.supplied: dict[KernelSpec | CubinSpec, Supplied] = {}
        self.failed: dict[KernelSpec, str] = {}
        self._building: set[KernelSpec] = set()
        self._prewarming = 0
        self._guard = threading.Lock()

    def engine(self, problem: Problem, asked: str) -> Chosen:
        """The engine that serves ``problem`` now, its kernels loaded.

        Raises EngineUnavailable, KernelNotPrewarmed (``jit="forbid"``) or BuildFailed.
        """
        choice = choose(problem, asked)
        missing = [spec for spec in choice.engine.specs(problem) if not self.table.ready(spec)]
        missing = [spec for spec in missing if not self._load(spec)]
        if not missing:
            return Chosen(choice.engine, choice.reason, True)
        if self.settings.jit == "forbid":
            raise KernelNotPrewarmed(self._why_missing(missing[0], problem))
        background = self.settings.build == "background"
        new = self._not_begun(missing) if background else missing
        if new and self.settings.jit == "warn":
            log.warning("building in a serving process: %s", self._why_missing(new[0], problem))
        if background:
            self._build_in_background(new)
            failed = not self.failed.keys().isdisjoint(missing)
            why = "its kernel could not be built" if failed else "until its kernel is built"
            return Chosen(engine_named("eager", problem.device), why, False)
        for spec in missing:
            self.table.runner(spec)
        return Chosen(choice.engine, choice.reason, True)

    def obtain(self, spec: KernelSpec) -> Supplied:
        """Have a kernel loaded, building it whatever ``jit`` says: prewarming is asking for it.

        Raises BuildFailed.
        """
        started = time.perf_counter()
        self.table.runner(spec)
        if compiles_in_process(spec):
            return self.supplied.setdefault(spec, Supplied("compiled", time.perf_counter() - started, 0))
        return self.supplied[spec]

    @contextlib.contextmanager
    def prewarming(self) -> Iterator[None]:
        """While it lasts the GPU kernels of any call are built, whatever ``jit`` says."""
        with self._guard:
            self._prewarming += 1
        try:
            yield
        finally:
            with self._guard:
                self._prewarming -= 1

    @property
    def pending(self) -> int:
        """Kernels that are being built behind calls which another engine serves meanwhile."""
        return len(self._building)

    def key(self, spec: KernelSpec) -> Key:
        """The store's key of a kernel in this environment."""
        return Key(spec.fields(), fingerprint(spec.device))

    def command(self, problem: Problem) -> str:
        """The shell command that prewarms the kernels of ``problem``."""
        # A command with another cache, secret or limit would build what this process cannot use or must drop.
        words = [*self._settings_given, "softcap-runtime prewarm"]
        options: dict[str, object] = {
            "num-heads": problem.num_heads,
            "num-kv-heads": problem.num_kv_heads,
            "head-dim": problem.head_dim,
            "scale": problem.scale,
            "softcap": problem.softcap,
            "dtype": dtype_name(problem.dtype),
            "device": problem.device.type,
        }
        if problem.device.type != "cpu":  # GPU kernels are found by making calls, of this length among them
            options["seq-len"] = problem.mask.kv_len
            if self.settings.softcap_approx:
                words.insert(0, "SOFTCAP_APPROX=1")
        if self.settings.engine != "auto":
            options["engine"] = self.settings.engine
        words += [f"--{name} {value}" for name, value in options.items() if value is not None]
        return " ".join(words + (["--train"] if problem.train else []))

    def _why_missing(self, spec: KernelSpec, problem: Problem) -> str:
        """Why a kernel of ``problem`` is not here, in one line that says what to do."""
        if compiles_in_process(spec):
            return f"kernel {kernel_name(spec)} is compiled in each process; call Runtime.prewarm in this one first"
        # A query of its own, as the store's fault may be one of writing; without a fault there is no cache yet.
        readable = self.store.database.use("read", lambda index: index.totals() is not None, False)
        if readable or self.store.fault is None or self.store.database.is_empty():
            return f"kernel {kernel_name(spec)} is not in the cache; run: {self.command(problem)}"
        return f"kernel {kernel_name(spec)} cannot be read; set the cache right and call again: {self.store.fault}"

    def after_fork(self) -> None:
        """In a forked child: no lock is held, no background build runs here."""
        self._guard, self._building = threading.Lock(), set()
        self.table.renew_locks()

    def _load(self, spec: KernelSpec) -> bool:
        """Load a kernel that is on disk; False when it is not."""
        if compiles_in_process(spec):
            return False
        started = time.perf_counter()
        data = self.store.load(self.key(spec))
        if data is None:
            return False
        # Before it is ready: another thread that finds it so asks how it came here.
        self.supplied.setdefault(spec, Supplied("disk", time.perf_counter() - started, len(data)))
        self.table.install(spec, data)
        return True

    def _fetch(self, spec: KernelSpec) -> bytes:
        key = self.key(spec)
        loaded = self.store.load_or_build(
            key, lambda: package.build(spec), lambda: {"compiler": package.compiler_version()}
        )
        self.supplied[spec] = Supplied(loaded.source, loaded.seconds, len(loaded.data))
        return loaded.data

    def _fetch_cubin(self, problem: Problem, spec: CubinSpec) -> bytes:
        jit = "allow" if self._prewarming else self.settings.jit
        key = Key(spec.fields(), fingerprint("cuda", problem.device.index))

        def build() -> bytes:
            if jit == "forbid":
                raise KernelNotPrewarmed(self._why_missing(spec.summary(), problem))
            if jit == "warn":
                log.warning("building in a serving process: %s", self._why_missing(spec.summary(), problem))
            return triton_build.build(spec)

        loaded = self.store.load_or_build(key, build, lambda: {"compiler": triton_build.compiler_version()})
        self.supplied[spec] = Supplied(loaded.source, loaded.seconds, len(loaded.data))
        return loaded.data

    def _tuned(
        self, device: int, dtype: torch.dtype, head_dim: int, direction: Direction
    ) -> BlockOptions | None:
        return tuned.read(self.store, device_limits(device), device, dtype, head_dim, direction)

    def _not_begun(self, missing: list[KernelSpec]) -> list[KernelSpec]:
        """Those whose background build the caller is to begin: no other call did."""
        with self._guard:
            new = [spec for spec in missing if spec not in self._building and spec not in self.failed]
            self._building.update(new)
        return new

    def _build_in_background(self, new: list[KernelSpec]) -> None:
        if new:
            threading.Thread(target=self._build_all, args=(new,), name="softcap-build", daemon=True).start()

    def _build_all(self, specs: list[KernelSpec]) -> None:
        for spec in specs:
            try:
                self.table.runner(spec)
            except Stopped:  # the process ends
                return
            except Exception as error:  # the thread's caller is gone: what went wrong is kept and logged
                self.failed[spec] = str(error)
                log.error(
                    "background build of kernel %s failed, eager serves it: %s", kernel_name(spec), error
                )
            finally:
                self._building.discard(spec)


def _settings_given(settings: RuntimeSettings) -> list[str]:
    """The cache's settings as a shell takes them, in any folder: this process may leave the one that it is in."""
    given = {
        name: getattr(settings, name)
        for name in ("cache_dir", "cache_key_file", "cache_size_limit")
        if name in settings.model_fields_set
    }
    return [
        f"SOFTCAP_{name.upper()}="
        + shlex.quote(os.path.abspath(value) if isinstance(value, Path) else str(value or ""))
        for name, value in given.items()
    ]


def _auth_key(settings: RuntimeSettings) -> bytes | None:
    path = settings.cache_key_file
    if path is None:
        return None
    try:
        key, mode = path.read_bytes().strip(), stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ValueError(
            f"cache_key_file: {path} cannot be read ({error.strerror}); fix or unset it"
        ) from None
    if not key:
        raise ValueError(f"cache_key_file: {path} is empty, expected a secret of some 32 random bytes")
    if mode & 0o077:
        log.warning("cache_key_file: %s is open to others (mode %04o); run: chmod 600 %s", path, mode, path)
    return key
