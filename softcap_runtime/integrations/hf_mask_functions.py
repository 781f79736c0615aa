"""Transformers' mask functions, read as row intervals without evaluating them.

Transformers describes a mask as a function of (batch, head, query, key), composed of a few named parts: causal,
window, packed documents, image spans, their ands and ors. Their parameters are read from the closures, so a mask costs
O(rows). An unknown part raises an error that names it; ``check_readings`` compares the known ones with what they do
in the installed version of transformers.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcap_runtime.masks.deferred_checks import checked, next_to
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals, clipped, combined, dense, edges, row_intervals
from softcap_runtime.masks.readable import data_is_readable

MaskFunction = Callable[..., Any]
_HOME = "transformers.masking_utils"
_MODELS = "transformers.models."
_INSTEAD = "use attn_implementation='eager' for this model"


class Place(NamedTuple):
    """Where rows and keys stand: row i at key ``end - q_len + i`` of the ``kv_len`` keys at hand.

    ``end``: an int, or an int32 tensor ``[1]`` if reading it would wait for a GPU or break a trace. ``offset``: the
    position in the sequence of the first key at hand, as a sliding cache drops earlier ones. ``padding``: bool
    ``[B, kv_len]``, or None. ``device``: of the mask's tensors.
    """

    q_len: int
    kv_len: int
    end: int | Tensor
    offset: int
    padding: Tensor | None
    device: torch.device


def read(function: MaskFunction, place: Place) -> RowIntervals:
    """The intervals of ``function``, without padding; a band if no tensor is involved.

    Every part contains its row's own position or sees nothing, so the union of two has no gap. Raises ValueError,
    naming the part, if one of ``function`` is not a known row interval.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    home = getattr(function, "__module__", None)
    if _is_constant(function):
        return _constant(function, place)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    parts = {variable: cell.cell_contents for variable, cell in cells}
    if home != _HOME:
        return _of_a_model(str(home), name, parts, place)
    match name.partition(".")[0]:
        case "causal_mask_function":
            return _reach(place, -UNBOUNDED, 1)
        case "bidirectional_mask_function":
            return _reach(place, -UNBOUNDED, UNBOUNDED)
        case "sliding_window_overlay":
            return _reach(place, 1 - parts["sliding_window"], UNBOUNDED)
        case "sliding_window_bidirectional_overlay":
            return _reach(place, -parts["sliding_window"], parts["sliding_window"] + 1)
        case "packed_sequence_mask_function":
            return _same_run(_in_pieces("packed_sequence_mask", parts["packed_sequence_mask"]), place)
        case "remap_positions_for_packed_sequence":
            return _remapped(read(parts["mask_function"], place), name)
        case "blockwise_overlay":
            return _spans(parts["block_sequence_ids"], place)
        case "and_masks" | "or_masks" as both:
            masks = [read(part, place) for part in parts["mask_functions"]]
            return reduce(partial(combined, device=place.device, union=both == "or_masks"), masks)
        case _:
            raise ValueError(f"mask function {name}: no known row interval; {_INSTEAD}")


def _of_a_model(home: str, name: str, parts: dict[str, Any], place: Place) -> RowIntervals:
    """Parts that models define themselves: those of T5Gemma, and of images up to transformers 5.0."""
    match home.removeprefix(_MODELS).partition(".")[0], name.partition(".")[0], sorted(parts):
        case ("gemma3", "_bidirectional_window_overlay", ["sliding_window"]) | (
            "t5gemma",
            "sliding_window_bidirectional_mask_function",
            ["sliding_window"],
        ):  # the window counts the row's own key
            return _reach(place, 1 - parts["sliding_window"], parts["sliding_window"])
        case "t5gemma", "bidirectional_mask_function", ["attention_mask"] if (
            parts["attention_mask"] is None or place.padding is not None
        ):
            return _reach(place, -UNBOUNDED, UNBOUNDED)  # what it hides is ``place.padding``
        case "gemma3" | "paligemma", "token_type_ids_mask_function", ["image_group_ids", "token_type_ids"]:
            images = parts["token_type_ids"] == 1
            return _spans(torch.where(images, parts["image_group_ids"], -1), place)
    raise ValueError(f"mask function {name} of {home}: no known row interval; {_INSTEAD}")


def _is_constant(function: MaskFunction) -> bool:
    """Whether ``function`` is a lambda that neither reads its arguments nor closes over anything."""
    if getattr(function, "__name__", None) != "<lambda>" or function.__closure__ or function.__code__.co_cellvars:
        return False
    return not any(step.opname.startswith("LOAD_FAST") for step in dis.get_instructions(function))


def _constant(function: MaskFunction, place: Place) -> RowIntervals:
    """Every key or none: EmbeddingGemma's bidirectional mask is a lambda that is always true."""
    shown = UNBOUNDED if function(0, 0, 0, 0) else 0
    return _reach(place, -shown, shown)


def _reach(place: Place, left: int, right: int) -> RowIntervals:
    """Each row at position p sees the keys ``p + left <= j < p + right``."""
    q_len, kv_len, end = place.q_len, place.kv_len, place.end
    if isinstance(end, Tensor):
        positions = _positions(place)[None]
        return clipped(q_len, kv_len, positions + left, positions + right)
    left, right = max(end - q_len + left, -UNBOUNDED), min(end - q_len + right, UNBOUNDED)
    return RowIntervals(q_len, kv_len, left, right, None, None)


def _positions(place: Place) -> Tensor:
    rows = torch.arange(place.q_len, dtype=torch.int32, device=place.device)
    return rows + (place.end - place.q_len)


def _same_run(ids: Tensor, place: Place) -> RowIntervals:
    """Each row sees the keys with its own id; equal ids stand side by side."""
    end = place.end if isinstance(place.end, Tensor) else torch.full((1,), place.end, device=place.device)
    behind = isinstance(place.end, Tensor) or place.end != place.kv_len
    cache_lengths = end if behind else None
    runs = (ids != ids.roll(1, 1)).cumsum(1, dtype=torch.int32)  # ids may fall, document ids may not
    return row_intervals(
        place.q_len, place.kv_len, causal=False, window=None, document_ids=runs, cache_lengths=cache_lengths
    )


def _remapped(mask: RowIntervals, name: str) -> RowIntervals:
    """A mask over positions within a document, taken as one over positions in the row.

    The two agree inside a document, and another part of the mask hides all other documents.
    """
    if mask.lo is not None:
        raise ValueError(f"mask function {name}: image spans in packed sequences are not supported; {_INSTEAD}")
    return mask


def _spans(ids: Tensor, place: Place) -> RowIntervals:
    """Each row sees the keys of its own span both ways; a row outside spans (id -1) sees nothing."""
    ids = ids.to(place.device)[:, place.offset : place.offset + place.kv_len]
    ids = torch.nn.functional.pad(ids, (0, place.kv_len - ids.shape[1]), value=-1)  # a static cache has room for more
    if place.padding is not None:
        ids = ids.masked_fill(~place.padding, -1)
    ids = _in_pieces("block_sequence_ids", ids, least=0)
    lo, hi = edges(_same_run(ids, place), place.device)
    outside = ids[:, _positions(place)] < 0
    lo, hi = lo.masked_fill(outside, place.kv_len), hi.masked_fill(outside, 0)
    return clipped(place.q_len, place.kv_len, lo, hi)


def _in_pieces(name: str, ids: Tensor, least: int | None = None) -> Tensor:
    """``ids``, after a check that equal ones, of those from ``least`` on, stand side by side; else ValueError."""
    if not data_is_readable(ids):
        message = f"{name}: a block is in two pieces, expected each in one; {_INSTEAD}"
        return checked(ids, lambda: _in_one_piece(ids, least), message, (least,))
    for row, values in enumerate(ids):
        pieces = torch.unique_consecutive(values)
        if least is not None:
            pieces = pieces[pieces >= least]
        if len(pieces) != len(pieces.unique()):
            raise ValueError(f"{name}: a block of batch row {row} is in two pieces, expected each in one; {_INSTEAD}")
    return ids


def _in_one_piece(ids: Tensor, least: int | None) -> Tensor:
    """Whether all pieces of a row, of ids from ``least`` on, have different ids; reads no data."""
    starts = next_to(ids, torch.ne)
    if least is not None:
        starts &= ids >= least
    count = ids.shape[1]
    # Keys that start no piece get unique numbers below all ids.
    others = ids.amin(1, keepdim=True) - 1 - torch.arange(count, device=ids.device)
    return next_to(torch.where(starts, ids, others).sort(1).values, torch.ne)


def check_readings(utils: Any) -> None:
    """Compare what ``read`` makes of each part with what it does in ``utils``, the installed ``masking_utils``.

    Raises RuntimeError naming a part whose meaning has changed; skips parts that this version lacks.
    """
    size = 7
    cpu = torch.device("cpu")  # the default device may be another, while a model is created
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2]], device=cpu)
    makers: dict[str, Callable[[Callable[..., MaskFunction]], MaskFunction]] = {
        "causal_mask_function": lambda part: part,
        "bidirectional_mask_function": lambda part: part,
        "sliding_window_causal_mask_function": lambda part: part(3),
        "sliding_window_bidirectional_mask_function": lambda part: part(2),
        "packed_sequence_mask_function": lambda part: part(ids),
        "blockwise_overlay": lambda part: part(ids - 1),
    }
    place = Place(size, size, size, 0, None, cpu)
    positions = torch.arange(size, device=cpu)
    batch, rows, keys = torch.zeros(1, 1, dtype=torch.int64, device=cpu), positions[:, None], positions[None]
    for name, make in makers.items():
        part = getattr(utils, name, None)
        if part is None:
            continue
        function = make(part)
        expected = torch.as_tensor(function(batch, batch, rows, keys), device=cpu).expand(size, size)
        if not torch.equal(dense(read(function, place), "cpu")[0], expected):
            raise RuntimeError(
                f"transformers.masking_utils.{name}: means something else in this version of transformers; "
                "install a version between 4.56 and the newest that softcap_runtime was released with"
            )
