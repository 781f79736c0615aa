"""Prewarming: from requests to the kernels that serve them, which are built in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.artifacts.children import Children
from softcap_runtime.checks import device_of
from softcap_runtime.config import PrewarmRequest
from softcap_runtime.engines import blocked_cuda
from softcap_runtime.engines.choose import choose
from softcap_runtime.engines.engine import Call, Engine, Problem
from softcap_runtime.engines.spec import dtype_of
from softcap_runtime.masks.intervals import RowIntervals, band
from softcap_runtime.prewarm.rows import Outcome, PrewarmResult, Shown, row_of, shown_work
from softcap_runtime.prewarm.tune import measure, to_tune
from softcap_runtime.supply import Supply


def prewarm(
    supply: Supply,
    bind: Callable[[Tensor, Tensor, Call], object],
    requests: Iterable[PrewarmRequest],
    progress: bool,
    tune: bool,
) -> list[PrewarmResult]:
    """Load or build every kernel that calls like ``requests`` may need, whatever ``jit`` says.

    ``bind(q, k, call)`` makes the plan of a call.

    Child processes compile the kernels, as many at once as this process has cores; ``progress`` shows a bar on
    standard error. A kernel that fails is a row of the result and stops no other. The masks of a request's
    ``seq_lens`` are prepared too, for a batch of 1 in this process; no kernel runs. GPU kernels are built for tensors
    whose addresses are multiples of 16 bytes, as torch allocates them; ``tune`` measures their blocks, warps and stages
    first, once per machine.

    Under torchrun, call this on every rank before the first collective: one rank builds a kernel while those that need
    the same one wait for its file lock and then load it. A rank returns once all its kernels are published, so none
    enters a collective while another still waits for a build.

    Raises, before anything is built, TypeError for anything but PrewarmRequests, ValueError for a missing device, or
    ``tune`` without a request that GPU kernels serve, and EngineUnavailable if the engine of the settings cannot serve
    a request.
    """
    requests = _checked(requests)
    needed = {request: artifacts_of(supply, request) for request in requests}
    shapes = to_tune(one for one in needed if _has_options(supply, one)) if tune else {}
    if tune and not shapes:
        raise ValueError("tune: no request is served by kernels that have options to measure, those on CUDA have")
    total = len(_distinct(needed)) + len(shapes)
    builders = Children()
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=builders.adopt_thread)
    with shown_work(total, progress and total > 0) as shown:
        try:
            tuned = [measure(supply, *one, pool, shown) for one in shapes.items()]
            if tuned:  # calls may need other kernels now
                supply.forget_options()
                needed = {request: artifacts_of(supply, request) for request in requests}
            distinct = _distinct(needed)
            made = list(pool.map(lambda one: _obtain(supply, one, shown), distinct))
        except BaseException:  # including Ctrl-C: end the compilers, as nobody wants their kernels any more
            pool.shutdown(wait=False, cancel_futures=True)
            builders.stop()
            raise
    pool.shutdown()
    failed = {one for one, row in zip(distinct, made, strict=True) if row.outcome == "failed"}
    for request, each in needed.items():
        if not failed.intersection(each):
            _bind_lengths(bind, supply.settings.engine, request)
    return tuned + made


def _checked(requests: Iterable[PrewarmRequest]) -> list[PrewarmRequest]:
    # A single request is iterable too: pydantic's models yield their fields.
    if isinstance(requests, PrewarmRequest) or not isinstance(requests, Iterable):
        raise TypeError(f"requests: {type(requests).__name__}, expected several PrewarmRequests; put them into a list")
    listed = list(requests)
    for place, request in enumerate(listed):
        if not isinstance(request, PrewarmRequest):
            raise TypeError(
                f"requests[{place}]: {type(request).__name__}, expected a PrewarmRequest; make one with "
                "PrewarmRequest(config=..., num_heads=..., num_kv_heads=..., head_dim=...)"
            )
    return listed


def artifacts_of(supply: Supply, request: PrewarmRequest) -> list[Artifact]:
    """The kernels that calls like ``request`` may need, without duplicates; empty if nothing is compiled for them.

    Raises as ``prewarm`` does, and builds nothing.
    """
    found: dict[Artifact, None] = {}
    for engine, problem in _engines(supply, request):
        for alike in engine.alike(problem):
            found.update(dict.fromkeys(engine.artifacts(alike, supply.kernels(alike))))
        if request.paged and engine is blocked_cuda.ENGINE and not problem.mask.vectors:
            found.update(dict.fromkeys(blocked_cuda.paged_artifacts(problem, supply.kernels(problem))))
    return list(found)


def _engines(supply: Supply, request: PrewarmRequest) -> Iterator[tuple[Engine, Problem]]:
    asked = supply.settings.engine
    for problem in _problems(request, supply.settings.softcap_approx):
        yield choose(problem, asked).engine, problem


def _has_options(supply: Supply, request: PrewarmRequest) -> bool:
    return any(engine is blocked_cuda.ENGINE for engine, _ in _engines(supply, request))


def _distinct(needed: Mapping[PrewarmRequest, Sequence[Artifact]]) -> list[Artifact]:
    return list(dict.fromkeys(one for each in needed.values() for one in each))


def _problems(request: PrewarmRequest, softcap_approx: bool) -> list[Problem]:
    """A problem for each kind of mask, for inference and, if requested, training; lengths do not matter."""
    device = device_of(request.device)
    row = torch.zeros(1, 1, dtype=torch.int32, device=device)
    masks = [band(1, 1, causal=True, window=None), RowIntervals(1, 1, None, None, row, row + 1)]
    return [
        Problem(
            device,
            dtype_of(request.dtype),
            1,
            request.num_heads,
            request.num_kv_heads,
            request.head_dim,
            request.config.scale,
            request.config.softcap,
            mask,
            train,
            softcap_approx,
        )
        for train in ((False, True) if request.train else (False,))
        for mask in masks
    ]


def _obtain(supply: Supply, artifact: Artifact, shown: Shown) -> PrewarmResult:
    spec = artifact.describe()
    if supply.ready(artifact):
        return PrewarmResult(spec, "ready", 0.0, supply.supplied[artifact].bytes, None)
    outcomes: dict[str, Outcome] = {"built": "built", "compiled": "ready"}

    def work() -> tuple[Outcome, int]:
        supply.get(artifact)
        supplied = supply.supplied[artifact]
        return outcomes.get(supplied.source, "loaded"), supplied.bytes

    return row_of(spec, shown, work)


def _bind_lengths(bind: Callable[[Tensor, Tensor, Call], object], engine: str, request: PrewarmRequest) -> None:
    """Bind the plans of the request's lengths, so that their first call finds its mask made."""
    config = request.config
    for length in dict.fromkeys(request.seq_lens):
        # One element expanded to the shape: binding a plan reads only shapes, dtypes and devices.
        one = torch.empty(1, 1, 1, 1, dtype=dtype_of(request.dtype), device=device_of(request.device))
        q = one.expand(1, request.num_heads, length, request.head_dim)
        k = one.expand(1, request.num_kv_heads, length, request.head_dim)
        mask = band(length, length, causal=config.causal, window=config.window)
        for train in (False, True) if request.train else (False,):
            bind(q, k, Call(mask, config.scale, config.softcap, engine, train))
