"""``Runtime``: one look-up from a call to its warm kernel."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from softcap_runtime.checks import Capped, check_config, check_no_context_parallel, check_qkv, check_type
from softcap_runtime.compat.torch_private import constant_in_graphs
from softcap_runtime.compat.torch_transforms import interpreters_active
from softcap_runtime.config import AttentionConfig, EngineName, PrewarmRequest, RuntimeSettings
from softcap_runtime.engines.engine import Call
from softcap_runtime.engines.kept_keys import bind
from softcap_runtime.masks.intervals import RowIntervals, band, contiguous, row_intervals
from softcap_runtime.masks.readable import data_is_readable
from softcap_runtime.masks.tokens import FindIntervals
from softcap_runtime.masks.validate import check_mask_arguments, check_row_intervals
from softcap_runtime.ops import operator, planned
from softcap_runtime.ops.planned import rows_together
from softcap_runtime.ops.sharding import whole
from softcap_runtime.plans import Plan, PlanKey, Plans
from softcap_runtime.supply import Supply

if TYPE_CHECKING:
    from softcap_runtime.distributed import ContextMask
    from softcap_runtime.prewarm.rows import PrewarmResult
    from softcap_runtime.report.stats import RuntimeStats

_numbers = itertools.count(1)
_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Runtime:
    """Serves softcapped attention from warm kernels; thread-safe, and safe after a fork.

    ``Runtime.get()`` is the process's own, with settings from the environment; ``Runtime(settings)`` makes another.
    All processes of the machine share its cache folder. The operator finds it by its ``number``.
    """

    _own: ClassVar[Runtime | None] = None
    _own_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        self.settings = RuntimeSettings() if settings is None else settings
        check_type("settings", self.settings, RuntimeSettings, "RuntimeSettings; make them with RuntimeSettings(...)")
        self.supply = Supply(self.settings)
        self.plans = Plans()
        self._find_intervals: dict[torch.device, FindIntervals] = {}
        self.number = next(_numbers)
        operator.register(self, self.number)
        _runtimes.add(self)

    @classmethod
    def get(cls) -> Runtime:
        """The runtime of this process, created at the first call."""
        if torch.compiler.is_dynamo_compiling():
            _make_own()
        elif cls._own is None:
            with cls._own_lock:
                if cls._own is None:
                    cls._own = cls()
        assert cls._own is not None
        return cls._own

    def __deepcopy__(self, memo: object) -> Runtime:
        """Itself, so that a copy of a model that holds a runtime (an average of weights, say) shares it."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Runtime], tuple[RuntimeSettings, ...]]:
        """In another process: its own runtime if this is the process's own, else a new one with the same settings."""
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
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Softcapped attention: ``[B, Hq, Sq, D]`` in q's dtype, laid out ``[B, Sq, Hq, D]`` in memory.

        ``q`` ``[B, Hq, Sq, D]``, ``k`` and ``v`` ``[B, Hkv, Skv, D]``: float32, bfloat16, float16 (float64: the
        eager engine), any strides; query row i stands at key position ``Skv - Sq + i``. B, Sq and Skv may be 0: rows
        without keys give 0.
        ``attention_mask`` ``[B, Skv]``, bool or 0/1: padding, left or right, or any other tokens to hide.
        ``document_ids`` ``[B, Skv]``, integers that never decrease: a token sees only its own document.
        ``prefix_lengths`` ``[B]``: the first tokens see each other both ways. ``spans`` ``[B, N, 2]``: half-open
        ranges of tokens that see each other both ways. ``cache_lengths`` ``[B]``: the number of valid keys in each
        batch row, including the new tokens; row i then stands at ``cache_lengths - Sq + i``.
        ``query_positions`` ``[Sq]`` or ``[B, Sq]``: the key position of each query row, 0 or more in any order, instead
        of ``Skv - Sq + i``. Keys and values that no row sees must still be finite (zeros, say), as an engine may
        multiply them by a weight of 0.

        Raises ValueError or TypeError for an argument that does not fit, EngineUnavailable if the requested engine
        cannot serve the call, KernelNotPrewarmed under ``jit="forbid"``, BuildFailed if the compiler fails.
        """
        check_no_context_parallel()
        # One `is None` each: `in` over a tuple would compare tensors with None, which costs 30 us.
        tokens_alone = prefix_lengths is None and spans is None and cache_lengths is None and query_positions is None
        key = None if torch.compiler.is_compiling() else _shortcut_key(q, k, v, config)
        known = None if key is None else self.plans.shortcuts.get(key)
        if known is None:
            q, k, v = operator.checked_inputs(q, k, v)
        elif tokens_alone and (found := self._edges(q, k, config, attention_mask, document_ids)) is not None:
            plan = known.get(_form_of(found))
            if plan is not None:
                return self._run(plan, q, k, v, *found)
        masks = {
            "attention_mask": attention_mask,
            "document_ids": document_ids,
            "prefix_lengths": prefix_lengths,
            "spans": spans,
            "cache_lengths": cache_lengths,
            "query_positions": query_positions,
        }
        given = {name: None if x is None else whole(x) for name, x in masks.items()}
        mask = _intervals(q, k, config, given)
        form = _form_of(mask.vectors)
        if known is not None and form in known and (mask.lo is None or type(mask.lo) is Tensor):
            return self._run(known[form], q, k, v, *mask.vectors)
        out = self.attend_checked(q, k, v, config, mask)
        if key is not None and q.numel() and k.numel():
            call = Call(mask, config.scale, config.softcap, self.settings.engine, _wants_grad(q, k, v))
            self.plans.learn(key, form, PlanKey.of(q, k, call))
        return out

    def _edges(
        self, q: Tensor, k: Tensor, config: AttentionConfig, attention_mask: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """A mask's vectors, quickly: empty for a band; None if there is no quick way, or the mask is not valid."""
        if attention_mask is None and document_ids is None:
            return ()
        find = self._find_intervals.get(q.device)
        if find is None:
            return None
        return find(q.shape[0], q.shape[2], k.shape[2], config.causal, config.window, attention_mask, document_ids)

    def _run(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *edges: Tensor) -> Tensor:
        plan.hits += 1
        if plan.backward is not None:
            return planned.attend(plan, self.settings.engine, self, q, k, v, *edges)
        return plan.forward(rows_together(q), rows_together(k), rows_together(v), *edges)[0]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, config: Capped, mask: RowIntervals, engine: EngineName | None = None
    ) -> Tensor:
        """Attention under a ready-made mask: for integrations that make one mask for many layers.

        ``mask`` replaces the window and causal of the config, ``engine`` that of the settings. The contents of the mask
        are not checked, all else is, as in ``attention``.
        """
        check_qkv(q, k, v)
        return self.attend_checked(q, k, v, config, mask, engine)

    def attend_checked(
        self, q: Tensor, k: Tensor, v: Tensor, config: Capped, mask: RowIntervals, engine: EngineName | None = None
    ) -> Tensor:
        """``attend`` for callers that have checked q, k and v: once a call, not for each of its parts."""
        check_no_context_parallel()
        check_type("mask", mask, RowIntervals, "RowIntervals; make them with row_intervals(...)")
        if not torch.compiler.is_compiling():
            mask = contiguous(mask)
        call = Call(mask, config.scale, config.softcap, engine or self.settings.engine, _wants_grad(q, k, v))
        direct = not (torch.compiler.is_compiling() or call.train or q.is_meta)
        if direct and not interpreters_active(q, k, v, *mask.vectors):
            return self.forward(q, k, v, call)[0]
        return operator.attention(q, k, v, call, self.number)

    def context_attention(
        self, q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, context: ContextMask, *, stages: int = 1
    ) -> Tensor:
        """``attention`` over a sequence that is spread over ranks: ``[B, Hq, rows, D]``, this rank's rows.

        ``q`` ``[B, Hq, rows, D]``, ``k`` and ``v`` ``[B, Hkv, rows, D]``: the rows that the layout of ``context``
        gives this rank. Every rank of its mesh must call it. ``context``: made by
        ``softcap_runtime.distributed.context_mask`` for the window and causal of ``config``; it holds the masks.
        ``stages``: the number of groups of key heads; each group travels while the one before it is computed.

        Raises as ``attention`` does, before anything is sent. At the first call of a kind, ranks tell each other
        whether they are ready; if one is not, or they disagree, the others raise RuntimeError.
        """
        from softcap_runtime.distributed.attention import Layer, context_attention

        return context_attention(Layer(self, config, context, stages), q, k, v)

    def paged_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: AttentionConfig,
        page_table: Tensor,
        cache_lengths: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
    ) -> Tensor:
        """Attention over a paged cache, for decoding and prefill in chunks: ``[B, Hq, Sq, D]``; no gradients.

        ``q`` ``[B, Hq, Sq, D]``: the new rows of each sequence. ``k``, ``v`` ``[num_pages, page_size, Hkv, D]``, any
        strides: all pages, with the new keys and values already written; ``page_size`` 16, 32, 64, 128 or 256.
        ``page_table`` ``[B, pages]``, integers: each sequence's pages in order; entries past its last page are
        ignored. ``cache_lengths`` ``[B]``, integers: its number of keys, including the new ones; the last row stands
        at the last key. ``cu_seqlens_q`` ``[B + 1]``, integers: for sequences with different numbers of new rows, the
        offset at which the rows of each begin in a q of ``[1, Hq, rows, D]``; rows past the last offset give 0.

        Raises as ``attention`` does. On a GPU nothing waits for the contents of tables and lengths: rows that see a
        missing page are NaN, and so is a sequence whose length does not fit its table or its new rows.
        """
        from softcap_runtime.paged import Pages, paged_attention

        return paged_attention(self, q, Pages(k, v, page_table, cache_lengths), config, cu_seqlens_q)

    def prewarm(
        self, requests: Iterable[PrewarmRequest], progress: bool = True, tune: bool = False
    ) -> list[PrewarmResult]:
        """Build and load the kernels of ``requests``, in parallel; returns a result for each kernel.

        ``progress`` shows a bar. ``tune`` first measures a few block sizes of each GPU kernel, once per machine, and
        keeps the best for later calls. A kernel that fails is reported in its result and stops no other.

        Raises TypeError, ValueError or EngineUnavailable, before anything is built, for a request that cannot be
        served.
        """
        from softcap_runtime.prewarm.prewarm import prewarm

        return prewarm(self.supply, self.plan, requests, progress=progress, tune=tune)

    def stats(self) -> RuntimeStats:
        """Hits, misses, builds, loads, seconds and bytes of this process."""
        from softcap_runtime.report.stats import collect

        return collect(self.plans, self.supply)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """Out and, for training, the logsumexp. Called by the operator, below autograd."""
        q, k, v = rows_together(q), rows_together(k), rows_together(v)
        return self.plan(q, k, call).forward(q, k, v, *call.mask.vectors)

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. Called by the operator's derivative."""
        grad_out, q, k, v, out = map(rows_together, (grad_out, q, k, v, out))
        backward = self.plan(q, k, call).backward
        assert backward is not None
        return backward(grad_out, q, k, v, out, lse, *call.mask.vectors)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan that serves a call, its kernels loaded; reads only shapes, dtypes and devices."""
        key = PlanKey.of(q, k, call)
        plan = self.plans.get(key)
        if plan is not None:
            plan.hits += 1
        else:
            self.plans.misses += 1
            check_row_intervals(call.mask, q, k)
            call = call._replace(mask=call.mask.form)  # a plan keeps no mask's contents alive
            problem = call.problem(q, k, self.settings.softcap_approx)
            engine, reason, artifacts, lasting = self.supply.engine(problem, call.engine)
            kernels = self.supply.kernels(problem)
            if q.device not in self._find_intervals and (find := engine.intervals(problem, kernels)) is not None:
                self._find_intervals[q.device] = find
            plan = Plan(engine, reason, problem, artifacts, *bind(engine, problem, kernels))
            if lasting:
                self.plans.remember(key, plan, self.supply.masks.evictions)
            else:
                self.plans.pass_by(key, plan)
        return plan

    def _after_fork(self) -> None:
        self.plans.after_fork()
        self.supply.after_fork()


@constant_in_graphs
def _make_own() -> bool:
    """Create the process's runtime outside of dynamo, which cannot trace the lock and the settings."""
    return Runtime.get() is not None


_DENSE_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def _shortcut_key(q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig) -> Hashable:
    """Everything that a call's plan and checks depend on, except masks. None for a call that needs the full path: under
    a transform, a mode or autocast, or with anything but dense tensors."""
    if type(config) is not AttentionConfig or not _DENSE_TENSORS.issuperset((type(q), type(k), type(v))):
        return None
    if interpreters_active() or q.is_nested or k.is_nested or v.is_nested:
        return None
    return (
        _wants_grad(q, k, v),
        q.shape, q.dtype, q.device, q.layout,
        k.shape, k.dtype, k.device, k.layout,
        v.shape, v.dtype, v.device, v.layout,
        config,
    )  # fmt: skip


def _intervals(q: Tensor, k: Tensor, config: AttentionConfig, masks: dict[str, Tensor | None]) -> RowIntervals:
    """Check config and mask arguments; returns their intersection."""
    check_config(config)
    q_len, kv_len = q.shape[2], k.shape[2]
    given = check_mask_arguments(q_len, kv_len, q.shape[0], q.device, causal=config.causal, holes=True, **masks)
    if q.shape[0] == 0 or q_len == 0 or kv_len == 0:  # no row sees a key
        return band(q_len, kv_len, causal=False, window=None)
    attention_mask = masks["attention_mask"]
    if attention_mask is not None and data_is_readable(attention_mask) and bool(attention_mask.all()):
        given["attention_mask"] = None
    return row_intervals(q_len, kv_len, causal=config.causal, window=config.window, **given)


def _form_of(vectors: Sequence[Tensor]) -> int | None:
    """What a plan depends on of a mask's vectors: their batch, negative if ``kept`` is one of them; None for a band."""
    if not vectors:
        return None
    return vectors[0].shape[0] if len(vectors) == 2 else -vectors[0].shape[0]


def _wants_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _after_fork() -> None:
    Runtime._own_lock = threading.Lock()
    for runtime in _runtimes:
        runtime._after_fork()


operator.register_default(Runtime.get)
os.register_at_fork(after_in_child=_after_fork)
