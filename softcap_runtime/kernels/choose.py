"""Which engine serves a problem, and why: what was asked for, or a written rule with its measurements."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from softcap_runtime.errors import EngineUnavailable
from softcap_runtime.kernels import blocked, blocked_cuda, dense, flex, flex_cuda
from softcap_runtime.kernels.engine import Engine, Problem
from softcap_runtime.kernels.products import compute_dtype

# Logits of one batch row (heads x rows x keys) below which one call of the flex kernel beats the blocked engine's loop.
# Measured at Hq8 Hkv4 D256, blocked over flex in float32 and bf16: 0.7 and 0.6 at 32 x 32, 1.0 and 1.2 at 64 x 64,
# 1.5 and 1.7 at 128 x 128, 1.4 and 2.0 at 256 x 256.
SMALL_ROW = 2**15
# Half-precision keys are widened once; fewer query rows than this do not pay for it. Over 4,096 keys, blocked over flex
# in bf16: 0.8 for 4 rows, 1.0 for 8, 1.2 to 1.4 for 16. One row, groups of two: 0.5 (AVX2), float32 0.7 (AVX-512).
FEW_ROWS = 16


class Choice(NamedTuple):
    """The engine and the reason, as ``inspect`` shows it."""

    engine: Engine
    reason: str


def engine_named(name: str, device: torch.device) -> Engine:
    """The engine of that name on a device: ``flex`` and ``blocked`` have a form of their own on each device type."""
    own = (flex.ENGINE, blocked.ENGINE) if device.type == "cpu" else (flex_cuda.ENGINE, blocked_cuda.ENGINE)
    engines = {engine.name: engine for engine in (*own, dense.DENSE, dense.EAGER)}
    if name not in engines:
        raise ValueError(f"engine: {name!r}, expected auto or one of {', '.join(engines)}")
    return engines[name]


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
    engines = (engine_named(name, problem.device) for name in ("blocked", "flex"))
    serving = (engine for engine in engines if engine.refuses(problem) is None)
    if problem.device.type != "cpu":
        # Our own kernels win at all lengths, and flex is not asked, which would import it.
        return list(itertools.islice(serving, 1)) or [dense.DENSE]
    # Without bf16 tiles the lengths decide between the two.
    both = list(serving) or [dense.DENSE]
    return [flex.ENGINE] if flex.ENGINE in both and _in_tiles(problem) else both


def _automatic(problem: Problem) -> Choice:
    if problem.dtype == torch.float64:
        return Choice(dense.EAGER, "float64 has no compiled kernel")
    options = candidates(problem)
    if len(options) == 1:
        return Choice(options[0], _only_reason(options[0], problem))
    q_len, kv_len = problem.mask.q_len, problem.mask.kv_len
    if problem.num_heads * q_len * kv_len < SMALL_ROW:
        return Choice(flex.ENGINE, "small rows: one kernel beats a loop over blocks")
    if q_len == 1:
        return Choice(flex.ENGINE, "decoding: one kernel, which reads a group's keys once")
    if q_len < FEW_ROWS and problem.dtype != torch.float32:
        return Choice(flex.ENGINE, "a few rows do not pay for widening the keys")
    return Choice(blocked.ENGINE, "large matrix products: 1.4 to 2.5 times flex")


def _in_tiles(problem: Problem) -> bool:
    return compute_dtype(problem.dtype) == torch.bfloat16


def _only_reason(engine: Engine, problem: Problem) -> str:
    if engine is blocked_cuda.ENGINE:
        return "the fastest on CUDA: 2.0 to 3.1 times flex"  # one H100, docs/gpu_report.md
    if engine is flex.ENGINE and _in_tiles(problem):
        # Two cores of a Xeon with AMX, D256: 32 against 43 ms at 2,048 tokens.
        return "bf16 tiles: 1.3 times the blocked engine at 2,048 tokens, and half its error"
    others = (engine_named(name, problem.device) for name in ("blocked", "flex"))
    refusals = (other.refuses(problem) for other in others if other is not engine)
    return "; ".join(refusal for refusal in refusals if refusal)
