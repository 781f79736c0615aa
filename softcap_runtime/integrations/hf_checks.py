"""Arguments of Hugging Face's attention functions that no kernel serves: refused by name, or warned of once."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from softcap_runtime.checks import Cap, constant_in_graph
from softcap_runtime.config import check_positive
from softcap_runtime.integrations.hf_mask import HfMask

# Arguments that other attention functions take and no kernel here computes; False and None mean not requested.
_REFUSED = {
    "head_mask": "heads can't be masked",
    "s_aux": "attention sinks have no kernel",
    "sinks": "attention sinks have no kernel",
    "position_bias": "a bias on the logits has no kernel",
    "indices": "keys chosen for each row have no kernel",
    "block_indices": "blocks of keys chosen for each row have no kernel",
}


def cap_of(softcap: float | None, scaling: float | None, head_dim: int) -> Cap:
    """A layer's softcap and scale, checked; the default scale is ``head_dim ** -0.5``."""
    softcap, scaling = constant_in_graph(softcap), constant_in_graph(scaling)
    check_positive("softcap", softcap)
    check_positive("scaling", scaling)
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    return Cap(None if softcap is None else float(softcap), scale)


def refuse(attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for an argument that is not served, naming it and what to do."""
    instead = "use attn_implementation='eager'"
    if dropout:
        raise ValueError(
            f"dropout: {dropout} of attention weights, which is not served here; set attention_dropout=0 in the config"
        )
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: {why}; {instead}")
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        warn_once("output_attentions: no weights are computed, None is returned in their place; " + instead)
    if attention_mask is not None and not isinstance(attention_mask, (HfMask, Tensor)):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise ValueError(
            f"attention_mask: {type(attention_mask).__name__} {shape}, expected 2-D [batch, keys] of 0 and 1 where "
            f"the model is called; {instead} for a mask of your own"
        )
    packed = kwargs.get("cu_seq_lens_q")
    if packed is not None and packed.shape[0] > 2 and isinstance(attention_mask, HfMask) and attention_mask.lo is None:
        raise ValueError(
            f"cu_seq_lens_q: {packed.shape[0] - 1} packed sequences that the mask doesn't know; pass position_ids "
            f"that restart at 0, no attention_mask, and use_cache=False"
        )


@functools.cache
def warn_once(words: str) -> None:
    """Log a warning, once per process."""
    logging.getLogger(__name__).warning(words)
