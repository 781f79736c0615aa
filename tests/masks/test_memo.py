"""The bounded memory of masks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from softcap_runtime.masks import MaskMemo, band, block_tables


def held(count: int) -> tuple[Tensor]:
    return (torch.zeros(count, dtype=torch.int32),)


def test_the_oldest_are_evicted() -> None:
    memo = MaskMemo(limit_bytes=1000)
    for key in ("a", "b"):
        memo.get_or_make(key, lambda: held(100))
    first = memo.get_or_make("a", pytest.fail)
    assert (memo.bytes, memo.evictions) == (800, 0)
    memo.get_or_make("c", lambda: held(100))
    assert memo.get_or_make("a", pytest.fail) is first
    made = memo.get_or_make("b", lambda: held(100))
    assert (memo.bytes, memo.evictions) == (800, 2)
    assert memo.get_or_make("b", pytest.fail) is made
    memo.limit_bytes = 0
    memo.get_or_make("d", lambda: held(1))
    assert (memo.bytes, memo.evictions) == (0, 4)


def test_a_view_holds_its_storage() -> None:
    memo = MaskMemo(limit_bytes=10_000)
    (base,) = held(500)
    memo.get_or_make("views", lambda: (base[:1], base[3:4]))
    assert memo.bytes == 2000
    memo.get_or_make("band", lambda: block_tables(band(2**20, 2**20, causal=True, window=None), "cpu"))
    assert memo.bytes == 2000, "larger than the limit"


def test_too_large_is_not_kept() -> None:
    memo = MaskMemo(limit_bytes=100)
    memo.get_or_make("small", lambda: held(10))
    assert memo.get_or_make("large", lambda: held(1000))[0].shape == (1000,)
    assert memo.bytes == 40
    memo.get_or_make("all of it", lambda: held(25))
    assert (memo.bytes, memo.evictions) == (100, 1)


def test_what_make_raises_passes_through_and_is_not_kept() -> None:
    memo = MaskMemo(limit_bytes=100)
    with pytest.raises(ZeroDivisionError):
        memo.get_or_make("key", lambda: 1 // 0)
    assert memo.get_or_make("key", lambda: ()) == ()


def test_sixteen_threads_make_it_once() -> None:
    memo = MaskMemo(limit_bytes=10_000)
    made: list[int] = []
    gate = threading.Barrier(16)
    got: list[tuple[Tensor]] = []

    def make() -> tuple[Tensor]:
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
