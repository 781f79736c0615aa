"""Masks: row intervals against transformers' own eager masks, element by element, without any model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, masking_utils
from transformers.cache_utils import DynamicCache, StaticCache

from softcap_runtime import Runtime
from softcap_runtime.integrations import hf_mask_functions
from softcap_runtime.masks.intervals import dense

from .conftest import NAME, NEEDS_TRANSFORMERS_5

pytestmark = [pytest.mark.usefixtures("runtime"), NEEDS_TRANSFORMERS_5]
BATCH = 3


def config(**fields: Any) -> Gemma2Config:
    return Gemma2Config(num_hidden_layers=2, head_dim=8, sliding_window=5, **fields)


def visible(mask: Any, batch: int, q_len: int) -> Tensor:
    """Either kind of mask as bool ``[B, q_len, kv_len]``."""
    if isinstance(mask, Tensor):
        return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    assert mask.q_len == q_len
    return dense(mask, "cpu").expand(batch, -1, -1)


def assert_equal_masks(make: Any, q_len: int, rows: Tensor | slice = slice(None), **arguments: Any) -> Any:
    """Ours equals eager's, in ``rows`` (all, or bool ``[B, q_len]``); returns ours."""
    settings = config()
    masks = []
    for name in ("eager", NAME):
        settings._attn_implementation = name
        masks.append(make(settings, torch.zeros(BATCH, q_len, 0), **arguments))
    eager, ours = (visible(mask, BATCH, q_len) for mask in masks)
    assert torch.equal(eager[rows], ours[rows])
    return masks[1]


def padding(kind: str, length: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    for row in range(BATCH):
        hidden = random.randrange(length)
        if kind == "left":
            mask[row, :hidden] = 0
        elif kind == "right":
            mask[row, length - hidden :] = 0
    return mask


def fill(cache: Any, length: int) -> None:
    if length:
        states = torch.zeros(BATCH, 1, length, 8)
        for layer in range(2):
            cache.update(states, states, layer)


MAKERS = [masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["none", "ones", "left", "right"])
@pytest.mark.parametrize("cached", ["no cache", "dynamic", "static"])
def test_equal_to_eager(make: Any, kind: str, cached: str, seed: int) -> None:
    for _ in range(10):
        past = 0 if cached == "no cache" else random.choice([0, 1, 3, 4, 5, 6, 11])
        q_len = random.choice([1, 2, 4, 5, 6, 9])
        cache = None
        if cached == "dynamic":
            cache = DynamicCache(config=config())
        elif cached == "static":
            cache = StaticCache(config=config(), max_cache_len=random.choice([20, 32]))
        if cache is not None:
            fill(cache, past)
        assert_equal_masks(
            make, q_len, attention_mask=padding(kind, past + q_len), past_key_values=cache, position_ids=None
        )


@pytest.mark.parametrize("make", MAKERS)
def test_no_tensor_without_padding(make: Any, seed: int) -> None:
    mask = assert_equal_masks(make, 9, attention_mask=torch.ones(BATCH, 9), past_key_values=None, position_ids=None)
    assert mask.lo is None


@pytest.mark.parametrize("make", MAKERS)
def test_offset_that_cannot_be_read(make: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a static cache's offset is a tensor whose value nobody waits for."""
    from softcap_runtime.integrations import transformers as integration

    monkeypatch.setattr(integration, "data_is_readable", lambda tensor: False)
    for past, q_len in ((0, 6), (3, 1), (7, 2)):
        cache = StaticCache(config=config(), max_cache_len=16)
        fill(cache, past)
        mask = assert_equal_masks(
            make, q_len, attention_mask=padding("left", past + q_len), past_key_values=cache, position_ids=None
        )
        assert mask.lo.is_contiguous() and mask.lo.dtype == torch.int32  # noqa: PT018


@pytest.mark.parametrize("make", MAKERS)
def test_packed_position_ids(make: Any, seed: int) -> None:
    lengths = [[3, 1, 8], [12], [1] * 12]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    for ids in (position_ids, position_ids[:1]):
        assert_equal_masks(make, 12, attention_mask=None, past_key_values=None, position_ids=ids)


def test_bidirectional(seed: int) -> None:
    for make in (
        masking_utils.create_bidirectional_mask,
        getattr(masking_utils, "create_bidirectional_sliding_window_mask", None),
    ):
        if make is not None:
            assert_equal_masks(make, 9, attention_mask=padding("right", 9))


@pytest.mark.parametrize("shown", [True, False])
def test_constant_lambda(shown: bool, seed: int) -> None:
    """EmbeddingGemma turns a causal mask into one both ways by a lambda that is always true."""
    constant = (lambda *args: torch.tensor(True)) if shown else (lambda b, h, q, kv: torch.tensor(False))
    for make in MAKERS:
        for kind in ("none", "left", "right"):
            mask = assert_equal_masks(
                make, 9, attention_mask=padding(kind, 9), past_key_values=None, or_mask_function=constant
            )
            assert (mask.lo is None) is (kind == "none")


def test_lambda_that_reads_its_arguments_raises(seed: int) -> None:
    hidden = torch.zeros(1)
    for function in (
        lambda b, h, q, kv: kv % 2 == 0,
        lambda *args: (lambda: args[3] % 2 == 0)(),
        lambda *args: hidden > 0,
    ):
        with pytest.raises(ValueError, match=r"mask function .*<lambda> of .*test_masks: no known row interval"):
            assert_equal_masks(MAKERS[0], 4, attention_mask=None, past_key_values=None, or_mask_function=function)


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("make", MAKERS)
def test_image_spans(make: Any, past: int, seed: int) -> None:
    """Spans that see each other both ways, wider than the window too, as PaliGemma 2 passes them."""
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, 1, 1, 1, 1, -1], [0] * 5 + [-1] * 7, [-1] * 12])
    for cached in (DynamicCache(config=config()), StaticCache(config=config(), max_cache_len=16)):
        fill(cached, past)
        attention_mask = padding("left", 12)
        assert attention_mask is not None
        assert_equal_masks(
            make,
            12 - past,
            rows=attention_mask[:, past:].bool(),  # in eager padding inside a span sees the span
            attention_mask=attention_mask,
            past_key_values=cached,
            position_ids=None,
            block_sequence_ids=ids,
        )


def test_image_spans_inside_a_window(seed: int) -> None:
    """The window bounds the past of a span alone, as Gemma 3 composes it."""
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, 1, 1, 1, 1, -1]]).expand(BATCH, -1)
    mask = assert_equal_masks(
        masking_utils.create_causal_mask,
        12,
        attention_mask=None,
        past_key_values=None,
        or_mask_function=masking_utils.blockwise_overlay(ids),
        and_mask_function=masking_utils.sliding_window_overlay(3),
    )
    assert mask.lo is not None


# Parts that models of transformers before 5.1 have of their own: what they mean, under their names.


def bidirectional_mask_function(attention_mask: Tensor | None) -> Any:
    def inner_mask(batch: Any, head: Any, row: Any, key: Any) -> Any:
        return torch.ones((), dtype=torch.bool) if attention_mask is None else attention_mask[batch, key].bool()

    inner_mask.__module__ = "transformers.models.t5gemma.modeling_t5gemma"
    return inner_mask


def sliding_window_bidirectional_mask_function(sliding_window: int) -> Any:
    def inner_mask(batch: Any, head: Any, row: Any, key: Any) -> Any:
        return abs(row - key) < sliding_window

    inner_mask.__module__ = "transformers.models.t5gemma.modeling_t5gemma"
    return inner_mask


def token_type_ids_mask_function(token_type_ids: Tensor, image_group_ids: Tensor) -> Any:
    def inner_mask(batch: Any, head: Any, row: Any, key: Any) -> Any:
        size = token_type_ids.shape[1]
        groups = [
            torch.where(
                at < size, torch.where(token_type_ids == 1, image_group_ids, -1)[batch, at.clamp(max=size - 1)], -1
            )
            for at in (row, key)
        ]
        return (groups[0] == groups[1]) & (groups[0] >= 0)

    inner_mask.__module__ = "transformers.models.gemma3.modeling_gemma3"
    return inner_mask


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("window", [None, 4])
def test_an_encoder_of_older_t5gemmas(kind: str, window: int | None, seed: int) -> None:
    mask = (torch.rand(BATCH, 12) < 0.6).long() if kind == "holes" else padding(kind, 12)
    both_ways = bidirectional_mask_function(mask)
    parts: dict[str, Any] = {"or_mask_function": both_ways}
    if window is not None:
        parts = {"or_mask_function": sliding_window_bidirectional_mask_function(window), "and_mask_function": both_ways}
    make, given = masking_utils.create_causal_mask, {"past_key_values": None, "position_ids": None}
    assert_equal_masks(make, 12, attention_mask=mask, **given, **parts)
    if mask is not None:
        with pytest.raises(ValueError, match=r"bidirectional_mask_function.* no known row interval"):
            assert_equal_masks(make, 12, attention_mask=None, **given, **parts)


@pytest.mark.parametrize("room", [0, 5])
def test_images_of_older_gemma3s(room: int, seed: int) -> None:
    """Also over a static cache, which has room for more keys than there are ids."""
    groups = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, 2, -1]]).expand(BATCH, -1)
    images = (groups >= 0).long()
    cache = StaticCache(config=config(), max_cache_len=10 + room) if room else None
    if cache is not None:
        fill(cache, 0)
    for make in MAKERS:
        part = token_type_ids_mask_function(images, groups)
        assert_equal_masks(
            make, 10, attention_mask=None, past_key_values=cache, position_ids=None, or_mask_function=part
        )


def test_span_in_two_pieces_raises(seed: int) -> None:
    ids = torch.tensor([[0, -1, 0]]).expand(BATCH, -1)
    with pytest.raises(ValueError, match=r"block_sequence_ids: a block of batch row 0 is in two pieces"):
        assert_equal_masks(
            MAKERS[0], 3, attention_mask=None, past_key_values=None, position_ids=None, block_sequence_ids=ids
        )


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_sequences_with_ids_of_their_own(kind: str, seed: int) -> None:
    """As models of proteins pass them: in any order, but each in one piece."""
    make = getattr(masking_utils, f"create_{kind}_mask")
    for ids in ([0, 0, 1, 1, 2, 2], [7, 7, 3, 3, -1, -1], [-1, -1, 0, 1, 1, 1]):
        same = masking_utils.packed_sequence_mask_function(torch.tensor([ids]).expand(BATCH, -1))
        assert_equal_masks(make, 6, attention_mask=None, past_key_values=None, and_mask_function=same)
    again = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 0, 0]]).expand(BATCH, -1))
    with pytest.raises(ValueError, match=r"packed_sequence_mask: a block of batch row 0 is in two pieces"):
        assert_equal_masks(make, 6, attention_mask=None, past_key_values=None, and_mask_function=again)


def test_span_in_two_pieces_raises_in_an_exported_program(seed: int) -> None:
    """Also where a compiler leaves out what is not used: the ids that the check lets through are what goes on."""

    class Mask(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            place = hf_mask_functions.Place(6, 6, 6, 0, None, torch.device("cpu"))
            same = masking_utils.packed_sequence_mask_function(ids)
            return dense(hf_mask_functions.read(same, place), "cpu")

    whole, broken = torch.tensor([[7, 7, 3, 3, -1, -1]]), torch.tensor([[0, 0, 1, 1, 0, 0]])
    program = torch.export.export(Mask(), (whole,), strict=False).module()
    program.graph.eliminate_dead_code()
    program.recompile()
    assert torch.equal(program(whole)[0], whole == whole.T)
    with pytest.raises(RuntimeError, match=r"packed_sequence_mask: a block is in two pieces"):
        program(broken)


def test_custom_mask_function_raises_by_name(seed: int) -> None:
    def every_other_key(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return kv % 2 == 0

    with pytest.raises(ValueError, match=r"mask function .*every_other_key.*attn_implementation='eager'"):
        assert_equal_masks(MAKERS[0], 4, attention_mask=None, past_key_values=None, or_mask_function=every_other_key)


def test_chunked_mask_raises_by_name(seed: int) -> None:
    settings = config()
    settings.attention_chunk_size = 3
    settings._attn_implementation = NAME
    with pytest.raises(ValueError, match=r"mask function chunked_overlay.*attn_implementation='eager'"):
        masking_utils.create_chunked_causal_mask(settings, torch.zeros(1, 4, 0), None, past_key_values=None)


def test_padding_with_holes(seed: int) -> None:
    settings = config()
    settings._attn_implementation = NAME
    keep = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    mask = masking_utils.create_causal_mask(settings, torch.zeros(2, 4, 0), keep, past_key_values=None)
    assert torch.equal(dense(mask, "cpu"), torch.ones(4, 4).tril().bool() & keep[:, None].bool())


def test_changed_meaning_is_found(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_mask_functions.check_readings(masking_utils)

    # A version in which the window means another key more, though its parts have the same names.
    source = masking_utils.sliding_window_overlay

    def sliding_window_overlay(sliding_window: int) -> Any:
        def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx >= q_idx - sliding_window

        inner_mask.__module__, inner_mask.__qualname__ = (source.__module__, "sliding_window_overlay.<locals>.inner")
        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    with pytest.raises(RuntimeError, match="sliding_window_causal_mask_function: means something else"):
        hf_mask_functions.check_readings(masking_utils)
