"""``Runtime``: one lookup from a call to its warm kernel."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.checks import check_qkv
from softcap_runtime.config import AttentionConfig, RuntimeSettings
from softcap_runtime.kernels import operator
from softcap_runtime.kernels.engine import Backward, Engine, Forward, Problem
from softcap_runtime.kernels.torch_private import interpreters_active
from softcap_runtime.masks.intervals import RowIntervals, band, row_intervals
from softcap_runtime.masks.validate import check_mask_arguments, data_is_readable
from softcap_runtime.supply import Supply

if TYPE_CHECKING:
    from softcap_runtime.prewarm import PrewarmResult
    from softcap_runtime.stats import RuntimeStats

# Calls of one shape each are remembered up to this number; a forgotten one costs some 100 us once more.
MAX_PLANS = 4096

_numbers = itertools.count(1)
_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Plan:
    """A call's way to its kernel, bound to mask and scalars: from then on a call is one dictionary lookup."""

    __slots__ = ("backward", "engine", "forward", "hits", "reason")

    def __init__(self, engine: Engine, reason: str, forward: Forward) -> None:
        self.engine, self.reason, self.forward = engine, reason, forward
        self.backward: Backward | None = None
        self.hits = 0


class PlanKey(NamedTuple):
    """Everything that a call can differ in, the contents of its tensors aside."""

    q_shape: torch.Size
    k_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    engine: str
    train: bool


class Runtime:
    """Serves softcapped attention from warm kernels; thread-safe, and safe after a fork.

    ``Runtime.get()`` is the process's own, with settings from the environment; ``Runtime(settings)`` is one of
    your own. Its cache folder is shared by all processes of the machine.
    """

    _own: ClassVar[Runtime | None] = None
    _own_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        self.settings = settings or RuntimeSettings()
        self.supply = Supply(self.settings)
        self._plans: dict[PlanKey, Plan] = {}
        # From a call straight to its plan: what can be read off the arguments in a few microseconds.
        self._calls: dict[Any, Plan] = {}
        self._lock = threading.Lock()
        self._misses = 0
        self._forgotten_hits = 0
        self._number = next(_numbers)
        self._engine = self.settings.engine
        operator.register(self, self._number)
        _runtimes.add(self)

    @classmethod
    def get(cls) -> Runtime:
        """The runtime of this process, made at the first call."""
        if cls._own is None:
            with cls._own_lock:
                if cls._own is None:
                    cls._own = cls()
        return cls._own

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: AttentionConfig,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        prefix_lengths: Tensor | None = None,
        spans: Tensor | None = None,
        cache_lengths: Tensor | None = None,
    ) -> Tensor:
        """Softcapped attention: ``[B, Hq, Sq, D]`` in q's dtype, laid out ``[B, Sq, Hq, D]`` in memory.

        ``q`` ``[B, Hq, Sq, D]``, ``k`` and ``v`` ``[B, Hkv, Skv, D]``: float32, bfloat16, float16 (float64: the
        eager engine), any strides; query row i stands at key position ``Skv - Sq + i``.
        ``attention_mask`` ``[B, Skv]``, bool or 0/1: padding, left or right.
        ``document_ids`` ``[B, Skv]``, integers that never decrease: a token sees only its own document.
        ``prefix_lengths`` ``[B]``: the first tokens see each other both ways. ``spans`` ``[B, N, 2]``: half-open
        ranges of tokens that see each other both ways. ``cache_lengths`` ``[B]``: how many keys of each batch
        row are valid, the new tokens included; row i then stands at ``cache_lengths - Sq + i``.

        Raises ValueError or TypeError on an argument that does not fit, EngineUnavailable when the engine asked
        for cannot serve the call, KernelNotPrewarmed under ``jit="forbid"``, BuildFailed when the compiler fails.
        """
        plain = (
            attention_mask is None
            and document_ids is None
            and prefix_lengths is None
            and spans is None
            and cache_lengths is None
        )
        if not torch.compiler.is_compiling():
            train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            if plain and not train and not interpreters_active():
                call = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, config)
                plan = self._calls.get(call)
                if plan is not None and q.stride(3) == k.stride(3) == v.stride(3) == 1:
                    plan.hits += 1
                    return plan.forward(q, k, v)[0]
        masks = (
            {}
            if plain
            else {
                "attention_mask": attention_mask,
                "document_ids": document_ids,
                "prefix_lengths": prefix_lengths,
                "spans": spans,
                "cache_lengths": cache_lengths,
            }
        )
        return self._attention(q, k, v, config, masks)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, masks: dict[str, Tensor | None]
    ) -> Tensor:
        """The whole way: checks, mask, operator."""
        q, k, v = _autocast(q, k, v)
        check_qkv(q, k, v)
        q_len, kv_len = q.shape[2], k.shape[2]
        check_mask_arguments(q_len, kv_len, q.shape[0], q.device, causal=config.causal, **masks)
        padding = masks.get("attention_mask")
        if padding is not None and data_is_readable(padding) and bool(padding.all()):
            masks = {**masks, "attention_mask": None}
        mask = row_intervals(q_len, kv_len, causal=config.causal, window=config.window, **masks)
        return self.attend(q, k, v, config, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, mask: RowIntervals) -> Tensor:
        """Attention under a mask that is made already: for integrations that make one mask for many layers.

        As ``attention``, whose checks of q, k and v and autocast it skips; ``mask`` is in place of the config's
        window and causal.
        """
        train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if torch.compiler.is_compiling() or train or interpreters_active():
            left, right = (0, 0) if mask.left is None or mask.right is None else (mask.left, mask.right)
            number = 0 if self is Runtime._own else self._number
            return torch.ops.softcap_runtime.attention(
                q,
                k,
                v,
                mask.lo,
                mask.hi,
                left,
                right,
                config.scale,
                config.softcap,
                self._engine,
                train,
                number,
            )[0]
        if mask.lo is None and mask == band(
            q.shape[2], k.shape[2], causal=config.causal, window=config.window
        ):
            call = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, config)
        else:
            call = None
        return self.forward(q, k, v, mask, config.scale, config.softcap, self._engine, False, call)[0]

    def prewarm(self, requests: Iterable[PrewarmRequest], progress: bool = True) -> list[PrewarmResult]:
        """Have the kernels of ``requests`` built and loaded, in parallel; a row per kernel says how it went.

        ``progress`` shows a bar. A kernel that fails is reported in its row and stops no other.
        """
        from softcap_runtime.prewarm import prewarm

        return prewarm(self, requests, progress=progress)

    def stats(self) -> RuntimeStats:
        """Hits, misses, builds, loads, seconds and bytes of this process."""
        from softcap_runtime.stats import collect

        return collect(self)

    # What the operator calls

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: RowIntervals,
        scale: float,
        softcap: float | None,
        engine: str,
        train: bool,
        call: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Out and, for training, the logsumexp; below autograd, behind the operator."""
        q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
        plan = self._plan(q, k, mask, scale, softcap, engine, train, call)
        return plan.forward(q, k, v)

    def backward(
        self,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        mask: RowIntervals,
        scale: float,
        softcap: float | None,
        engine: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from (grad_out, q, k, v, out, lse)."""
        grad_out, q, k, v, out, lse = (*map(_dense_last, tensors[:5]), tensors[5])
        plan = self._plan(q, k, mask, scale, softcap, engine, True, None)
        if plan.backward is None:
            problem = _problem(q, k, mask, scale, softcap, True)
            plan.backward = plan.engine.backward(problem, self.supply.table)
        return plan.backward(grad_out, q, k, v, out, lse)

    def _plan(
        self,
        q: Tensor,
        k: Tensor,
        mask: RowIntervals,
        scale: float,
        softcap: float | None,
        engine: str,
        train: bool,
        call: Any,
    ) -> Plan:
        key = PlanKey(
            q.shape, k.shape, q.dtype, q.device, mask.left, mask.right, scale, softcap, engine, train
        )
        # Interval masks are bound anew each time: their contents can't be told apart by looking at them.
        plan = self._plans.get(key) if mask.lo is None else None
        if plan is None:
            self._misses += 1
            problem = _problem(q, k, mask, scale, softcap, train)
            chosen, reason, lasting = self.supply.engine(problem, engine)
            plan = Plan(chosen, reason, chosen.forward(problem, self.supply.table))
            if mask.lo is None and lasting:
                self._remember(key, plan)
        plan.hits += 1
        if call is not None and plan is self._plans.get(key):
            self._calls[call] = plan
        return plan

    def _remember(self, key: PlanKey, plan: Plan) -> None:
        with self._lock:
            if len(self._plans) >= MAX_PLANS:
                self._forget()
            self._plans[key] = plan

    def _forget(self) -> None:
        self._forgotten_hits += sum(plan.hits for plan in self._plans.values())
        self._plans.clear()
        self._calls.clear()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self.supply.after_fork()


def _problem(
    q: Tensor, k: Tensor, mask: RowIntervals, scale: float, softcap: float | None, train: bool
) -> Problem:
    batch, heads, _, head_dim = q.shape
    return Problem(q.device, q.dtype, batch, heads, k.shape[1], head_dim, scale, softcap, mask, train)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast float inputs take its dtype, as those of scaled_dot_product_attention do."""
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    cast = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)]
    return cast[0], cast[1], cast[2]


def _after_fork() -> None:
    Runtime._own_lock = threading.Lock()
    for runtime in _runtimes:
        runtime._after_fork()


operator.register_default(Runtime.get)
os.register_at_fork(after_in_child=_after_fork)
