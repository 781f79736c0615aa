"""One sequence over many devices, on torch.distributed's own parts: imported only when asked for."""

from softcap_runtime.distributed.context import ContextMask, context_mask
from softcap_runtime.distributed.layout import SequenceLayout

__all__ = ["ContextMask", "SequenceLayout", "context_mask"]
