"""Kernel options as a pure function of the device's limits; no GPU needed."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from softcap_runtime.cli import tables as cli_tables
from softcap_runtime.cuda.options import (
    PADDED_ROWS,
    BlockOptions,
    DeviceLimits,
    choose,
    directions,
    padded,
    shared_bytes,
    split_count,
    splits_backward,
    table,
    variants,
)
from softcap_runtime.cuda.parameters import spec_of
from softcap_runtime.cuda.triton import launch as triton_launch
from softcap_runtime.report import gpus as gpu_info
from softcap_runtime.store import Key

CARDS = {
    "100 KB": DeviceLimits(99 * 1024, (8, 9), 128),
    "164 KB": DeviceLimits(163 * 1024, (8, 0), 108),
    "228 KB": DeviceLimits(227 * 1024, (9, 0), 132),
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_block_fits_every_card(card: str, dtype: torch.dtype, head_dim: int) -> None:
    limits = CARDS[card]
    directions = ["forward", "dq", "decode", *(("dk", "dv") if splits_backward(head_dim) else ("dkdv",))]
    for direction in directions:
        options = choose(limits, dtype, head_dim, direction)  # type: ignore[arg-type]
        used = shared_bytes(options, dtype, head_dim, direction)  # type: ignore[arg-type]
        assert used <= limits.shared_bytes, (direction, options, used)
        assert padded(options.block_m) == options.block_m >= 16
        assert padded(options.block_n) == options.block_n >= 16


def test_a_larger_card_gets_a_larger_block() -> None:
    small = choose(CARDS["100 KB"], torch.bfloat16, 256, "forward")
    large = choose(CARDS["228 KB"], torch.bfloat16, 256, "forward")
    assert large.block_m * large.block_n > small.block_m * small.block_n


def test_decoding_splits_the_keys_until_the_card_is_full() -> None:
    limits = CARDS["228 KB"]
    assert split_count(limits, programs=1000, keys=8192, block_n=64) == 1
    assert split_count(limits, programs=8, keys=8192, block_n=64) > 8
    assert split_count(limits, programs=8, keys=64, block_n=64) == 1


@pytest.mark.parametrize("card", CARDS)
def test_inspect_shows_the_options_of_every_kernel(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = CARDS[card]
    best = variants(limits, torch.float16, 128, "dq")[-1]

    def measured(*kernel: object) -> BlockOptions | None:
        return best if kernel == (torch.float16, 128, "dq") else None

    found = gpu_info.describe("cuda:0", "a card", limits, softcap_approx=True, measured=measured)
    assert len(found.kernels) == len(table(limits)) == 3 * (3 * 4 + 5)
    assert len({(one.kernel, one.dtype, one.head_dim) for one in found.kernels}) == len(found.kernels)
    for one in found.kernels:
        dtype = getattr(torch, one.dtype)
        options = choose(limits, dtype, one.head_dim, one.kernel)  # type: ignore[arg-type]
        assert one.tuned == ((one.dtype, one.head_dim, one.kernel) == ("float16", 128, "dq"))
        assert (one.block_m, one.block_n, one.warps, one.stages) == (best if one.tuned else options)
        assert one.shared_bytes <= found.shared_bytes == limits.shared_bytes
    out = io.StringIO()
    cli_tables._show_gpu(Console(file=out, width=160), found)
    text = out.getvalue()
    assert "cuda:0 a card" in text
    assert text.count("a measurement") == 1
    assert "approximate tanh" in " ".join(text.split())
    first = found.kernels[0]
    assert f"{first.block_m} x {first.block_n}" in text


def test_the_options_are_part_of_a_kernels_key() -> None:
    """Other options, or another form of the softcap, are another kernel; the same are the same."""
    options = choose(CARDS["228 KB"], torch.bfloat16, 128, "forward")
    different = [options, *(options._replace(**{name: 2 * getattr(options, name)}) for name in options._fields)]

    def key(one: BlockOptions, form: int) -> Key:
        fixed = triton_launch.constants(128, torch.bfloat16, one, triton_launch.Layout(False, 1))
        return Key(
            spec_of(
                "forward_kernel",
                [],
                [],
                {"FORM": form, **fixed},
                capability=(9, 0),
                dtype=torch.bfloat16,
                aligned=False,
                warps=one.warps,
                stages=one.stages,
            ).fields(),
            {},
        )

    keys = {key(one, form) for one in different for form in (1, 2) for _ in range(2)}
    assert len(keys) == 2 * len(different)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_what_is_worth_a_measurement_can_run(card: str, dtype: torch.dtype, head_dim: int) -> None:
    limits = CARDS[card]
    for direction in directions(head_dim, train=True):
        found = variants(limits, dtype, head_dim, direction)
        assert found[0] == choose(limits, dtype, head_dim, direction)
        assert len(set(found)) == len(found) > 1
        for one in found:
            assert shared_bytes(one, dtype, head_dim, direction) <= limits.shared_bytes
            assert padded(one.block_m) == one.block_m <= PADDED_ROWS
            assert padded(one.block_n) == one.block_n >= 16
            assert one.warps in (4, 8)
            assert one.stages >= 1
            assert direction != "decode" or one.block_m == found[0].block_m


def test_inspect_leaves_out_what_a_small_card_cannot_run() -> None:
    small = DeviceLimits(64 * 1024, (7, 5), 40)
    found = gpu_info.describe("cuda:0", "", small, False, lambda *kernel: None)
    shown = {(one.kernel, one.dtype, one.head_dim) for one in found.kernels}
    assert ("forward", "bfloat16", 64) in shown
    assert len(shown) < len(table(CARDS["100 KB"]))
