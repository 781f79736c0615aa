"""The CPU library against the specification in float64: every build, dtype and arithmetic, every kind of problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from cpu.kernels import NARROW, NATIVE, Call, Libraries, calls, check, exact

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def check_each(libraries: Libraries, call: Call, dtype: torch.dtype) -> None:
    """By all kernels of the dtype: what is exact takes longer than any of them."""
    known = exact(call, dtype)
    for kernel in (*NATIVE, *NARROW):
        if kernel.dtype == dtype:
            print(f"kernel: {kernel}")
            check(libraries(kernel), call, dtype, known)


@DTYPES
@settings(max_examples=30, deadline=None)
@given(call=calls())
def test_any_problem(libraries: Libraries, dtype: torch.dtype, call: Call) -> None:
    check_each(libraries, call, dtype)


@DTYPES
@settings(max_examples=25, deadline=None)
@given(call=calls(max_len=3000, few_rows=True))
def test_few_rows(libraries: Libraries, dtype: torch.dtype, call: Call) -> None:
    check_each(libraries, call, dtype)


@DTYPES
@settings(max_examples=8, deadline=None)
@given(call=calls(max_len=1200))
def test_many_chunks(libraries: Libraries, dtype: torch.dtype, call: Call) -> None:
    call = call._replace(
        sizes=call.sizes._replace(batch=1),
        mask=call.mask if call.mask.lo is None else call.mask._replace(lo=call.mask.lo[:1], hi=call.mask.hi[:1]),
    )
    check_each(libraries, call, dtype)
