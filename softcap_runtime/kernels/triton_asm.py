"""PTX for the pointwise work between the matrix products, four elements at a time, as text for Triton.

A Hopper multiprocessor retires 16 special-function instructions (ex2, rcp) a cycle against 128 fused multiply-adds.
Softcapped weights in their plain form need three of them an element, more cycles than both matrix products take
at head_dim 128. So:

- one reciprocal serves four elements: ``1 / (abcd)`` times the products of the others. The exponent is clamped to
  30 for it, where tanh is 1 to the last bit of float32, so that ``(2**30 + 1)**4`` stays finite;
- some of the ``2**x`` are computed by multiply-adds instead: ``x = n + f`` with ``|f| <= 1/2`` (Cody and Waite's
  reduction, n by the usual addition of ``1.5 * 2**23``), a polynomial of degree 4 for ``2**f`` (relative error
  3e-6, least squares at Chebyshev points), n added to the exponent bits.
"""

from __future__ import annotations

_COEFFICIENTS = ("0f3C1D4AFA", "0f3D65091D", "0f3E7600BD", "0f3F317071", "0f3F800000")


def _exp2_fma(out: str, x: str) -> str:
    """``out = 2**x`` for -126 <= x < 127 by multiply-adds."""
    highest, *rest = _COEFFICIENTS
    horner = f"fma.rn.ftz.f32 p, f, {highest}, {rest[0]};" + "".join(f"fma.rn.ftz.f32 p, f, p, {c};" for c in rest[1:])
    return f"""
        add.ftz.f32 t, {x}, 0f4B400000;
        add.ftz.f32 f, t, 0fCB400000;
        sub.ftz.f32 f, {x}, f;
        {horner}
        mov.b32 n, t; shl.b32 n, n, 23; mov.b32 m, p; add.s32 m, m, n; mov.b32 {out}, m;"""


def _exp2(out: str, x: str) -> str:
    return f"ex2.approx.ftz.f32 {out}, {x};"


def _reciprocals(scaled_by: str | None) -> str:
    """``s``, ``r`` such that 1 / (1 + 2**x) is s * b1, s * (a + 1), r * d1, r * (c + 1) for a, b, c, d's exponents."""
    text = "".join(f"min.ftz.f32 {n}, ${4 + i}, 0f41F00000; {_exp2(n, n)}" for i, n in enumerate("abcd"))
    return (
        text
        + """
        add.ftz.f32 b, b, 0f3F800000;
        add.ftz.f32 d, d, 0f3F800000;
        fma.rn.ftz.f32 ab, a, b, b;
        fma.rn.ftz.f32 cd, c, d, d;
        mul.ftz.f32 r, ab, cd;
        rcp.approx.ftz.f32 r, r;"""
        + (f"mul.ftz.f32 r, r, {scaled_by};" if scaled_by else "")
        + """
        mul.ftz.f32 s, r, cd;
        mul.ftz.f32 r, r, ab;"""
    )


def logistic() -> str:
    """Four of ``1 / (1 + 2**x)``: outputs $0-$3, x in $4-$7."""
    return (
        "{.reg .f32 a, b, c, d, ab, cd, r, s;"
        + _reciprocals(None)
        + """
        mul.ftz.f32 $0, s, b;
        fma.rn.ftz.f32 $1, s, a, s;
        mul.ftz.f32 $2, r, d;
        fma.rn.ftz.f32 $3, r, c, r;}"""
    )


def weights(by_fma: int) -> str:
    """Four of ``2**(coef / (1 + 2**x) + bias)``, ``by_fma`` of them without the special-function unit.

    Outputs $0-$3, x in $4-$7, coef in $8-$11, bias in $12-$15 (one value each, repeated). The exponent must lie in
    -126...127, which a fixed reference ensures.
    """
    ends = "".join(
        (_exp2_fma if i < by_fma else _exp2)(f"${i}", name) for i, name in enumerate(("za", "zb", "zc", "zd"))
    )
    return (
        "{.reg .f32 a, b, c, d, ab, cd, r, s, za, zb, zc, zd, t, f, p; .reg .b32 n, m;"
        + _reciprocals("$8")
        + f"""
        add.ftz.f32 a, a, 0f3F800000;
        add.ftz.f32 c, c, 0f3F800000;
        fma.rn.ftz.f32 za, s, b, $12;
        fma.rn.ftz.f32 zb, s, a, $12;
        fma.rn.ftz.f32 zc, r, d, $12;
        fma.rn.ftz.f32 zd, r, c, $12;
        {ends}}}"""
    )


def exp2_mixed(by_fma: int) -> str:
    """Four of ``2**x``, ``by_fma`` of them by multiply-adds: outputs $0-$3, x in $4-$7; at least 2**-126 there."""
    text = "{.reg .f32 t, f, p, x; .reg .b32 n, m;"
    for i in range(4):
        if i < by_fma:
            text += f"max.ftz.f32 x, ${4 + i}, 0fC2FC0000;" + _exp2_fma(f"${i}", "x")
        else:
            text += _exp2(f"${i}", f"${4 + i}")
    return text + "}"
