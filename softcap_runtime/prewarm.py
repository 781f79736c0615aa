"""Have kernels ready before they are needed: from requests to the kernels that serve them, built in parallel."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.config import PrewarmRequest
from softcap_runtime.kernels import blocked_cuda
from softcap_runtime.kernels.choose import candidates, choose
from softcap_runtime.kernels.cubin import CubinSpec
from softcap_runtime.kernels.engine import Call, Problem
from softcap_runtime.kernels.gpu_options import HEAD_DIMS, Direction, decode_rows, directions
from softcap_runtime.kernels.gpu_tune import Shape, trials
from softcap_runtime.kernels.key import KernelSpec, MaskKind, dtype_of
from softcap_runtime.kernels.triton_launch import TMA_FROM
from softcap_runtime.masks.intervals import RowIntervals, band
from softcap_runtime.tuned import measured_once

if TYPE_CHECKING:
    from softcap_runtime.runtime import Runtime

Outcome = Literal["built", "loaded", "ready", "failed"]
# Called around the work on one kernel: what shows it to people.
Shown = Callable[[KernelSpec], AbstractContextManager[None]]
MASKS: tuple[MaskKind, MaskKind] = ("band", "intervals")
# Keys of the calls on a GPU: few, and so many that decoding cuts them into more than a few shares.
SHORT, MANY_KEYS = 128, 4096


class PrewarmResult(NamedTuple):
    """How one kernel was prepared.

    ``outcome``: ``built`` here, ``loaded`` from the cache (another process may have built it meanwhile),
    ``ready`` in this process before, or ``failed``. ``seconds``: wall time, waiting for another builder
    included. ``bytes``: of its package; 0 where torch compiles it in each process anew. ``error``: one line when
    it failed.
    """

    spec: KernelSpec
    outcome: Outcome
    seconds: float
    bytes: int
    error: str | None


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
    calls = [call for request in on_gpu for call in _calls(request)]
    distinct = list(dict.fromkeys(spec for each in specs.values() for spec in each))
    if tune and not on_gpu:
        raise ValueError(
            "tune: no request is served by kernels that have options to measure, those on CUDA have"
        )
    shapes = _to_tune(on_gpu) if tune else {}
    total = len(distinct) + len(shapes) + len(calls)
    with _shown(total, progress and total > 0) as shown, ThreadPoolExecutor(_cores()) as pool:
        try:
            results = list(pool.map(lambda spec: _obtain(runtime, spec, shown), distinct))
            results += [_tune(runtime, *one, pool, shown) for one in shapes.items()]
            runtime.supply.table.forget_options()
            results += _gpu_kernels(runtime, calls, pool, shown) if calls else []
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
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


def kernel_name(spec: KernelSpec) -> str:
    """A kernel in words, as progress bars and tables show it."""
    words = [spec.op, spec.dtype, f"head_dim {spec.head_dim}" if spec.head_dim else "", spec.mask]
    return " ".join(word for word in words if word) + ("" if spec.capped else " (no softcap)")


def device_of(name: str) -> torch.device:
    """The torch device of a request. Raises ValueError when the name is none, or the device is not there."""
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise ValueError(f"device: {name!r}, expected a torch device such as 'cpu' or 'cuda:0'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {name!r}, expected cpu or cuda")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(
            f"device: {name!r}, but this process sees {count} CUDA devices; use 'cpu' or run there"
        )
    return device


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

    return _row(spec, shown, work)


def _row(spec: KernelSpec, shown: Shown, work: Callable[[], tuple[Outcome, int]]) -> PrewarmResult:
    """How ``work`` on a kernel went: its outcome and bytes."""
    started = time.perf_counter()
    with shown(spec):
        try:
            outcome, size = work()
        except Exception as error:  # whatever went wrong with one kernel is that kernel's row
            line = (str(error).splitlines() or [type(error).__name__])[0]
            return PrewarmResult(spec, "failed", time.perf_counter() - started, 0, line)
    return PrewarmResult(spec, outcome, time.perf_counter() - started, size, None)


def _to_tune(requests: Iterable[PrewarmRequest]) -> dict[tuple[str, str, int, Direction], Shape]:
    """What options are kept for, and the calls to measure them by: the first request decides."""
    found: dict[tuple[str, str, int, Direction], Shape] = {}
    for one in requests:
        device, width = device_of(one.device), min(size for size in HEAD_DIMS if size >= one.head_dim)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        shape = Shape(
            device,
            dtype_of(one.dtype),
            one.num_heads,
            one.num_kv_heads,
            width,
            max(one.seq_lens, default=MANY_KEYS),
            one.config.scale,
            one.config.softcap,
        )
        for direction in directions(width, one.train):
            found.setdefault((str(device), one.dtype, width, direction), shape)
    return found


def _tune(
    runtime: Runtime, key: tuple[str, str, int, Direction], shape: Shape, pool: Executor, shown: Shown
) -> PrewarmResult:
    """Have the best options of a kernel measured, or find those that were."""
    direction = key[3]
    capped = shape.softcap is not None
    spec = KernelSpec(f"tuned {direction}", "cuda", key[1], shape.head_dim, capped, "")

    def work() -> tuple[Outcome, int]:
        done = measured_once(
            runtime.supply.store,
            shape.device.index,
            shape.dtype,
            shape.head_dim,
            direction,
            lambda: trials(shape, direction, pool),
        )
        return ("built" if done.source == "built" else "loaded"), len(done.data)

    return _row(spec, shown, work)


class _Call(NamedTuple):
    """A call of zeros: query ``rows`` over ``keys`` under one kind of masks."""

    request: PrewarmRequest
    rows: int
    keys: int
    mask: MaskKind

    @property
    def spec(self) -> KernelSpec:
        """What progress bars and tables call it."""
        kind = "decoding" if self.rows < self.keys else "training" if self.request.train else "forward"
        capped = self.request.config.softcap is not None
        return KernelSpec(f"gpu {kind}", "cuda", self.request.dtype, self.request.head_dim, capped, self.mask)


def _calls(request: PrewarmRequest) -> list[_Call]:
    """The calls that meet every GPU kernel which calls like ``request`` may need, at the lengths that it names too.

    Kernels differ between short and long calls, and those of decoding in how many query rows they take together.
    """
    group = request.num_heads // request.num_kv_heads
    most = decode_rows(dtype_of(request.dtype))
    rows = {1, *(size // group for size in (32, 64) if size <= most)} - {0}
    long = SHORT
    while 2 * request.num_heads * request.head_dim * long**2 < TMA_FROM:
        long *= 2
    shapes = [(keys, keys) for keys in (*request.seq_lens, SHORT, long)]
    shapes += [(count, keys) for keys in (SHORT, MANY_KEYS) for count in sorted(rows)]
    return [_Call(request, *shape, mask) for shape in dict.fromkeys(shapes) for mask in MASKS]


def _make(runtime: Runtime, call: _Call, shown: Shown) -> PrewarmResult:
    def work() -> tuple[Outcome, int]:
        _run(runtime, call)
        if torch.device(call.request.device).type == "cuda":
            torch.cuda.synchronize(call.request.device)
        return "ready", 0

    return _row(call.spec, shown, work)


def _run(runtime: Runtime, call: _Call) -> None:
    request, device = call.request, device_of(call.request.device)

    def zeros(length: int, heads: int) -> Tensor:
        shape = (1, length, heads, request.head_dim)
        return torch.zeros(shape, dtype=dtype_of(request.dtype), device=device).transpose(1, 2)

    q, k, v = zeros(call.rows, request.num_heads), *(zeros(call.keys, request.num_kv_heads) for _ in range(2))
    ids = torch.zeros(1, call.keys, dtype=torch.int32, device=device) if call.mask == "intervals" else None
    with torch.no_grad():
        runtime.attention(q, k, v, request.config, document_ids=ids)
    if request.train and call.rows == call.keys:
        with torch.enable_grad():
            inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
            out = runtime.attention(*inputs, request.config, document_ids=ids)
            torch.autograd.grad(out, inputs, torch.zeros_like(out))


def _gpu_kernels(runtime: Runtime, calls: list[_Call], pool: Executor, shown: Shown) -> list[PrewarmResult]:
    """Make ``calls``; a row for each kernel that they brought here, and for each call that failed or brought none."""
    known = set(runtime.supply.supplied)
    with runtime.supply.prewarming():
        made = list(pool.map(lambda call: _make(runtime, call, shown), calls))
    new = [
        PrewarmResult(
            spec.summary(), "built" if one.source == "built" else "loaded", one.seconds, one.bytes, None
        )
        for spec, one in list(runtime.supply.supplied.items())
        if spec not in known and isinstance(spec, CubinSpec)
    ]
    return new + [row for row in made if row.outcome == "failed" or not new]


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


@contextlib.contextmanager
def _shown(total: int, progress: bool) -> Iterator[Shown]:
    """A bar over ``total`` kernels, with a line and the elapsed time for each one in work."""
    if not progress:
        yield lambda spec: contextlib.nullcontext()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        overall = bar.add_task("kernels", total=total)

        @contextlib.contextmanager
        def line(spec: KernelSpec) -> Iterator[None]:
            task = bar.add_task(f"  {kernel_name(spec)}", total=None)
            try:
                yield
            finally:
                bar.remove_task(task)
                bar.advance(overall)

        yield line
