"""Scratch memory that a thread keeps from call to call: whose it is, and what may be done with it."""

from __future__ import annotations

import threading

import torch
from softcap_runtime.kernels.workspace import KEPT_BYTES, Workspace


def pointer(name: str = "x", size: int = 64) -> int:
    with Workspace() as space:
        return space.empty(name, torch.float32, size).data_ptr()


def test_the_next_call_of_a_thread_finds_the_small_ones() -> None:
    assert pointer() == pointer()
    assert pointer(size=32) == pointer()  # the larger one serves the smaller request


def test_a_call_within_a_call_has_its_own() -> None:
    pointer()
    with Workspace() as outer, Workspace() as inner:
        mine = outer.empty("x", torch.float32, 64).fill_(1.0)
        inner.empty("x", torch.float32, 64).fill_(2.0)
        assert bool((mine == 1.0).all())


def test_threads_share_nothing() -> None:
    with Workspace() as space:
        mine = space.empty("x", torch.float32, 64).fill_(1.0)
        other = threading.Thread(target=lambda: pointer())
        other.start()
        other.join()
        found: list[int] = []
        second = threading.Thread(target=lambda: found.append(pointer()))
        second.start()
        second.join()
        assert found[0] != mine.data_ptr()


def test_what_is_large_is_given_back() -> None:
    with Workspace() as space:
        space.empty("large", torch.uint8, KEPT_BYTES + 1)
        space.empty("small", torch.uint8, KEPT_BYTES)
    with Workspace() as space:
        assert {name for name, _ in space._buffers} >= {"small"}
        assert "large" not in {name for name, _ in space._buffers}


def test_made_in_inference_mode_it_serves_outside() -> None:
    with torch.inference_mode(), Workspace() as space:
        space.empty("mode", torch.float32, 8)
    with Workspace() as space:
        kept = space.empty("mode", torch.float32, 8)
        assert not kept.is_inference()
        kept.add_(torch.ones(8, requires_grad=True).detach())


def test_it_follows_none_of_the_defaults_of_the_process() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), Workspace() as space:
            made = space.empty("defaults", torch.float32, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (made.dtype, made.device.type) == (torch.float32, "cpu")


def test_dtypes_of_one_name_are_two_tensors() -> None:
    with Workspace() as space:
        a = space.empty("x", torch.float32, 4)
        b = space.empty("x", torch.bfloat16, 4)
        assert a.data_ptr() != b.data_ptr()
        assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)
