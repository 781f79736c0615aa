"""The errors of this package that are not plain ``ValueError`` or ``TypeError`` on an argument."""

from __future__ import annotations


class SoftcapRuntimeError(RuntimeError):
    """Base of every error below."""


class KernelNotPrewarmed(SoftcapRuntimeError):
    """``jit="forbid"`` and the kernel is not in the cache, or that cannot be read; the text says what to do."""


class BuildFailed(SoftcapRuntimeError):
    """A kernel could not be compiled; the text names the step, the tool and the end of its output."""


class EngineUnavailable(SoftcapRuntimeError):
    """The engine asked for cannot serve this call; the text says why and what to use instead."""
