"""Have kernels ready before they are needed: from requests to the kernels that serve them, built in parallel."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from softcap_runtime import prewarm_gpu
from softcap_runtime.checks import device_of
from softcap_runtime.config import PrewarmRequest
from softcap_runtime.kernels import blocked_cuda
from softcap_runtime.kernels.children import Children
from softcap_runtime.kernels.choose import candidates, choose
from softcap_runtime.kernels.engine import Call, Problem
from softcap_runtime.kernels.key import KernelSpec, dtype_of
from softcap_runtime.masks.intervals import RowIntervals, band
from softcap_runtime.prewarm_rows import Outcome, PrewarmResult, Shown, row_of, shown_work

if TYPE_CHECKING:
    from softcap_runtime.runtime import Runtime


def prewarm(
    runtime: Runtime, requests: Iterable[PrewarmRequest], progress: bool, tune: bool
) -> list[PrewarmResult]:
    """Load or build every kernel that calls like ``requests`` may need, whatever ``jit`` says.

    Each kernel is compiled by a child process (some 15 s of one core), as many at once as this process has
    cores. With ``progress`` a bar on standard error shows them. A failure is a row of the result and stops no
    other kernel. For the ``seq_lens`` of a request the masks are prepared as well, for a batch of 1 in this
    process; nothing is run but the kernels on CUDA, which are found by making calls, of a batch of 1 and those lengths
    among others. They are for tensors whose addresses are multiples of 16 bytes, which torch's own are. ``tune``
    measures their blocks, warps and stages first, once per machine.

    Under torchrun every rank calls this before its first collective. One rank builds a kernel while those that
    need the same one wait for its file lock, then load it. A rank returns when all its kernels are published: while
    one stands in a collective, no other waits for a builder.

    Raises TypeError for what is no PrewarmRequest, ValueError for heads that do not divide or a device that is
    not there or ``tune`` without a request that GPU kernels serve, EngineUnavailable when the engine of the settings
    cannot serve a request; all before anything is built.
    """
    requests = _checked(requests)
    specs = {request: kernels_of(request, runtime.settings.engine) for request in requests}
    on_gpu = dict.fromkeys(
        request.model_copy(update={"config": request.config.model_copy(update={"window": None})})
        for request in specs
        if runs_triton(request, runtime.settings.engine)
    )
    calls = [call for request in on_gpu for call in prewarm_gpu.calls_of(request)]
    distinct = list(dict.fromkeys(spec for each in specs.values() for spec in each))
    if tune and not on_gpu:
        raise ValueError(
            "tune: no request is served by kernels that have options to measure, those on CUDA have"
        )
    shapes = prewarm_gpu.to_tune(on_gpu) if tune else {}
    total = len(distinct) + len(shapes) + len(calls)
    builders = Children()
    pool = ThreadPoolExecutor(_cores(), initializer=builders.adopt_thread)
    with shown_work(total, progress and total > 0) as shown:
        try:
            results = list(pool.map(lambda spec: _obtain(runtime, spec, shown), distinct))
            results += [prewarm_gpu.tune(runtime, *one, pool, shown) for one in shapes.items()]
            runtime.supply.table.forget_options()
            results += prewarm_gpu.make_calls(runtime, calls, pool, shown) if calls else []
        except BaseException:  # Ctrl-C among others: nobody waits for compilers whose kernels nobody wants
            pool.shutdown(wait=False, cancel_futures=True)
            builders.stop()
            raise
    pool.shutdown()
    failed = {result.spec for result in results if result.outcome == "failed"}
    for request, each in specs.items():
        if not failed.intersection(each):
            _bind_lengths(runtime, request)
    return results


def _checked(requests: Iterable[PrewarmRequest]) -> list[PrewarmRequest]:
    # A request is iterable itself: pydantic's models give their fields.
    if isinstance(requests, PrewarmRequest) or not isinstance(requests, Iterable):
        raise TypeError(
            f"requests: {type(requests).__name__}, expected several PrewarmRequests; put them into a list"
        )
    listed = list(requests)
    for place, request in enumerate(listed):
        if not isinstance(request, PrewarmRequest):
            raise TypeError(
                f"requests[{place}]: {type(request).__name__}, expected a PrewarmRequest; make one with "
                "PrewarmRequest(config=..., num_heads=..., num_kv_heads=..., head_dim=...)"
            )
    return listed


def kernels_of(request: PrewarmRequest, engine: str) -> list[KernelSpec]:
    """The kernels that calls like ``request`` may need from ``engine``, each once; none where nothing is compiled.

    Raises as ``prewarm`` does, and touches no cache.
    """
    found: dict[KernelSpec, None] = {}
    for problem in _problems(request):
        engines = candidates(problem) if engine == "auto" else [choose(problem, engine).engine]
        for one in engines:
            found.update(dict.fromkeys(one.specs(problem)))
    return list(found)


def runs_triton(request: PrewarmRequest, engine: str) -> bool:
    """Whether calls like ``request`` are served by Triton kernels; raises as ``prewarm`` does."""
    return any(choose(problem, engine).engine is blocked_cuda.ENGINE for problem in _problems(request))


def _problems(request: PrewarmRequest) -> list[Problem]:
    """One problem per mask kind, for inference and where asked for training; lengths play no part."""
    if request.num_heads % request.num_kv_heads:
        raise ValueError(
            f"num_heads: {request.num_heads}, expected a multiple of num_kv_heads {request.num_kv_heads}"
        )
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
        )
        for train in ((False, True) if request.train else (False,))
        for mask in masks
    ]


def _obtain(runtime: Runtime, spec: KernelSpec, shown: Shown) -> PrewarmResult:
    supply = runtime.supply
    if supply.table.ready(spec):
        known = supply.supplied.get(spec)
        return PrewarmResult(spec, "ready", 0.0, known.bytes if known else 0, None)
    outcomes: dict[str, Outcome] = {"built": "built", "compiled": "ready"}

    def work() -> tuple[Outcome, int]:
        supplied = supply.obtain(spec)
        return outcomes.get(supplied.source, "loaded"), supplied.bytes

    return row_of(spec, shown, work)


def _bind_lengths(runtime: Runtime, request: PrewarmRequest) -> None:
    """Bind the plans of the request's lengths, so that their first call finds its mask made."""
    config = request.config
    for length in dict.fromkeys(request.seq_lens):
        # One element seen as a whole tensor: a plan reads shapes, dtypes and devices only.
        one = torch.empty(1, 1, 1, 1, dtype=dtype_of(request.dtype), device=device_of(request.device))
        q = one.expand(1, request.num_heads, length, request.head_dim)
        k = one.expand(1, request.num_kv_heads, length, request.head_dim)
        mask = band(length, length, causal=config.causal, window=config.window)
        for train in (False, True) if request.train else (False,):
            runtime.plan(q, k, Call(mask, config.scale, config.softcap, runtime.settings.engine, train))


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
