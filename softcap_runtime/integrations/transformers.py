"""``attn_implementation="softcap"`` for Hugging Face models: Gemma-2 and all that call an attention interface.

    from softcap_runtime.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="softcap")

A forward pass makes one mask of row intervals for each kind of layer; nothing of size S x S is made. Transformers
itself recognizes packed sequences (``position_ids`` that restart, without ``attention_mask``), but only without a
cache: pass ``use_cache=False``.

Rows of padding see nothing and give zeros, where eager attention gives the mean of hidden values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softcap_runtime.checks import Cap, check_qkv, check_type
from softcap_runtime.config import FULL, SLIDING, check_positive
from softcap_runtime.engines.general import attend_elements
from softcap_runtime.integrations.hf_checks import cap_of, refuse, warn_once
from softcap_runtime.integrations.hf_mask import HfMask
from softcap_runtime.integrations.hf_mask_functions import MaskFunction, Place, check_readings, read
from softcap_runtime.integrations.hf_packed import packed_arguments
from softcap_runtime.integrations.hf_probe import probe
from softcap_runtime.integrations.hf_serving import admit, attend_paged, outside_of_graphs
from softcap_runtime.masks.elements import read_elements
from softcap_runtime.masks.intervals import RowIntervals, combined, dense, row_intervals
from softcap_runtime.masks.padding import has_holes
from softcap_runtime.masks.readable import data_is_readable, data_is_there
from softcap_runtime.masks.validate import check_mask_arguments
from softcap_runtime.ops.operator import autocast_inputs
from softcap_runtime.runtime import Runtime

if TYPE_CHECKING:
    from softcap_runtime.distributed import ContextMask

OLDEST = (4, 56)


def register(
    runtime: Runtime | None = None, name: str = "softcap", context: Mapping[str, ContextMask] | None = None
) -> None:
    """Make ``attn_implementation=name`` run on ``runtime`` (None: the process's own), for every model.

    For continuous batching use ``name`` followed by ``_flash``: ``generate_batch`` takes only names with "flash".
    ``context``: models then run on this rank's rows of a sequence over many devices (``softcap_runtime.distributed``).
    It maps each kind of layer, "full_attention" and "sliding_attention", to a ContextMask; replace these before each
    batch, and pass ``position_ids=layout.rows(rank)`` (or the rank's rows of the batch's own), no cache and no mask.

    Raises TypeError or ValueError for an argument of another kind, ImportError if transformers is missing or older than
    4.56, RuntimeError if its mask functions have another meaning than this module knows.
    """
    if runtime is not None:
        check_type("runtime", runtime, Runtime, "a Runtime; make one with Runtime(settings)")
    check_type("name", name, str, "a name for attn_implementation")
    if context is not None:
        _check_contexts(context)
    try:
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    except ImportError as error:
        raise ImportError(
            f"transformers >= 4.56 is needed ({error}); run: pip install 'softcap-runtime[transformers]'"
        ) from None
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"transformers {transformers.__version__}: expected 4.56 or newer; run: pip install -U transformers"
        )
    check_readings(masking_utils)
    forward = partial(attention_forward, runtime)
    if context is not None:
        forward = partial(context_forward, runtime, context)
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, interval_mask if context is None else no_mask)
    if context is None:
        # generate_batch of transformers to 5.18 puts "paged|" before the name.
        for serving in (f"{name}_flash", f"paged|{name}_flash"):
            admit(serving)
            AttentionInterface.register(serving, forward)
            AttentionMaskInterface.register(serving, interval_mask)


def interval_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | HfMask | None = None,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    use_vmap: bool | None = None,
    **ignored: Any,
) -> HfMask:
    """The mask function: the row intervals of a forward pass, from what transformers says about it.

    ``q_length`` rows from position ``q_offset``, ``kv_length`` keys from ``kv_offset``. ``attention_mask``: bool
    ``[B, seen]``, False for padding; keys past its end are hidden; one that this function made is returned unchanged.
    Older versions pass ``cache_position`` ``[q_length]`` instead of ``q_length`` and ``q_offset``. ``use_vmap``: False
    if all parts of ``mask_function`` are transformers' own.

    Raises ValueError for a mask function that is no row interval.
    """
    if isinstance(attention_mask, HfMask):
        return attention_mask
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    if q_length is None or kv_length is None or mask_function is None:
        raise RuntimeError("transformers passes masks in a way that this softcap_runtime doesn't know; update it")
    device = torch.device(device)
    end = q_offset + (q_length - kv_offset)
    if isinstance(end, Tensor):
        end = int(end) if data_is_readable(end) else end.reshape(1).to(torch.int32)
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
        padding = check_mask_arguments(
            q_length, kv_length, batch_size, padding.device, causal=False, holes=True, attention_mask=padding
        )["attention_mask"]
    place = Place(q_length, kv_length, end, kv_offset, padding, device)
    if torch.compiler.is_dynamo_compiling():
        if use_vmap is not False:  # transformers before 5 does not say; after a graph break, the parts can be read
            raise ValueError(
                "mask_function: may hold a part that isn't transformers' own, which can't be read inside a graph; "
                "compile without fullgraph=True"
            )
        mask = probe(mask_function, batch_size, place)
    else:
        mask = read(mask_function, place)
    if padding is not None and not _shows_all(padding, mask):
        shown = row_intervals(q_length, kv_length, causal=False, window=None, attention_mask=padding)
        if shown.kept is not None and data_is_there(padding) and not has_holes(padding):
            shown = shown._replace(kept=None)  # waits for a GPU once per forward pass, as transformers does
        mask = combined(mask, shown, device)
    return HfMask(*mask)


def _shows_all(padding: Tensor, mask: RowIntervals) -> bool:
    """Whether ``padding`` is known to hide no key that ``mask`` shows."""
    if mask.right is None or not data_is_readable(padding):
        return False
    return bool(padding[:, : max(0, mask.right + mask.q_len - 1)].all())


def attention_forward(
    runtime: Runtime | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: HfMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: ``[B, Sq, Hq, D]``, and None in place of weights.

    ``query`` ``[B, Hq, Sq, D]``, ``key`` and ``value`` ``[B, Hkv, Skv, D]``. ``attention_mask`` comes from
    ``interval_mask`` and includes the window. Without one (encoders, wrappers that drop it) the mask is made from
    ``is_causal`` (default: the module's), ``sliding_window`` and the documents of ``cu_seq_lens_q`` or
    ``position_ids``. A tensor is the caller's own mask, ``[B, H, Sq, Skv]``, bool or additive, and is used as it is.
    Plain torch serves ``dropout``, rows x keys at a time. Continuous batching passes its paged ``cache``, which holds
    all keys; its mask, of the new tokens only, is ignored.

    Raises ValueError for what the kernels do not serve, naming it and what to do, before anything runs.
    """
    paged = kwargs.get("cache") is not None
    refuse(None if paged else attention_mask, dropout if paged else 0.0, kwargs)
    runtime = runtime or Runtime.get()
    cap = cap_of(softcap, scaling, query.shape[-1])
    # Under autocast rotary embeddings leave query and key in float32 where value has autocast's dtype.
    query, key, value = autocast_inputs(query, key, value)
    check_qkv(query, key, value)
    if paged:
        check_positive("sliding_window", sliding_window)
        attend = outside_of_graphs() if torch.compiler.is_compiling() else attend_paged
        return attend(runtime, module, query, key, value, cap, sliding_window, kwargs), None
    lengths = query.shape[2], key.shape[2]
    mask: RowIntervals | Tensor
    if isinstance(attention_mask, Tensor):
        mask = read_elements(attention_mask, query, key.shape[2], "attention_mask")
    elif attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        packed = packed_arguments(query.shape[0], *lengths, causal, kwargs)
        masks = check_mask_arguments(*lengths, query.shape[0], query.device, causal=causal, **packed)
        check_positive("sliding_window", sliding_window)
        mask = row_intervals(*lengths, causal=causal, window=sliding_window, **masks)
    elif lengths != (attention_mask.q_len, attention_mask.kv_len):
        raise ValueError(
            f"attention_mask: made for {attention_mask.q_len} rows over {attention_mask.kv_len} keys, but the "
            f"layer has {lengths[0]} over {lengths[1]}; its cache and its mask disagree"
        )
    else:
        mask = attention_mask
    if dropout and isinstance(mask, RowIntervals):
        mask = dense(mask, query.device)[:, None]
    if isinstance(mask, RowIntervals):
        out = runtime.attend_checked(query, key, value, cap, mask)
    else:
        out = _by_elements(query, key, value, cap, mask, dropout)
    return out.transpose(1, 2), None


def _check_contexts(contexts: Mapping[str, ContextMask]) -> None:
    from softcap_runtime.distributed import ContextMask

    how = f"a mapping of {FULL!r} and {SLIDING!r} to ContextMasks"
    check_type("context", contexts, Mapping, how)
    for kind, mask in contexts.items():
        if kind not in (FULL, SLIDING):
            raise ValueError(f"context: {kind!r} among its keys, expected {how}")
        check_type(f"context[{kind!r}]", mask, ContextMask, "a ContextMask; make one with context_mask(...)")


def no_mask(*_: Any, attention_mask: Tensor | None = None, **ignored: Any) -> None:
    """The mask function of a model over many devices, whose masks are its ContextMasks: None.

    Raises ValueError for padding, as that of this rank's rows says nothing about the others.
    """
    if attention_mask is not None and not (data_is_readable(attention_mask) and bool(attention_mask.all())):
        raise ValueError(
            f"attention_mask: {tuple(attention_mask.shape)} for a model over many devices, expected none; give the "
            "whole sequence's to context_mask"
        )


def context_forward(
    runtime: Runtime | None,
    contexts: Mapping[str, ContextMask],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of a model over many devices: ``[B, rows, Hq, D]``, and None in place of weights.

    Raises ValueError for what the kernels do not serve, and for a layer that its ContextMask was not made for.
    """
    refuse(attention_mask, dropout, kwargs)
    for name in ("attention_mask", "cu_seq_lens_q"):
        if (attention_mask if name == "attention_mask" else kwargs.get(name)) is not None:
            raise ValueError(f"{name}: expected none, a model over many devices has its masks from context_mask")
    kind = FULL if sliding_window is None else SLIDING
    context = contexts.get(kind)
    if context is None:
        raise ValueError(f"context: {sorted(contexts)}, expected a ContextMask for {kind!r} layers too")
    cap, config = cap_of(softcap, scaling, query.shape[-1]), context.config
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    layer, made = (*cap, sliding_window, causal), (config.softcap, config.scale, config.window, config.causal)
    if layer != made:
        raise ValueError(
            f"context[{kind!r}]: made for softcap, scale, window, causal = {made}, but the layer has {layer}; make it "
            "with AttentionConfig.from_hf(model.config, layer_idx)"
        )
    out = (runtime or Runtime.get()).context_attention(query, key, value, config, context)
    return out.transpose(1, 2), None


def _by_elements(query: Tensor, key: Tensor, value: Tensor, cap: Cap, mask: Tensor, dropout: float) -> Tensor:
    if not torch.compiler.is_compiling():
        why = "dropout: no kernel drops weights" if dropout else "attention_mask: rows see more than one range of keys"
        warn_once(f"{why}; plain torch computes this, with rows x keys elements at a time, which is slower")
    return attend_elements(query, key, value, mask, scale=cap.scale, softcap=cap.softcap, dropout=float(dropout))
