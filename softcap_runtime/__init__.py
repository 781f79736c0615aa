"""Softcapped attention for PyTorch: closed-form masks and ahead-of-time kernels, warm in milliseconds."""

import gc as _gc

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
    from softcap_runtime.runtime import Runtime
finally:
    if _collects:
        _gc.enable()

__all__ = [
    "HAS_FLEX_ATTENTION",
    "AttentionConfig",
    "BuildFailed",
    "EngineUnavailable",
    "KernelNotPrewarmed",
    "PrewarmRequest",
    "Runtime",
    "RuntimeSettings",
    "SoftcapRuntimeError",
    "create_flex_attention_causal_mask",
    "create_flex_attention_sliding_window_mask",
    "document_ids_from_cu_seqlens",
    "document_ids_from_position_ids",
    "slow_attention_softcapping",
    "slow_inference_attention_softcapping",
]
