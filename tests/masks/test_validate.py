"""Bad mask arguments: one line each, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from softcap_runtime.masks import check_mask_arguments

from .oracle import MaskCase, mask_cases, oracle

CPU = torch.device("cpu")
HOLES = torch.tensor([[1] * 9, [1, 1, 0, 1, 1, 1, 1, 1, 1]])


def check(**arguments: Any) -> None:
    given = {"q_len": 4, "kv_len": 9, "batch": 2, "device": CPU, "causal": True, **arguments}
    check_mask_arguments(**given)


@given(case=mask_cases())
@settings(max_examples=100, deadline=None)
def test_every_good_mask_passes(case: MaskCase) -> None:
    arguments = {name: value for name, value in case.items() if name != "window"}
    batch = oracle(case).shape[0]
    if (
        case["q_len"] > case["kv_len"] and case["query_positions"] is None
    ):  # such rows have no id and no place in a cache
        arguments.update(document_ids=None, cache_lengths=None)
    check_mask_arguments(batch=batch, device=CPU, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q_len": 10}, "q: 10 rows over 9 keys with causal=True"),
        ({"attention_mask": torch.ones(0, 9).int()}, "attention_mask: shape (0, 9), expected (2, 9), or (1, 9) for"),
        ({"attention_mask": torch.ones(2, 8, dtype=torch.bool)}, "attention_mask: shape (2, 8), expected (2, 9)"),
        ({"attention_mask": torch.ones(3, 9, dtype=torch.bool)}, "attention_mask: shape (3, 9), expected (2, 9)"),
        ({"attention_mask": torch.ones(9, dtype=torch.bool)}, "attention_mask: shape (9,), expected (2, 9)"),
        ({"attention_mask": torch.tensor([[0] * 8 + [2]])}, "attention_mask: 2, expected 0 (padding) or 1"),
        ({"attention_mask": torch.tensor([[-1] * 9])}, "attention_mask: -1, expected 0 (padding) or 1"),
        ({"attention_mask": HOLES}, "attention_mask: 2 separate runs of 1 in batch row 1"),
        ({"attention_mask": HOLES.bool()}, "attention_mask: 2 separate runs of 1 in batch row 1"),
        ({"document_ids": torch.zeros(2, 4, dtype=torch.int64)}, "document_ids: shape (2, 4), expected (2, 9)"),
        ({"document_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 4, 7, 8]])}, "document_ids: 4 after 5 at position 6"),
        (
            {"document_ids": torch.zeros(2, 9, dtype=torch.int64), "q_len": 10, "causal": False},
            "document_ids: 9 ids for 10 query rows",
        ),
        ({"prefix_lengths": torch.tensor([3, 10])}, "prefix_lengths: 10 in batch row 1, expected 0 to 9"),
        ({"prefix_lengths": torch.tensor([-1, 3])}, "prefix_lengths: -1 in batch row 0, expected 0 to 9"),
        ({"prefix_lengths": torch.tensor(3)}, "prefix_lengths: shape (), expected (2), or (1) for all batch rows"),
        ({"spans": torch.tensor([[0, 3]])}, "spans: shape (1, 2), expected (2, slots, 2)"),
        ({"spans": torch.tensor([[[0, 3], [2, 5]]])}, "spans: [2, 5) in batch row 0 overlaps one that ends at 3"),
        ({"spans": torch.tensor([[[4, 10]]])}, "spans: [4, 10) in batch row 0, expected 0 <= start < end <= 9"),
        ({"spans": torch.tensor([[[-1, 2]]])}, "spans: [-1, 2) in batch row 0, expected 0 <= start < end <= 9"),
        ({"spans": torch.tensor([[[5, 2]]])}, "spans: [5, 2) in batch row 0, expected 0 <= start < end <= 9"),
        ({"cache_lengths": torch.tensor([4, 10])}, "cache_lengths: 10 in batch row 1, expected 4 to 9"),
        ({"cache_lengths": torch.tensor([3, 9])}, "cache_lengths: 3 in batch row 0, expected 4 to 9"),
        ({"cache_lengths": torch.tensor([[4]])}, "cache_lengths: shape (1, 1), expected (2)"),
        (
            {"query_positions": torch.tensor([0, 8, 9, 1])},
            "query_positions: 9 for query row 2 of batch row 0, expected 0 to 8",
        ),
        (
            {"query_positions": torch.tensor([[0, 0, 0, 0], [0, -1, 0, 0]])},
            "query_positions: -1 for query row 1 of batch row 1",
        ),
        ({"query_positions": torch.arange(5)}, "query_positions: shape (1, 5), expected (2, 4)"),
        (
            {"query_positions": torch.zeros(2, 1, 4, dtype=torch.int64)},
            "query_positions: shape (2, 1, 4), expected (2, 4)",
        ),
        ({"query_positions": torch.arange(4, device="meta")}, "query_positions: on meta, expected cpu"),
        ({"document_ids": torch.zeros(2, 9, dtype=torch.int64, device="meta")}, "document_ids: on meta, expected cpu"),
    ],
)
def test_bad_values(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(**arguments)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_mask": torch.ones(2, 9)}, "attention_mask: torch.float32, expected bool or integers 0 and 1"),
        ({"attention_mask": [[1] * 9]}, "attention_mask: list, expected a tensor of bool or integers 0 and 1"),
        ({"document_ids": torch.zeros(2, 9)}, "document_ids: torch.float32, expected integers"),
        ({"document_ids": torch.zeros(2, 9).bool()}, "document_ids: torch.bool, expected integers"),
        ({"prefix_lengths": 3}, "prefix_lengths: int, expected a tensor of integers"),
        ({"spans": [[0, 3]]}, "spans: list, expected a tensor of integers"),
        ({"cache_lengths": torch.ones(2)}, "cache_lengths: torch.float32, expected integers"),
        ({"query_positions": [0, 1, 2, 3]}, "query_positions: list, expected a tensor of integers"),
    ],
)
def test_bad_types(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as caught:
        check(**arguments)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_data_of_other_devices_is_not_read() -> None:
    """A meta tensor has no data: reading any would raise something else."""
    meta = torch.device("meta")
    check(
        device=meta,
        attention_mask=torch.ones(2, 9, dtype=torch.int64, device=meta),
        document_ids=torch.zeros(2, 9, dtype=torch.int64, device=meta),
        prefix_lengths=torch.zeros(2, dtype=torch.int64, device=meta),
        spans=torch.zeros(2, 3, 2, dtype=torch.int64, device=meta),
        cache_lengths=torch.zeros(2, dtype=torch.int64, device=meta),
    )
