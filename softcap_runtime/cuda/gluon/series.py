"""The softcap by a polynomial where logits are small against the cap, as PTX text for Gluon.

``tanh(t) = t * sum_i FACTORS[i] * (t**2 - LIMIT)**i`` for ``t**2 < LIMIT``, with an error of at most 2.9e-7. The
factors are the best for four terms: they minimise the largest error (a linear program over 3,000 points). The sum is
around LIMIT, not around 0, so that the sign of ``t**2 - LIMIT``, which it needs anyway, also says whether it holds. A
warp computes ELEMENTS of each thread together. If one of all these is past the limit, or NaN, whose sign is never set
here, the warp computes all of them by the formulas of ``triton.asm``.

Why it is faster: four multiply-adds replace 1.25 special functions, and a Hopper multiprocessor retires eight
multiply-adds in the time of one of those. The branch helps too: ptxas moves waits for a product up, to before the
weights are computed, but not across a branch.

Measured on one H200, bf16, B2 Hq32 Hkv16 S8192, causal, forward, 2026-12-01: 2.02 ms (2.33 without it) at head_dim 128,
1.47 (1.87) at 64, and 2.53 (2.33) where every warp has logits past the limit. Tried at head_dim 128: 8 elements took
2.19 ms; 32 were as fast as 16 but spilled registers; a fifth term, for logits up to 0.7 of the cap, took 2.34. Triton's
own kernels lose by it: 2.56 ms (2.47).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softcap_runtime.cuda.triton.asm import logistic_of, weights_of

LIMIT = 0.3025
FACTORS = (0.910036228681567, -0.2654507460885665, 0.09300922144986046, -0.04151866842727814)
# Elements of a thread that are computed together.
ELEMENTS = 16


def logistic() -> tuple[str, str]:
    """PTX of ``1 / (1 + 2**(inner * x))`` for ELEMENTS elements, and its constraints.

    Operands, ELEMENTS of each: outputs; x; minus the limit of ``x**2``; factors, by which the sum times x is the output
    minus 0.5; inner. All but outputs and x are one value, repeated.
    """
    out, x, limit, *factors, inner = _vectors(8)

    def near(i: int, total: str) -> str:
        return f"fma.rn.ftz.f32 {out[i]}, {total}, {x[i]}, 0f3F000000;"

    def far(i: int, y: Sequence[str]) -> str:
        return logistic_of(out[i : i + 4], y)

    return _either(x, limit[0], [one[0] for one in factors], near, inner[0], far), _constraints(7)


def weights() -> tuple[str, str]:
    """PTX of ``2**(coef / (1 + 2**(inner * x)) + bias)`` for ELEMENTS elements, and its constraints.

    Operands, ELEMENTS of each: outputs; x; minus the limit of ``x**2``; factors, by which the sum times x is the
    exponent minus ``bias + coef / 2``; that; inner; coef; bias. All but outputs and x are one value, repeated.
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
    """``near(i, sum)`` for each x[i], if ``x**2 + limit < 0`` for all x in all threads of the warp; else ``far(i, y)``
    for each four from x[i] on. ``sum`` is ``sum_j factors[j] * (x[i]**2 + limit)**j``, y the four ``inner * x``."""
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
