"""The bounded memory of masks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from softcap_runtime.masks import MaskMemo, band, block_mask, row_intervals


def held(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def test_hits_misses_and_eviction_of_the_oldest() -> None:
    memo = MaskMemo(limit_bytes=1000)
    for key in ("a", "b"):
        memo.get_or_make(key, lambda: held(100))
    first = memo.get_or_make("a", pytest.fail)
    assert (memo.hits, memo.misses, memo.bytes, len(memo)) == (1, 2, 800, 2)
    memo.get_or_make("c", lambda: held(100))
    assert memo.get_or_make("a", pytest.fail) is first
    made = memo.get_or_make("b", lambda: held(100))
    assert (memo.hits, memo.misses, memo.bytes, memo.evictions) == (2, 4, 800, 2)
    assert memo.get_or_make("b", pytest.fail) is made
    memo.clear()
    assert (memo.bytes, len(memo), memo.hits) == (0, 0, 3)


def test_a_view_holds_its_storage_and_sharing_is_free() -> None:
    memo = MaskMemo(limit_bytes=10_000)
    base = held(500)
    memo.get_or_make("views", lambda: (base[:1], [base[3:4]], {"x": base}))
    assert memo.bytes == 2000
    memo.get_or_make("again", lambda: base[5:])
    assert memo.bytes == 2000
    memo.get_or_make("large", lambda: held(2000))
    assert memo.bytes == 10_000
    memo.get_or_make("one more", lambda: held(1))
    # The oldest went first, and gave no bytes back while "again" shared its storage.
    assert memo.bytes == 8004
    assert len(memo) == 2


def test_too_large_is_not_kept() -> None:
    memo = MaskMemo(limit_bytes=100)
    memo.get_or_make("small", lambda: held(10))
    assert memo.get_or_make("large", lambda: held(1000)).shape == (1000,)
    assert (memo.bytes, len(memo)) == (40, 1)
    memo.get_or_make("all of it", lambda: held(25))
    assert (memo.bytes, len(memo)) == (100, 1)


def test_block_masks_are_weighed_with_what_their_mask_mod_holds() -> None:
    pytest.importorskip("torch.nn.attention.flex_attention")
    memo = MaskMemo(limit_bytes=2**20)
    small = memo.get_or_make(1, lambda: block_mask(band(128, 128, causal=True, window=None), "cpu"))
    assert 0 < memo.bytes < 1000
    assert small.shape == (1, 1, 128, 128)
    ids = torch.zeros(1, 4096, dtype=torch.int64)
    memo.get_or_make(
        2, lambda: block_mask(row_intervals(4096, 4096, causal=True, window=None, document_ids=ids), "cpu")
    )
    assert memo.bytes > 2 * 4 * 4096


def test_what_make_raises_passes_through_and_is_not_kept() -> None:
    memo = MaskMemo(limit_bytes=100)
    with pytest.raises(ZeroDivisionError):
        memo.get_or_make("key", lambda: 1 // 0)
    assert memo.get_or_make("key", lambda: 7) == 7


def test_sixteen_threads_make_it_once() -> None:
    memo = MaskMemo(limit_bytes=10_000)
    made: list[int] = []
    gate = threading.Barrier(16)
    got: list[Tensor] = []

    def make() -> Tensor:
        made.append(1)
        return held(10)

    def work() -> None:
        gate.wait()
        got.append(memo.get_or_make("key", make))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(value is got[0] for value in got)
    assert (memo.hits, memo.misses) == (15, 1)
