"""The package's own errors; a bad argument raises a plain ``ValueError`` or ``TypeError``."""

from __future__ import annotations


class SoftcapRuntimeError(RuntimeError):
    """Base of every error below."""


class KernelNotPrewarmed(SoftcapRuntimeError):
    """``jit="forbid"``, and the kernel is not in the cache or the cache cannot be read; the text says what to do."""


class BuildFailed(SoftcapRuntimeError):
    """A kernel could not be compiled; the text names the kernel and the error of the tool that failed."""


class EngineUnavailable(SoftcapRuntimeError):
    """The engine asked for cannot serve this call; the text says why and what to use instead."""
