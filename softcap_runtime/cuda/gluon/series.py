"""The softcap without its exponential and reciprocal, where the logit is small against the cap: as PTX.

``tanh(t) = t * sum_i FACTORS[i] * (t**2 - LIMIT)**i`` for ``t**2 < LIMIT``. Of all sums of four terms it is the one
whose largest error is smallest, 2.9e-7 (a linear program over 3,000 points). It is a sum around LIMIT and not around 0,
so that the sign of ``t**2 - LIMIT`` also says whether it holds. Where it does not hold for some of the elements that
the threads of a warp compute together, all of them are computed as in ``triton.asm``; so is NaN, whose sign is never
set here.

Four multiply-adds an element take the place of 1.25 special functions, of which a Hopper multiprocessor has an eighth
as many a cycle. And ptxas moves no wait for a product across the branch; without it, it waited before the weights were
computed. One H200, bf16, B2 Hq32 Hkv16 S8192 causal, forward: head_dim 128 2.02 ms in place of 2.33, head_dim 64 1.47
in place of 1.87; where no warp can take it 2.53 in place of 2.33 (2026-12-01). With 8 elements together 2.19; with 32
no faster than with 16, and registers are spilled; with a fifth term, for logits up to 0.7 of the cap, 2.34. Triton's
kernels lose by it: 2.56 in place of 2.47.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softcap_runtime.cuda.triton.asm import logistic_of, weights_of

LIMIT = 0.3025
FACTORS = (0.910036228681567, -0.2654507460885665, 0.09300922144986046, -0.04151866842727814)
# Elements of a thread that are computed together.
ELEMENTS = 16


def logistic() -> tuple[str, str]:
    """ELEMENTS of ``1 / (1 + 2**(inner * x))``, and the constraints.

    Operands, a vector of ELEMENTS each: outputs; x; minus the limit of ``x**2``; the factors by which the sum gives a
    half less the output; inner. All but outputs and x are one value, repeated.
    """
    out, x, limit, *factors, inner = _vectors(8)

    def near(i: int, total: str) -> str:
        return f"fma.rn.ftz.f32 {out[i]}, {total}, {x[i]}, 0f3F000000;"

    def far(i: int, y: Sequence[str]) -> str:
        return logistic_of(out[i : i + 4], y)

    return _either(x, limit[0], [one[0] for one in factors], near, inner[0], far), _constraints(7)


def weights() -> tuple[str, str]:
    """ELEMENTS of ``2**(coef / (1 + 2**(inner * x)) + bias)``, and the constraints.

    Operands as those of ``logistic``, with ``bias + coef / 2`` before inner, coef and bias after it.
    """
    out, x, limit, *factors, middle, inner, coef, bias = _vectors(11)

    def near(i: int, total: str) -> str:
        return f"fma.rn.ftz.f32 t{i}, {total}, {x[i]}, {middle[0]}; ex2.approx.ftz.f32 {out[i]}, t{i};"

    def far(i: int, y: Sequence[str]) -> str:
        return weights_of(out[i : i + 4], y, coef[0], bias[0])

    return _either(x, limit[0], [one[0] for one in factors], near, inner[0], far), _constraints(10)


def _either(
    x: Sequence[str],
    limit: str,
    factors: Sequence[str],
    near: Callable[[int, str], str],
    inner: str,
    far: Callable[[int, Sequence[str]], str],
) -> str:
    """``near`` of each x, with ``sum_i factors[i] * (x**2 + limit)**i``, if ``x**2 + limit`` is below 0 for all of them
    in all threads of the warp; else ``far`` of each four ``inner * x``."""
    text = f"{{.reg .pred beyond; .reg .b32 signs; .reg .f32 d<{ELEMENTS}>; .reg .f32 t<{ELEMENTS}>;"
    for i, one in enumerate(x):
        text += f"fma.rn.ftz.f32 d{i}, {one}, {one}, {limit};"
    text += "and.b32 signs, d0, d1;"
    for i in range(2, ELEMENTS):
        text += f"and.b32 signs, signs, d{i};"
    text += "setp.ge.s32 beyond, signs, 0; vote.sync.any.pred beyond, beyond, 0xffffffff; @beyond bra FAR;"
    *lower, last = factors
    for i in range(ELEMENTS):
        text += f"mov.f32 t{i}, {last};"
    for factor in reversed(lower):
        for i in range(ELEMENTS):
            text += f"fma.rn.ftz.f32 t{i}, t{i}, d{i}, {factor};"
    for i in range(ELEMENTS):
        text += near(i, f"t{i}")
    text += "bra DONE; FAR: {.reg .f32 y<4>;"
    for i in range(0, ELEMENTS, 4):
        text += "".join(f"mul.ftz.f32 y{j}, {x[i + j]}, {inner};" for j in range(4))
        text += far(i, [f"y{j}" for j in range(4)])
    return text + "} DONE: }"


def _vectors(count: int) -> list[list[str]]:
    """The operands of so many vectors, outputs first."""
    return [[f"${i * ELEMENTS + j}" for j in range(ELEMENTS)] for i in range(count)]


def _constraints(inputs: int) -> str:
    return ",".join(["=&f"] * ELEMENTS + ["f"] * inputs * ELEMENTS)
