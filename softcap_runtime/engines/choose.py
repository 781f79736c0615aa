"""Which engine serves a problem, and why: the one asked for, or by a fixed rule."""

from __future__ import annotations

from typing import NamedTuple

import torch

from softcap_runtime.engines import blocked_cpu as blocked
from softcap_runtime.engines import blocked_cuda, dense, flex_cuda
from softcap_runtime.engines import flex_cpu as flex
from softcap_runtime.engines.engine import Engine, Problem
from softcap_runtime.errors import EngineUnavailable


class Choice(NamedTuple):
    """The engine and the reason, as ``inspect`` shows it."""

    engine: Engine
    reason: str


def engine_named(name: str, device: torch.device) -> Engine:
    """The engine of that name on a device: ``flex`` and ``blocked`` differ by device type."""
    own = (flex.ENGINE, blocked.ENGINE) if device.type == "cpu" else (flex_cuda.ENGINE, blocked_cuda.ENGINE)
    engines = {engine.name: engine for engine in (*own, dense.DENSE, dense.EAGER)}
    if name not in engines:
        raise ValueError(f"engine: {name!r}, expected auto or one of {', '.join(engines)}")
    return engines[name]


def choose(problem: Problem, asked: str) -> Choice:
    """The engine for ``problem``; ``asked`` is an engine's name or ``"auto"``.

    Raises EngineUnavailable if the engine asked for cannot serve the problem.
    """
    if 0 in (problem.batch, problem.mask.q_len, problem.mask.kv_len):
        return Choice(dense.EAGER, "nothing to compute")
    if asked == "auto":
        return _automatic(problem)
    engine = engine_named(asked, problem.device)
    refusal = engine.refuses(problem)
    if refusal is not None:
        raise EngineUnavailable(f"engine: {asked!r} cannot serve this call: {refusal}; use engine='auto'")
    return Choice(engine, "asked for")


def _automatic(problem: Problem) -> Choice:
    if problem.dtype == torch.float64:
        return Choice(dense.EAGER, "float64 has no compiled kernel")
    blocked_engine, flex_engine = (engine_named(name, problem.device) for name in ("blocked", "flex"))
    refusals: list[str] = []
    for engine, reason in ((blocked_engine, "our own kernels are the fastest"), (flex_engine, "")):
        refusal = engine.refuses(problem)
        if refusal is None:
            return Choice(engine, reason or "; ".join(refusals))
        refusals.append(refusal)
    return Choice(dense.DENSE, "; ".join(refusals))
