"""``Runtime``: one look-up from a call to its warm kernel."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from softcap_runtime.checks import check_config, check_qkv
from softcap_runtime.config import AttentionConfig, EngineName, PrewarmRequest, RuntimeSettings
from softcap_runtime.kernels import operator, planned
from softcap_runtime.kernels.engine import Call
from softcap_runtime.masks.intervals import RowIntervals, row_intervals
from softcap_runtime.masks.validate import check_mask_arguments, data_is_readable
from softcap_runtime.plans import Plan, PlanKey, Plans
from softcap_runtime.supply import Supply
from softcap_runtime.torch_private import constant_in_graphs
from softcap_runtime.torch_transforms import interpreters_active

if TYPE_CHECKING:
    from softcap_runtime.prewarm_rows import PrewarmResult
    from softcap_runtime.stats import RuntimeStats

_numbers = itertools.count(1)
_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Capped(Protocol):
    """What ``Runtime.attend`` reads of a config: an ``AttentionConfig`` has it."""

    @property
    def softcap(self) -> float | None:
        """Bound of the logits, None for no cap."""

    @property
    def scale(self) -> float:
        """Factor on the products before the cap."""


class Runtime:
    """Serves softcapped attention from warm kernels; thread-safe, and safe after a fork.

    ``Runtime.get()`` is the process's own, with settings from the environment; ``Runtime(settings)`` is one of
    your own. Its cache folder is shared by all processes of the machine. The operator knows
    it by its ``number``.
    """

    _own: ClassVar[Runtime | None] = None
    _own_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        self.settings = settings or RuntimeSettings()
        self.supply = Supply(self.settings)
        self.plans = Plans()
        self.number = next(_numbers)
        operator.register(self, self.number)
        _runtimes.add(self)

    @classmethod
    def get(cls) -> Runtime:
        """The runtime of this process, made at the first call."""
        if torch.compiler.is_dynamo_compiling():
            _make_own()
        elif cls._own is None:
            with cls._own_lock:
                if cls._own is None:
                    cls._own = cls()
        assert cls._own is not None
        return cls._own

    def __deepcopy__(self, memo: object) -> Runtime:
        """Itself: the copy of a model that holds a runtime (an average of its weights, say) is served by it too."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Runtime], tuple[RuntimeSettings, ...]]:
        """For another process: its own if this is the process's own, else one of the same settings."""
        return (Runtime.get, ()) if self is Runtime._own else (Runtime, (self.settings,))

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
        row are valid, the new tokens included; row i then stands at ``cache_lengths - Sq + i``. Keys and values that
        no row sees must be finite all the same (zeros, say): an engine may multiply them by a weight of 0.

        Raises ValueError or TypeError on an argument that does not fit, EngineUnavailable when the engine asked
        for cannot serve the call, KernelNotPrewarmed under ``jit="forbid"``, BuildFailed when the compiler fails.
        """
        # One by one: a tensor of a tuple that is compared with None takes 30 us.
        plain = attention_mask is None and document_ids is None and prefix_lengths is None
        if plain and spans is None and cache_lengths is None and not torch.compiler.is_compiling():
            plan = self._shortcut(q, k, v, config)
            if plan is not None:
                plan.hits += 1
                if plan.backward is not None:
                    return planned.attend(plan, self.settings.engine, self, q, k, v)
                return plan.forward(q, k, v)[0]
        q, k, v = operator.checked_inputs(q, k, v)
        mask = _intervals(q, k, config, attention_mask, document_ids, prefix_lengths, spans, cache_lengths)
        return self.attend(q, k, v, config, mask)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: Capped,
        mask: RowIntervals,
        engine: EngineName | None = None,
    ) -> Tensor:
        """Attention under a mask that is made already: for integrations that make one mask for many layers.

        As ``attention`` without its checks of q, k and v. ``mask`` stands in for the config's window and causal;
        ``engine`` for that of the settings.
        """
        call = Call(mask, config.scale, config.softcap, engine or self.settings.engine, _wants_grad(q, k, v))
        direct = not (torch.compiler.is_compiling() or call.train or q.is_meta)
        if direct and not interpreters_active(q, k, v, *mask.vectors):
            return self.forward(q, k, v, call)[0]
        return operator.attention(q, k, v, call, self.number)

    def prewarm(
        self, requests: Iterable[PrewarmRequest], progress: bool = True, tune: bool = False
    ) -> list[PrewarmResult]:
        """Have the kernels of ``requests`` built and loaded, in parallel; a row per kernel says how it went.

        ``progress`` shows a bar. ``tune`` measures a few block sizes of each GPU kernel first and keeps the best, once
        per machine: calls that are bound from then on use them. A kernel that fails is reported in its row and stops
        no other.
        """
        from softcap_runtime.prewarm import prewarm

        return prewarm(self, requests, progress=progress, tune=tune)

    def stats(self) -> RuntimeStats:
        """Hits, misses, builds, loads, seconds and bytes of this process."""
        from softcap_runtime.stats import collect

        return collect(self)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """Out and, for training, the logsumexp: what the operator calls, below autograd."""
        q, k, v = _rows_together(q), _rows_together(k), _rows_together(v)
        return self.plan(q, k, call).forward(q, k, v, *call.mask.vectors)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v: what the operator's derivative calls."""
        grad_out, q, k, v, out = map(_rows_together, (grad_out, q, k, v, out))
        backward = self.plan(q, k, call).backward
        assert backward is not None
        return backward(grad_out, q, k, v, out, lse, *call.mask.vectors)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """How a call is served, its kernels loaded; reads shapes, dtypes and devices alone."""
        key = PlanKey.of(q, k, call)
        plan = self.plans.get(key)
        if plan is not None:
            plan.hits += 1
        else:
            self.plans.misses += 1
            _check_mask(q, k, call.mask)
            call = call._replace(mask=call.mask.form)  # a plan keeps no mask's contents alive
            problem = call.problem(q, k, self.settings.softcap_approx)
            engine, reason, lasting = self.supply.engine(problem, call.engine)
            table = self.supply.table
            backward = engine.backward(problem, table) if call.train else None
            plan = Plan(engine, reason, problem, engine.forward(problem, table), backward)
            if lasting:
                self.plans.remember(key, plan, table.masks.evictions)
            else:
                self.plans.pass_by(key, plan)
        return plan

    def _shortcut(self, q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig) -> Plan | None:
        """The plan of a call that was made before just so, in a few microseconds."""
        try:
            if interpreters_active(q, k, v):
                return None
            train = _wants_grad(q, k, v)
            call = (
                train,
                q.shape,
                k.shape,
                v.shape,
                q.dtype,
                k.dtype,
                v.dtype,
                q.device,
                k.device,
                v.device,
                config,
            )
            plan = self.plans.shortcuts.get(call)
            if plan is None:
                self._make_shortcut(q, k, v, config, train, call)
                return None
            plain = q.stride(3) == k.stride(3) == v.stride(3) == 1
            return plan if plain and not (q.is_neg() or k.is_neg() or v.is_neg()) else None
        except (AttributeError, IndexError, TypeError, RuntimeError):
            return None  # not dense tensors of four dimensions, or no config: the checks say it properly

    def _make_shortcut(
        self, q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, train: bool, arguments: object
    ) -> None:
        """Check a call's arguments once and for all, and remember where its plan is if there is one."""
        check_qkv(q, k, v)
        mask = _intervals(q, k, config, *_NO_MASKS)
        call = Call(mask, config.scale, config.softcap, self.settings.engine, train)
        plan = self.plans.get(PlanKey.of(q, k, call))
        if plan is not None:
            self.plans.shortcuts[arguments] = plan

    def _after_fork(self) -> None:
        self.plans.after_fork()
        self.supply.after_fork()


@constant_in_graphs
def _make_own() -> bool:
    """For dynamo, which can't follow ``Runtime.get()`` through a lock and settings: it finds the runtime made."""
    return Runtime.get() is not None


_NO_MASKS = (None,) * 5


def _intervals(
    q: Tensor,
    k: Tensor,
    config: AttentionConfig,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    spans: Tensor | None,
    cache_lengths: Tensor | None,
) -> RowIntervals:
    """Check the config and the mask arguments, and intersect these with the config's."""
    check_config(config)
    q_len, kv_len = q.shape[2], k.shape[2]
    given = {
        "attention_mask": attention_mask,
        "document_ids": document_ids,
        "prefix_lengths": prefix_lengths,
        "spans": spans,
        "cache_lengths": cache_lengths,
    }
    check_mask_arguments(q_len, kv_len, q.shape[0], q.device, causal=config.causal, **given)
    if attention_mask is not None and data_is_readable(attention_mask) and bool(attention_mask.all()):
        given["attention_mask"] = None
    return row_intervals(q_len, kv_len, causal=config.causal, window=config.window, **given)


def _check_mask(q: Tensor, k: Tensor, mask: RowIntervals) -> None:
    """Kernels read the interval vectors without looking at their sizes: a wrong one is memory out of bounds."""
    lengths = (q.shape[2], k.shape[2])
    if (mask.q_len, mask.kv_len) != lengths:
        raise ValueError(
            f"mask: made for {mask.q_len} queries over {mask.kv_len} keys, expected {lengths[0]} over {lengths[1]}"
        )
    wanted = list(dict.fromkeys([torch.Size((1, mask.q_len)), torch.Size((q.shape[0], mask.q_len))]))
    if mask.lo is not None and mask.lo.shape in wanted:
        wanted = [mask.lo.shape]  # hi is sized as lo is
    for name, edge in zip(("lo", "hi"), mask.vectors, strict=False):
        if edge.shape not in wanted or (edge.dtype, edge.device) != (torch.int32, q.device):
            raise ValueError(
                f"mask.{name}: {edge.dtype} {tuple(edge.shape)} on {edge.device}, expected int32 "
                f"{' or '.join(str(tuple(shape)) for shape in wanted)} on {q.device}"
            )


def _wants_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _rows_together(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension, which must be 1, and read what is stored."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _after_fork() -> None:
    Runtime._own_lock = threading.Lock()
    for runtime in _runtimes:
        runtime._after_fork()


operator.register_default(Runtime.get)
os.register_at_fork(after_in_child=_after_fork)
