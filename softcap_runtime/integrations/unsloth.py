"""Unsloth's Gemma-2 layer on this package's kernels: ``patch()`` after ``import unsloth``, ``unpatch()`` to undo it.

    import unsloth
    from softcap_runtime.integrations.unsloth import patch

    print(patch())  # what it replaced

Packed batches then keep the softcap without flash-attn, masks take microseconds, and one kernel serves every length
without recompiling. Supports release 2026.10.9.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from softcap_runtime import flex_attention
from softcap_runtime.flex_attention import attend
from softcap_runtime.masks.documents import document_ids_from_cu_seqlens

_HOME, _LAYER, _TRAINER = "unsloth.kernels.flex_attention", "unsloth.models.gemma2", "unsloth.trainer"
_PACKED_INFO, _BLOCK_LIST = "get_packed_info_from_kwargs", "PADDING_FREE_BLOCKLIST"
_CALL = ("Q", "K", "V", "causal_mask", "self", "bsz")
# Supported signatures: the parameters of each function. In unsloth the create functions are None without flex, and the
# last parameter of the first two has either name.
_KNOWN: dict[str, tuple[tuple[str, ...] | None, ...]] = {
    "slow_attention_softcapping": ((*_CALL, "q_len"), (*_CALL, "kv_len")),
    "slow_inference_attention_softcapping": ((*_CALL, "q_len"), (*_CALL, "kv_len")),
    "create_flex_attention_causal_mask": (None, ("max_seq_length",)),
    "create_flex_attention_sliding_window_mask": (None, ("max_seq_length", "sliding_window")),
}
_PACKED_INFO_CALL = ("kwargs", "device", "position_ids")
_MISSING = object()

_originals: dict[str, Any] = {}
_ours: dict[str, Any] = {}
_unblocked: list[str] = []
_layer_call = threading.local()


def patch() -> list[str]:
    """Replace unsloth's functions by this package's wherever unsloth imported them; returns the names it replaced.

    It replaces the functions of ``softcap_runtime.flex_attention`` and ``HAS_FLEX_ATTENTION`` in every module of
    unsloth, and the function that tells the Gemma-2 layer of packed sequences; and removes ``gemma2`` from the models
    that unsloth's trainer does not pack. It works for models made before and after. A second call replaces what was
    imported since.

    Raises ImportError if unsloth cannot be imported, RuntimeError if this release has other names or signatures than
    the supported ones. Nothing is replaced then.
    """
    home, layer, trainer = _modules()
    if not _originals:
        _check(home, layer, trainer)
        _originals.update({name: getattr(home, name) for name in (*_KNOWN, "HAS_FLEX_ATTENTION")})
        _ours.update({name: getattr(flex_attention, name) for name in _originals})
        packed_info = getattr(layer, _PACKED_INFO)
        _originals[_PACKED_INFO], _ours[_PACKED_INFO] = packed_info, _noting(packed_info)
        for name, engine in zip(_KNOWN, (None, "eager"), strict=False):
            _ours[name] = _documented(getattr(flex_attention, name), engine)
    replaced = _swap(_originals, _ours)
    blocked: set[str] = getattr(trainer, _BLOCK_LIST)
    if "gemma2" in blocked:
        blocked.discard("gemma2")
        _unblocked.append("gemma2")
        replaced.append(f"{_TRAINER}.{_BLOCK_LIST}['gemma2']")
    return replaced


def unpatch() -> list[str]:
    """Undo ``patch``; returns the names it restored.

    A model that ran in between keeps its BlockMasks, on which unsloth's own functions fail: ``del model.SWA_mask,
    model.GA_mask`` on the module that holds its layers.
    """
    if not _originals:
        return []
    restored = _swap(_ours, _originals)
    if _unblocked:
        getattr(_modules()[2], _BLOCK_LIST).update(_unblocked)
        restored.append(f"{_TRAINER}.{_BLOCK_LIST}['gemma2']")
    for store in (_originals, _ours, _unblocked):
        store.clear()
    return restored


def _modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        home, layer, trainer = map(importlib.import_module, (_HOME, _LAYER, _TRAINER))
    except ImportError as error:
        raise ImportError(f"unsloth >= 2026.10.9 is needed ({error}); install it, and import it before this") from None
    return home, layer, trainer


def _check(home: ModuleType, layer: ModuleType, trainer: ModuleType) -> None:
    release = getattr(sys.modules["unsloth"], "__version__", "of unknown version")

    def unknown(what: str) -> RuntimeError:
        return RuntimeError(
            f"unsloth {release}: {what}; patch() knows release 2026.10.9, use that or update softcap_runtime"
        )

    for name in ("HAS_FLEX_ATTENTION", *_KNOWN):
        if not hasattr(home, name):
            raise unknown(f"{_HOME} has no {name}")
    for name, known in _KNOWN.items():
        found = _parameters(getattr(home, name))
        if found not in known:
            raise unknown(f"{name}{found}, expected {' or '.join(map(str, known))}")
    for module, name in ((layer, _PACKED_INFO), (trainer, _BLOCK_LIST), *((layer, name) for name in _KNOWN)):
        if not hasattr(module, name):
            raise unknown(f"{module.__name__} has no {name}")
    found = _parameters(getattr(layer, _PACKED_INFO))
    if found != _PACKED_INFO_CALL:
        raise unknown(f"{_PACKED_INFO}{found}, expected {_PACKED_INFO_CALL}")
    if not isinstance(getattr(trainer, _BLOCK_LIST), set):
        raise unknown(f"{_TRAINER}.{_BLOCK_LIST} is no set")


def _parameters(function: Callable[..., Any] | None) -> tuple[str, ...] | None:
    return None if function is None else tuple(inspect.signature(function).parameters)


def _swap(current: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In every module of unsloth, replace the values of ``current`` by those of ``wanted``."""
    swapped = []
    for place, module in _unsloth_modules():
        for name, value in current.items():
            # Other modules keep their own way to learn of packed sequences; only the layer's is ours.
            elsewhere = name == _PACKED_INFO and place != _LAYER
            if not elsewhere and vars(module).get(name, _MISSING) is value and value is not wanted[name]:
                setattr(module, name, wanted[name])
                swapped.append(f"{place}.{name}")
    return swapped


def _unsloth_modules() -> Iterator[tuple[str, ModuleType]]:
    for name, module in sorted(sys.modules.items()):
        if (name == "unsloth" or name.startswith("unsloth.")) and isinstance(module, ModuleType):
            yield name, module


def _noting(packed_info: Callable[..., Any]) -> Callable[..., Any]:
    """``packed_info``, which also keeps its result for the attention that the same layer calls next."""

    def noted(kwargs: Any, device: Any, position_ids: Tensor | None = None) -> Any:
        _layer_call.info = packed_info(kwargs, device, position_ids)
        return _layer_call.info

    return noted


def _documented(function: Callable[..., Tensor], engine: Any) -> Callable[..., Tensor]:
    """``function``, which also separates packed sequences if the layer has just asked for them."""

    def attention(Q: Tensor, K: Tensor, V: Tensor, causal_mask: Any, self: Any, bsz: int, q_len: int) -> Tensor:
        info, _layer_call.info = getattr(_layer_call, "info", None), None
        if info is None or info[1].shape[0] <= 2:
            return function(Q, K, V, causal_mask, self, bsz, q_len)
        rows, keys = Q.shape[2], K.shape[2]
        if bsz != 1 or rows != keys:
            raise ValueError(
                f"packed_seq_lengths: {info[1].shape[0] - 1} packed sequences, with {bsz} batch rows and {rows} "
                f"queries over {keys} keys, expected one row of all their tokens and no cache"
            )
        documents = document_ids_from_cu_seqlens(info[1], keys)
        return attend(Q, K, V, causal_mask, self, bsz, q_len, engine, documents)

    attention.__name__, attention.__doc__ = function.__name__, function.__doc__
    return attention
