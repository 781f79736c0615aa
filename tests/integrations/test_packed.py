"""Packed rows of a layer without a mask: its documents are those of its offsets or positions, or it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import expected, relative_error
from torch import Tensor

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings
from softcap_runtime.integrations.transformers import attention_forward

LENGTHS = [5, 9, 1, 15]
SEQ_LEN = sum(LENGTHS)
OFFSETS = torch.tensor([0, 5, 14, 15, 30], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
IDS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]


def error_of(rows: Tensor | None = None, causal: bool = True, batch: int = 1, **kwargs: Any) -> float:
    """Of a layer without a mask, against the packed documents; ``rows``: which of the rows it runs on."""
    q, k, v = torch.randn(batch, 4, SEQ_LEN, 16), *torch.randn(2, batch, 2, SEQ_LEN, 16)
    rows = torch.arange(SEQ_LEN) if rows is None else rows
    config = AttentionConfig(softcap=50.0, scale=0.25, window=7, causal=causal)
    want = expected(q, k, v, config, document_ids=IDS)[:, :, rows]
    runtime = Runtime(RuntimeSettings(engine="eager"))
    module = SimpleNamespace(is_causal=causal)
    how = {"scaling": 0.25, "softcap": 50.0, "sliding_window": 7}
    out, _ = attention_forward(runtime, module, q[:, :, rows], k, v, None, **how, **kwargs)
    return relative_error(out.transpose(1, 2), want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"position_ids": POSITIONS},
        {"position_ids": POSITIONS[0]},
        {"cu_seq_lens_q": OFFSETS},
        {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS.clone(), "position_ids": torch.arange(SEQ_LEN)},
    ],
)
def test_documents_are_told(kwargs: dict[str, Any], causal: bool, seed: int) -> None:
    assert error_of(causal=causal, **kwargs) <= 2e-6


def test_documents_over_a_cache(seed: int) -> None:
    """The last rows of each document over all keys."""
    rows = torch.cat([torch.arange(end - count, end) for end, count in ((5, 2), (14, 9), (15, 0), (30, 1))])
    offsets = torch.tensor([0, 2, 11, 11, 12], dtype=torch.int32)
    assert error_of(rows, cu_seq_lens_q=offsets, cu_seq_lens_k=OFFSETS) <= 2e-6


def test_positions_of_one_document_cost_no_tensor(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Runtime.attend_checked
    monkeypatch.setattr(Runtime, "attend_checked", lambda self, *x, **y: seen.append(x[4]) or real(self, *x, **y))
    error_of(position_ids=torch.arange(SEQ_LEN)[None])
    error_of(torch.tensor([29]), position_ids=torch.tensor([[29]]))
    assert [mask.lo for mask in seen] == [None, None]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"position_ids": POSITIONS[:, :7]}, r"position_ids: shape \(1, 7\) .* expected \(1, 30\)"),
        ({"position_ids": POSITIONS.expand(3, 1, -1)}, r"position_ids: shape \(3, 1, 30\)"),
        ({"rows": torch.tensor([29]), "position_ids": torch.tensor([[14]])}, "position_ids: for 1 rows over 30"),
        ({"rows": torch.tensor([9, 29]), "position_ids": torch.tensor([[4, 14]])}, "position_ids: for 2 rows"),
        ({"cu_seq_lens_q": OFFSETS[:-1]}, "cu_seq_lens_q, .* ends at 15, expected seq_len 30"),
        ({"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS[[0, 1, 4]]}, "cu_seq_lens_q: .* same documents"),
        ({"cu_seq_lens_q": OFFSETS, "batch": 2}, "cu_seq_lens_q: .* 2 batch rows"),
    ],
)
def test_what_can_not_be_read_is_refused(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        error_of(**kwargs)
