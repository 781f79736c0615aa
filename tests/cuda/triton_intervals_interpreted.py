"""As ``triton_interpreted``, for the kernel that makes row intervals: prints how many masks it made."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import stand_in
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton_interpreted import LIMITS, poisoned

from softcap_runtime.cuda import intervals
from softcap_runtime.cuda.cubin import CubinSpec
from softcap_runtime.cuda.parameters import Number, Parameter
from softcap_runtime.cuda.triton.build import kernel_of
from softcap_runtime.masks import check_mask_arguments, row_intervals
from softcap_runtime.masks.intervals import with_kept

CPU = torch.device("cpu")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Kernels:
    """Where the calls find the kernel, which Triton's interpreter runs, assertions and all."""

    def function(self, spec: CubinSpec) -> Kernels:
        self.kernel, self.constants = kernel_of(spec), dict(spec.constants)
        return self

    def bind(
        self, grid: tuple[int, int, int], parameters: Sequence[Parameter], numbers: Sequence[Number]
    ) -> Callable[..., None]:
        return lambda *tensors: self.kernel[grid](*tensors, *numbers, **self.constants)


def drawn(batch: int, keys: int) -> dict[str, Tensor]:
    """A padding mask, document ids or both, of any dtype, as a part of longer rows or one row for all."""

    def rows() -> tuple[int, int]:
        return random.choice([1, batch]), keys + random.choice([0, 3])

    shown = torch.rand(rows()) < random.choice([0.0, 0.5, 0.9, 1.0])
    ids = (torch.rand(rows()) < 0.2).cumsum(1) - random.choice([0, 3, 120])
    dtype = random.choice(INTEGERS)
    if dtype == torch.uint8:  # those of 128 and more have a sign as int8
        ids = ids.clamp(min=0) + random.choice([0, 126])
    ids = ids.to(dtype)
    if random.random() < 0.2:
        ids = ids + torch.iinfo(dtype).max - ids.max()
    made = {"attention_mask": shown.to(random.choice([torch.bool, *INTEGERS]))[:, :keys], "document_ids": ids[:, :keys]}
    for name in random.choice([[], list(made)[:1], list(made)[1:]]):
        del made[name]
    return made


def check(block: int) -> None:
    """A mask of random sizes, and the same with one wrong number."""
    intervals.BLOCK = block
    batch, keys, causal = random.randint(1, 3), random.randint(1, 70), random.random() < 0.7
    masks, window = drawn(batch, keys), random.choice([None, random.randint(1, 80)])
    more = 0 if causal or "document_ids" in masks else 9
    rows = random.choice([keys, random.randint(1, keys + more)])
    find = intervals.bind_intervals(CPU, Kernels())  # type: ignore[arg-type]
    mine = find(batch, rows, keys, causal, window, masks.get("attention_mask"), masks.get("document_ids"))
    assert mine is not None
    want = row_intervals(rows, keys, causal=causal, window=window, **masks)
    if "attention_mask" in masks and want.kept is None:
        want = with_kept(want, masks["attention_mask"])
    assert len(mine) == len(want.vectors)
    for one, other in zip(mine, want.vectors, strict=True):
        assert torch.equal(one, other), (masks, causal, window, rows)

    name = random.choice(list(masks))
    wrong = masks[name].clone()
    if wrong.dtype == torch.bool or (name == "document_ids" and keys == 1):
        return
    place = random.randrange(keys)
    wrong[-1, place] = 2
    if name == "document_ids":
        place = max(place, 1)
        wrong[-1] = 5
        wrong[-1, place:] = 4
    masks[name] = wrong
    message = ""
    for raising in (
        lambda: find(batch, rows, keys, causal, window, masks.get("attention_mask"), masks.get("document_ids")),
        lambda: check_mask_arguments(rows, keys, batch, CPU, causal=causal, holes=True, **masks),
    ):
        try:
            raising()
        except (AssertionError, ValueError, interpreter.InterpreterError) as error:
            message = str(error)
        assert name in message, (raising, masks)
        message = ""


if __name__ == "__main__":
    stand_in.tell_of(LIMITS)
    torch.set_num_threads(1)
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    random.seed(seed)
    torch.manual_seed(seed)
    # ``device_assert`` is left out of kernels otherwise.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    empty: Any = torch.empty
    torch.empty = poisoned(empty)
    for number in range(count):
        check(16 if number % 2 else 64)
    print(count)
