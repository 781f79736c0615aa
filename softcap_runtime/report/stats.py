"""``Runtime.stats()``: what a runtime has done so far in this process, for people and for ``/metrics``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.artifacts.lifecycle import Supplied
from softcap_runtime.engines.spec import kernel_name
from softcap_runtime.plans import Passing, Plan, Plans
from softcap_runtime.store.report import Frozen
from softcap_runtime.supply import Supply


class KernelStats(Frozen):
    """One kernel of this process.

    ``op`` to ``mask``: what it was compiled for (see ``KernelSpec``). ``source``: ``built``, ``disk``, ``memory``
    or ``compiled`` (by torch, in this process). ``seconds``: the time to get it. ``bytes``: the size of its package.
    ``plans``: how many kinds of call (lengths, batches, heads, windows, caps, scales) share it, not counting those
    with unusual strides.
    """

    op: str
    device: str
    dtype: str
    head_dim: int
    capped: bool
    mask: str
    source: str
    seconds: float
    bytes: int
    plans: int


class EngineStats(Frozen):
    """``plans`` kinds of call go to ``engine`` for ``reason``; ``calls``: all but the first of each, as in ``hits``.

    All calls that read a paged cache through its table are one kind, and each of them counts.
    """

    engine: str
    reason: str
    plans: int
    calls: int


class RuntimeStats(Frozen):
    """The state of a runtime in this process.

    ``hits``, ``misses``: plan look-ups that found a plan, and that had to make one. A call is one look-up, its
    backward another, prewarming a length one too. ``builds``, ``loads``: kernels that were compiled, and that came
    from the cache; ``build_seconds``, ``load_seconds``: the time that took. ``bytes``: ``package_bytes`` of loaded
    packages plus ``mask_bytes`` of cached masks. ``background_pending``: builds in the background, while another
    engine serves the calls; ``background_failed``: the error of each kernel whose build failed. ``cache_dir``: the
    cache folder. ``cache_fault``: why it is not used, or could not be; a folder not needed yet is checked, not made.
    """

    hits: int
    misses: int
    builds: int
    loads: int
    build_seconds: float
    load_seconds: float
    bytes: int
    package_bytes: int
    mask_bytes: int
    kernels: list[KernelStats]
    engines: list[EngineStats]
    background_pending: int
    background_failed: dict[str, str]
    cache_dir: str
    cache_fault: str | None


def collect(all_plans: Plans, supply: Supply) -> RuntimeStats:
    """The state of a runtime now, from its plans and its kernels; runs nothing."""
    plans = [plan for _, plan in all_plans.items()]
    supplied = dict(supply.supplied)
    built = [one for one in supplied.values() if one.source == "built"]
    loaded = [one for one in supplied.values() if one.source in ("disk", "memory")]
    package_bytes = sum(one.bytes for one in supplied.values())
    mask_bytes = supply.masks.bytes
    return RuntimeStats(
        hits=all_plans.hits,
        misses=all_plans.misses,
        builds=len(built),
        loads=len(loaded),
        build_seconds=sum(one.seconds for one in built),
        load_seconds=sum(one.seconds for one in loaded),
        bytes=package_bytes + mask_bytes,
        package_bytes=package_bytes,
        mask_bytes=mask_bytes,
        kernels=_kernels(supplied, plans),
        engines=_engines(plans, list(all_plans.passing.values()), all_plans.paged_calls),
        background_pending=supply.pending,
        background_failed={kernel_name(one.describe()): error for one, error in supply.failed.items()},
        cache_dir=str(supply.store.folder),
        cache_fault=supply.store.database.probe_fault(),
    )


def _kernels(supplied: Mapping[Artifact, Supplied], plans: list[Plan]) -> list[KernelStats]:
    sharing: Counter[Artifact] = Counter()
    for plan in plans:
        sharing.update(plan.artifacts)
    return [
        KernelStats(**one.describe()._asdict(), **how._asdict(), plans=sharing[one]) for one, how in supplied.items()
    ]


def _engines(plans: list[Plan], passing: list[Passing], paged_calls: int) -> list[EngineStats]:
    kinds: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    kept = [Passing(plan.engine.name, plan.reason, plan.hits) for plan in plans]
    if paged_calls:
        kept.append(Passing("blocked", "a paged cache, read through its table", paged_calls))
    for engine, reason, count in kept + passing:
        kinds[engine, reason] += 1
        calls[engine, reason] += count
    return [
        EngineStats(engine=engine, reason=reason, plans=count, calls=calls[engine, reason])
        for (engine, reason), count in kinds.items()
    ]
