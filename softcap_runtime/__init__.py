"""Softcapped attention for PyTorch: closed-form masks and ahead-of-time kernels, warm in milliseconds."""

from softcap_runtime.config import AttentionConfig, PrewarmRequest, RuntimeSettings
from softcap_runtime.errors import BuildFailed, EngineUnavailable, KernelNotPrewarmed, SoftcapRuntimeError
from softcap_runtime.runtime import Runtime

__all__ = [
    "AttentionConfig",
    "BuildFailed",
    "EngineUnavailable",
    "KernelNotPrewarmed",
    "PrewarmRequest",
    "Runtime",
    "RuntimeSettings",
    "SoftcapRuntimeError",
]
