"""Which engine serves a problem, and why: what was asked for, or a written rule with its measurements."""

from __future__ import annotations

from typing import NamedTuple

import torch

from softcap_runtime.errors import EngineUnavailable
from softcap_runtime.kernels import blocked, cuda, dense, flex
from softcap_runtime.kernels.engine import Engine, Problem

# Below this many logits (batch x heads x rows x keys) one call of the flex kernel beats the blocked engine's dozen.
SMALL_CALL = 2**20
# With fewer query rows than this the blocked engine's matrix products are too thin to pay for themselves.
FEW_ROWS = 16


class Choice(NamedTuple):
    """The engine and the reason, as ``inspect`` shows it."""

    engine: Engine
    reason: str


def engine_named(name: str, device: torch.device) -> Engine:
    """The engine of that name on a device: ``blocked`` is our own kernels, of which each device type has its own."""
    own = blocked.ENGINE if device.type == "cpu" else cuda.ENGINE
    return {engine.name: engine for engine in (flex.ENGINE, own, dense.DENSE, dense.EAGER)}[name]


def choose(problem: Problem, asked: str) -> Choice:
    """The engine for ``problem``; ``asked`` is an engine's name or ``"auto"``.

    Raises EngineUnavailable when the engine asked for cannot serve the problem.
    """
    if asked == "auto":
        return _automatic(problem)
    engine = engine_named(asked, problem.device)
    refusal = engine.refuses(problem)
    if refusal is not None:
        raise EngineUnavailable(f"engine: {asked!r} cannot serve this call: {refusal}; use engine='auto'")
    return Choice(engine, "asked for")


def candidates(problem: Problem) -> list[Engine]:
    """The engines that ``auto`` may pick for any length of this kind of problem: what prewarm prepares."""
    if problem.dtype == torch.float64:
        return [dense.EAGER]
    names = ("flex", "blocked") if packages_work() else ()
    options = [engine_named(name, problem.device) for name in names]
    return [engine for engine in options if engine.refuses(problem) is None] or [dense.DENSE]


def packages_work() -> bool:
    """Whether this torch builds and loads ahead-of-time packages (2.6 and newer); imports nothing."""
    version = torch.__version__.split("+")[0].split(".")
    return (int(version[0]), int(version[1])) >= (2, 6)


def _automatic(problem: Problem) -> Choice:
    if problem.dtype == torch.float64:
        return Choice(dense.EAGER, "float64 has no compiled kernel")
    options = candidates(problem)
    if len(options) == 1:
        return Choice(options[0], _only_reason(options[0], problem))
    logits = problem.batch * problem.num_heads * problem.mask.q_len * problem.mask.kv_len
    if logits < SMALL_CALL:
        return Choice(flex.ENGINE, "small call: one kernel beats a loop over blocks")
    if problem.mask.q_len < FEW_ROWS:
        return Choice(flex.ENGINE, "decoding: a few rows fill no matrix product")
    return Choice(blocked.ENGINE, "large matrix products: 1.8 to 4 times flex at 2,048 tokens")


def _only_reason(engine: Engine, problem: Problem) -> str:
    if engine is dense.DENSE:
        return f"torch {torch.__version__} on {problem.device.type} has no other compiled engine for this"
    return "gradients" if problem.train else "the fastest on this device"
