"""document_ids from cu_seqlens and position_ids."""

from __future__ import annotations

import random

import pytest
import torch

from softcap_runtime.masks import document_ids_from_cu_seqlens, document_ids_from_position_ids


def test_both_give_the_documents(seed: int) -> None:
    lengths = [random.randint(1, 30) for _ in range(random.randint(1, 9))]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    for ids in (document_ids_from_cu_seqlens(cu_seqlens, sum(lengths)), document_ids_from_position_ids(positions)):
        assert ids.dtype == torch.int32
        assert torch.equal(ids.long(), expected)


def test_empty_documents_and_one_token_documents() -> None:
    ids = document_ids_from_cu_seqlens(torch.tensor([0, 0, 1, 1, 3, 3]), 3)
    assert ids.shape == (1, 3)
    assert ids[0, 0] != ids[0, 1] == ids[0, 2]
    assert document_ids_from_position_ids(torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[0, 1, 2, 3]]


def test_each_batch_row_has_its_own_packing() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3], [5, 6, 0, 0]])
    assert document_ids_from_position_ids(positions).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 2]]


def test_a_document_of_all_positions_that_a_byte_holds() -> None:
    positions = torch.arange(256).repeat(2)[None].to(torch.uint8)
    assert torch.equal(document_ids_from_position_ids(positions)[0], (torch.arange(512) // 256).int())


@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        ([1, 5, 9], "cu_seqlens: starts at 1, expected 0"),
        ([0, 5, 8], "cu_seqlens: ends at 8, expected seq_len 9"),
        ([0, 5, 10], "cu_seqlens: ends at 10, expected seq_len 9"),
        ([0, 5, 4, 9], "cu_seqlens: 4 after 5 at index 2"),
        ([0], "cu_seqlens: shape (1,)"),
        ([[0, 9]], "cu_seqlens: shape (1, 2)"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens: list[int], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        document_ids_from_cu_seqlens(torch.tensor(cu_seqlens), 9)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_bad_types_and_ranks() -> None:
    with pytest.raises(TypeError, match=r"cu_seqlens: torch.float32, expected integers"):
        document_ids_from_cu_seqlens(torch.tensor([0.0, 9.0]), 9)
    with pytest.raises(TypeError, match=r"cu_seqlens: list, expected a tensor"):
        document_ids_from_cu_seqlens([0, 9], 9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"seq_len: 9.0, expected an integer"):
        document_ids_from_cu_seqlens(torch.tensor([0, 9]), 9.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"position_ids: torch.float32, expected integers"):
        document_ids_from_position_ids(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"position_ids: shape \(3,\)"):
        document_ids_from_position_ids(torch.arange(3))
    with pytest.raises(ValueError, match=r"position_ids: shape \(2, 0\)"):
        document_ids_from_position_ids(torch.zeros(2, 0, dtype=torch.int64))
