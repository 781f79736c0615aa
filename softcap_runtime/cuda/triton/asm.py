"""PTX for the pointwise work between the matrix products, four elements at a time, as text for Triton.

A Hopper multiprocessor retires 16 special-function instructions (ex2, rcp) a cycle against 128 fused multiply-adds.
Softcapped weights in their plain form need three of them an element, more cycles than both matrix products take
at head_dim 128. So one reciprocal serves four elements: ``1 / (abcd)`` times the products of the others. The
exponent is clamped to 30 for it, where tanh is 1 to the last bit of float32, so that ``(2**30 + 1)**4`` stays finite.
NaN passes the clamp, and makes NaN of the other three.

Tried and dropped (H100, head_dim 128, 2026-11-24): a quarter to a half of the ``2**x`` by multiply-adds (Cody and
Waite's reduction, a polynomial of degree 4). 2.47 and 2.65 ms against 2.30 forward: issue slots, not the
special-function unit, were then short.
"""

from __future__ import annotations

from collections.abc import Sequence


def _reciprocals(x: Sequence[str], scaled_by: str | None) -> str:
    """``s``, ``r`` such that 1 / (1 + 2**x) is s * b, s * (a + 1), r * d, r * (c + 1) for the four of x."""
    text = "".join(
        f"min.NaN.ftz.f32 {name}, {one}, 0f41F00000; ex2.approx.ftz.f32 {name}, {name};"
        for name, one in zip("abcd", x, strict=True)
    )
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


def logistic_of(out: Sequence[str], x: Sequence[str]) -> str:
    """``logistic`` with operands of these names."""
    return (
        "{.reg .f32 a, b, c, d, ab, cd, r, s;"
        + _reciprocals(x, None)
        + f"""
        mul.ftz.f32 {out[0]}, s, b;
        fma.rn.ftz.f32 {out[1]}, s, a, s;
        mul.ftz.f32 {out[2]}, r, d;
        fma.rn.ftz.f32 {out[3]}, r, c, r;}}"""
    )


def weights_of(out: Sequence[str], x: Sequence[str], coef: str, bias: str) -> str:
    """``weights`` with operands of these names."""
    ends = "".join(f"ex2.approx.ftz.f32 {one}, z{name};" for one, name in zip(out, "abcd", strict=True))
    return (
        "{.reg .f32 a, b, c, d, ab, cd, r, s, za, zb, zc, zd;"
        + _reciprocals(x, coef)
        + f"""
        add.ftz.f32 a, a, 0f3F800000;
        add.ftz.f32 c, c, 0f3F800000;
        fma.rn.ftz.f32 za, s, b, {bias};
        fma.rn.ftz.f32 zb, s, a, {bias};
        fma.rn.ftz.f32 zc, r, d, {bias};
        fma.rn.ftz.f32 zd, r, c, {bias};
        {ends}}}"""
    )


def logistic() -> str:
    """Four of ``1 / (1 + 2**x)``: outputs $0-$3, x in $4-$7."""
    return logistic_of(["$0", "$1", "$2", "$3"], ["$4", "$5", "$6", "$7"])


def weights() -> str:
    """Four of ``2**(coef / (1 + 2**x) + bias)``: outputs $0-$3, x in $4-$7.

    coef in $8-$11 and bias in $12-$15 are one value each, repeated.
    """
    return weights_of(["$0", "$1", "$2", "$3"], ["$4", "$5", "$6", "$7"], "$8", "$12")


def tanh_weights() -> str:
    """Four of ``2**(coef * tanh(x) + bias)`` by ``tanh.approx.f32``: operands as those of ``weights``."""
    text = "{.reg .f32 a, b, c, d;"
    for i, name in enumerate("abcd"):
        text += f"tanh.approx.f32 {name}, ${4 + i}; fma.rn.ftz.f32 {name}, {name}, $8, $12;"
        text += f"ex2.approx.ftz.f32 ${i}, {name};"
    return text + "}"


def kept_numbers() -> str:
    """The numbers of 64 keys: a thread of a warp gets its one of the first 32 in $0, its one of the others in $1.

    $4 and $5 are the address of the first, int32; $6 and $7 how many there are, past which the last one counts: one
    value each, repeated. $2 and $3 are not read.
    """
    text = "{.reg .b32 lane, last, at; .reg .b64 a; mov.u32 lane, %laneid; sub.s32 last, $6, 1;"
    for word in range(2):
        text += f"add.s32 at, lane, {32 * word}; min.s32 at, at, last; mad.wide.s32 a, at, 4, $4;"
        text += f"ld.global.b32 ${word}, [a];"
    return text + "}"


def kept_bits() -> str:
    """Which of ``kept_numbers``' keys are kept, as the two columns of each eight that a thread of a product has.

    Outputs $0 and $1, of the columns whose places among the eight are $4 and $5: bit 8 i + w is of key 32 w + 8 i plus
    that place. All threads of a warp take part, with their numbers in $2 and $3.
    """
    text = "{.reg .pred p; .reg .b32 word, t;"
    for w in range(2):
        text += f"setp.ne.s32 p, ${2 + w}, 0; vote.sync.ballot.b32 word, p, 0xffffffff;"
        for output, place in ((0, 4), (1, 5)):
            text += f"shr.b32 t, word, ${place}; and.b32 t, t, 0x01010101;"
            text += f"shl.b32 t, t, 1; or.b32 ${output}, ${output}, t;" if w else f"mov.b32 ${output}, t;"
    return text + "}"
