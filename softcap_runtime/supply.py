"""The kernels of one runtime: its settings, the choice of an engine, and the artifacts that the engine needs."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.artifacts.lifecycle import Artifacts
from softcap_runtime.config import RuntimeSettings, unknown_variables
from softcap_runtime.cuda import options as gpu_options
from softcap_runtime.cuda import tuned
from softcap_runtime.cuda.options import BlockOptions, Direction
from softcap_runtime.engines.choose import choose, engine_named
from softcap_runtime.engines.engine import Engine, Kernels, Problem
from softcap_runtime.engines.spec import dtype_name
from softcap_runtime.masks.memo import MaskMemo
from softcap_runtime.store import Store

log = logging.getLogger(__name__)

# Limit on what flex reads of band masks and keeps: 7 windows over a million tokens, or any number of usual ones.
MASK_BYTES = 64 * 2**20


class Chosen(NamedTuple):
    """An engine for a problem, the reason, its artifacts; ``lasting``: False while a kernel is still being built."""

    engine: Engine
    reason: str
    artifacts: Sequence[Artifact]
    lasting: bool


class Supply(Artifacts):
    """The artifacts of one runtime, under the policy of its settings, and the masks and options its engines share."""

    def __init__(self, settings: RuntimeSettings) -> None:
        warn_of_unknown_variables()
        store = Store(settings.cache_dir, settings.cache_size_limit, auth_key=_auth_key(settings))
        super().__init__(store, settings.jit, settings.build == "background")
        self.settings = settings
        self._settings_given = _settings_given(settings)
        self.masks = MaskMemo(MASK_BYTES)
        self._options: dict[tuple[int, torch.dtype, int, Direction], BlockOptions] = {}

    def engine(self, problem: Problem, asked: str) -> Chosen:
        """The engine that serves ``problem`` now; its artifacts are loaded.

        Raises EngineUnavailable, KernelNotPrewarmed (``jit="forbid"``) or BuildFailed.
        """
        choice = choose(problem, asked)
        needed = choice.engine.artifacts(problem, self.kernels(problem))
        waiting = self.require(needed, lambda: self.command(problem))
        if waiting is not None:
            return Chosen(engine_named("eager", problem.device), waiting, (), False)
        return Chosen(choice.engine, choice.reason, needed, True)

    def kernels(self, problem: Problem, paged: bool = False) -> Kernels:
        """What an engine binds ``problem`` to; ``paged``: for keys in pages."""

        def get(artifact: Artifact) -> Any:
            return self.get(artifact, lambda: self.command(problem, paged))

        return Kernels(self.masks, get, self.options)

    def options(self, device: int, dtype: torch.dtype, head_dim: int, direction: Direction) -> BlockOptions:
        """The options of a GPU kernel: those measured on this machine, else chosen by the device's limits."""
        key = (device, dtype, head_dim, direction)
        found = self._options.get(key)
        if found is None:
            limits = gpu_options.device_limits(device)
            found = tuned.read(self.store, limits, *key) or gpu_options.choose(limits, *key[1:])
            self._options[key] = found
        return found

    def forget_options(self) -> None:
        """Look options up again, after a measurement: later bindings use its results."""
        self._options.clear()

    def command(self, problem: Problem, paged: bool = False) -> str:
        """The shell command that prewarms the kernels of ``problem``."""
        # Under another folder, secret or limit the command would build what this process cannot use.
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
        if problem.softcap_approx and problem.device.type != "cpu":  # a GPU kernel of its own
            words.insert(0, "SOFTCAP_APPROX=1")
        if self.settings.engine != "auto":
            options["engine"] = self.settings.engine
        words += [f"--{name} {value}" for name, value in options.items() if value is not None]
        flags = {"--train": problem.train, "--paged": paged}
        return " ".join([*words, *(flag for flag, given in flags.items() if given)])


@functools.cache  # once per process
def warn_of_unknown_variables() -> None:
    """Log a warning for each environment variable ``SOFTCAP_...`` that is not a setting."""
    for line in unknown_variables():
        log.warning("%s", line)


def _settings_given(settings: RuntimeSettings) -> list[str]:
    """The cache's settings as shell assignments, with absolute paths: the command may run in another folder."""
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
        raise ValueError(f"cache_key_file: {path} cannot be read ({error.strerror}); fix or unset it") from None
    if not key:
        raise ValueError(f"cache_key_file: {path} is empty, expected a secret of some 32 random bytes")
    if mode & 0o077:
        told = "cache_key_file: %s is open to others (mode %04o); run: chmod 600 %s"
        log.warning(told, path, mode, shlex.quote(str(path)))
    return key
