"""Softcapped attention for PyTorch: closed-form masks and ahead-of-time kernels, warm in milliseconds."""

import gc as _gc
import typing as _typing

if _typing.TYPE_CHECKING:
    from softcap_runtime.prewarm.rows import PrewarmResult
    from softcap_runtime.report.stats import RuntimeStats

    __version__: str

# What an import makes is there to stay, but makes enough of it to set off a full collection, which walks all of torch's
# heap: 65 of 160 ms, measured.
_collects = _gc.isenabled()
_gc.disable()
try:
    from softcap_runtime.config import AttentionConfig, PrewarmRequest, RuntimeSettings
    from softcap_runtime.errors import BuildFailed, EngineUnavailable, KernelNotPrewarmed, SoftcapRuntimeError
    from softcap_runtime.flex_attention import (
        HAS_FLEX_ATTENTION,
        create_flex_attention_causal_mask,
        create_flex_attention_sliding_window_mask,
        slow_attention_softcapping,
        slow_inference_attention_softcapping,
    )
    from softcap_runtime.masks.documents import document_ids_from_cu_seqlens, document_ids_from_position_ids
    from softcap_runtime.masks.intervals import RowIntervals, row_intervals
    from softcap_runtime.runtime import Runtime
finally:
    if _collects:
        if not _gc.get_freeze_count():  # it goes to the oldest objects at once, and nothing is walked
            _gc.freeze()
            _gc.unfreeze()
        _gc.enable()

__all__ = [
    "HAS_FLEX_ATTENTION",
    "AttentionConfig",
    "BuildFailed",
    "EngineUnavailable",
    "KernelNotPrewarmed",
    "PrewarmRequest",
    "PrewarmResult",
    "RowIntervals",
    "Runtime",
    "RuntimeSettings",
    "RuntimeStats",
    "SoftcapRuntimeError",
    "create_flex_attention_causal_mask",
    "create_flex_attention_sliding_window_mask",
    "document_ids_from_cu_seqlens",
    "document_ids_from_position_ids",
    "row_intervals",
    "slow_attention_softcapping",
    "slow_inference_attention_softcapping",
]

# Imported when first asked for: a process that serves needs none of them.
_LATER = {"PrewarmResult": "softcap_runtime.prewarm.rows", "RuntimeStats": "softcap_runtime.report.stats"}


def __getattr__(name: str) -> object:
    import importlib

    if name == "__version__":
        found: object = importlib.import_module("importlib.metadata").version("softcap-runtime")
    elif name in _LATER:
        found = getattr(importlib.import_module(_LATER[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "__version__"})
