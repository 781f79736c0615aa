"""The CPU library against the specification in float64: every build, dtype and arithmetic, every kind of problem."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from cpu.kernels import NARROW, NATIVE, Call, Kernel, Libraries, calls, check

KERNELS = pytest.mark.parametrize("kernel", [*NATIVE, *NARROW], ids=str)


@KERNELS
@settings(max_examples=25, deadline=None)
@given(call=calls())
def test_any_problem(libraries: Libraries, kernel: Kernel, call: Call) -> None:
    check(libraries(kernel), call, kernel.dtype)


@KERNELS
@settings(max_examples=20, deadline=None)
@given(call=calls(max_len=3000, few_rows=True))
def test_few_rows(libraries: Libraries, kernel: Kernel, call: Call) -> None:
    check(libraries(kernel), call, kernel.dtype)


@KERNELS
@settings(max_examples=6, deadline=None)
@given(call=calls(max_len=1200))
def test_many_chunks(libraries: Libraries, kernel: Kernel, call: Call) -> None:
    call = call._replace(
        sizes=call.sizes._replace(batch=1),
        mask=call.mask if call.mask.lo is None else call.mask._replace(lo=call.mask.lo[:1], hi=call.mask.hi[:1]),
    )
    check(libraries(kernel), call, kernel.dtype)
