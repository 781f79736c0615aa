"""Plans: how each kind of call is served, remembered by everything in which calls can differ."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.checks import Capped
from softcap_runtime.config import EngineName, RuntimeSettings
from softcap_runtime.engines.engine import Backward, Call, Engine, Forward, KeysDone, Problem
from softcap_runtime.masks.intervals import RowIntervals
from softcap_runtime.supply import Supply

# At this number all plans are dropped; making one again costs about 100 us.
MAX_PLANS = 4096


class PlanKey(NamedTuple):
    """Everything in which calls can differ, except the contents of their tensors.

    ``edges``: the shape, dtype and device of each vector of a mask of row intervals; empty for a band.
    """

    q_shape: torch.Size
    k_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    left: int | None
    right: int | None
    edges: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
    scale: float
    softcap: float | None
    engine: str
    train: bool
    beside: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, call: Call) -> PlanKey:
        """The key of a call's plan."""
        mask = call.mask
        edges = tuple((x.shape, x.dtype, x.device) for x in mask.vectors)
        return cls(q.shape, k.shape, q.dtype, q.device, mask.left, mask.right, edges, *call[1:])


@dataclass(eq=False, slots=True)
class Plan:
    """An engine bound to one kind of call: its kernels, band and scalars. A later call is one dictionary look-up."""

    engine: Engine
    reason: str
    problem: Problem
    artifacts: Sequence[Artifact]
    forward: Forward
    backward: Backward | None
    hits: int = 0

    def forward_into(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *edges: Tensor) -> Tensor | None:
        """``forward`` that writes to ``out``, rows or heads of a larger tensor; returns the logsumexp."""
        if self.engine.parts:
            return self.forward(q, k, v, *edges, out=out)[1]
        made, lse = self.forward(q, k, v, *edges)
        out.copy_(made)
        return lse

    def backward_of_keys_first(
        self,
        keys_done: KeysDone,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *edges: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``backward`` that also hands dk and dv to ``keys_done``, before computing dq if the engine can."""
        assert self.backward is not None
        if self.engine.parts:
            return self.backward(grad_out, q, k, v, out, lse, *edges, keys_done=keys_done)
        grads = self.backward(grad_out, q, k, v, out, lse, *edges)
        keys_done(*grads[1:])
        return grads


class Passing(NamedTuple):
    """How a kind of call is served until its kernel is built, and how many calls came after its first."""

    engine: str
    reason: str
    calls: int


class Plans:
    """The plans of one runtime, and shortcuts from a call's arguments straight to them.

    ``shortcuts``: plans by all arguments except masks, then by the form of the mask's vectors, None for a band.
    ``passing``: the kinds of call that have no plan yet, as their kernel is still being built.
    ``paged``: how to serve calls that read a paged cache through its table, by everything in which they can differ;
    ``paged_calls`` counts these calls.
    """

    def __init__(self) -> None:
        self.shortcuts: dict[Hashable, dict[int | None, Plan]] = {}
        self.passing: dict[PlanKey, Passing] = {}
        self.paged: dict[Hashable, Callable[..., Any]] = {}
        self.paged_calls = 0
        self.misses = 0
        self._plans: dict[PlanKey, Plan] = {}
        self._forgotten_hits = 0
        self._evictions = 0
        self._lock = threading.Lock()

    def get(self, key: PlanKey) -> Plan | None:
        """The plan of ``key``, if it is remembered."""
        return self._plans.get(key)

    def remember(self, key: PlanKey, plan: Plan, evictions: int) -> None:
        """Keep a plan; first drop all others at ``MAX_PLANS``, or if ``evictions`` of masks has grown.

        Plans hold the masks that they are bound to, so an evicted mask is only freed with its plans.
        """
        with self._lock:
            if len(self._plans) >= MAX_PLANS or evictions != self._evictions:
                self._forget()
                self._evictions = evictions
            self._plans[key] = plan
            self.passing.pop(key, None)

    def learn(self, arguments: Hashable, form: int | None, key: PlanKey) -> None:
        """Add a shortcut from a call's arguments to the plan of ``key``, if that is remembered."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                return
            if len(self.shortcuts) >= MAX_PLANS:
                self.shortcuts.clear()
            self.shortcuts.setdefault(arguments, {})[form] = plan

    def keep_paged(self, kind: Hashable, serve: Callable[..., Any]) -> None:
        """Remember how a kind of call over a paged cache is served."""
        if len(self.paged) >= MAX_PLANS:
            self.paged.clear()
        self.paged[kind] = serve

    def pass_by(self, key: PlanKey, plan: Plan) -> None:
        """Count a call whose plan is not kept: another engine serves it until its kernel is built."""
        with self._lock:
            if key in self._plans:  # another thread found the kernel
                return
            if len(self.passing) >= MAX_PLANS:
                self.passing.clear()
            before = self.passing.get(key)
            calls = 0 if before is None else before.calls + 1
            self.passing[key] = Passing(plan.engine.name, plan.reason, calls)

    def items(self) -> Iterator[tuple[PlanKey, Plan]]:
        """A snapshot of what is remembered."""
        return iter(list(self._plans.items()))

    @property
    def hits(self) -> int:
        """Look-ups that found their plan."""
        return self._forgotten_hits + sum(plan.hits for _, plan in self.items())

    def after_fork(self) -> None:
        """In a forked child: a lock that another thread held would never be released."""
        self._lock = threading.Lock()

    def _forget(self) -> None:
        self._forgotten_hits = self.hits
        self._plans.clear()
        self.shortcuts.clear()


class Server(Protocol):
    """The part of ``Runtime`` that lower layers call back: what serves attention by plans."""

    settings: RuntimeSettings
    supply: Supply
    plans: Plans
    number: int

    def attend_checked(
        self, q: Tensor, k: Tensor, v: Tensor, config: Capped, mask: RowIntervals, engine: EngineName | None = None
    ) -> Tensor:
        """See ``Runtime.attend_checked``."""

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """See ``Runtime.plan``."""
