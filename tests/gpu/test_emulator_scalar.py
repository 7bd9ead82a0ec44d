"""Instructions of single threads against results computed independently (Python integers and fractions)."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_text import evaluate

RNG = np.random.default_rng(0)
SPECIAL = """0 -0 1 -1 inf -inf nan 65504 65519.99 65520 65536 3.4e38 3.3895e38 3.396e38 1e-45"""
TIES = [1 + a * 2**-b for a, b in ((1, 8), (1, 9), (3, 9), (1, 11), (3, 11), (3, 12), (513, 20), (3, 11))]
SMALL = [2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 3 * 2.0**-25, -(2.0**-24) * 1.5, 2.0**-126, 2.0**-130]
FLOATS = np.array([*map(float, SPECIAL.split()), *TIES, *SMALL], np.float32)
FLOATS = np.concatenate([FLOATS, RNG.integers(0, 2**32, 200, np.uint32).view(np.float32)])


def nearest(x: float, bits: int, lowest: int, largest: Fraction, away: bool = False) -> Fraction | float:
    """x rounded to `bits` significant bits, exponents from `lowest` (subnormals below), overflow to infinity."""
    if math.isnan(x) or math.isinf(x):
        return x
    exact = Fraction(x)
    if exact == 0:
        return x
    exponent = max(math.floor(math.log2(abs(exact))), lowest)
    if abs(exact) < Fraction(2) ** exponent and exponent > lowest:
        exponent -= 1
    unit = Fraction(2) ** (exponent - bits + 1)
    scaled = abs(exact) / unit
    whole, rest = divmod(scaled, 1)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and (away or whole % 2 == 1))
    result = (whole + up) * unit
    return math.copysign(math.inf, x) if result > largest else math.copysign(1, x) * result


FORMATS = {
    "f16": (11, -14, Fraction(65504), False),
    "bf16": (8, -126, Fraction(2) ** 127 * (2 - Fraction(1, 128)), False),
    "tf32": (11, -126, Fraction(2) ** 127 * (2 - Fraction(1, 1024)), True),
}


@pytest.mark.parametrize("to", FORMATS)
def test_conversions_round_as_ptx_says(to: str) -> None:
    rounding = "rna" if to == "tf32" else "rn"
    register, dtype = ("r", np.uint32) if to == "tf32" else ("h", np.uint16)
    (bits,) = evaluate(f"cvt.{rounding}.{to}.f32 %{register}30, %r10;", [FLOATS], [dtype])
    values = {
        "f16": lambda b: b.view(np.float16).astype(np.float64),
        "bf16": lambda b: (b.astype(np.uint32) << 16).view(np.float32).astype(np.float64),
        "tf32": lambda b: b.view(np.float32).astype(np.float64),
    }[to](bits)
    for x, got, pattern in zip(FLOATS, values, bits, strict=True):
        want = nearest(float(x), *FORMATS[to])
        if math.isnan(want):
            assert pattern == (0x7FFFFFFF if to == "tf32" else 0x7FFF)
        else:
            assert float(want) == got and math.copysign(1, want) == math.copysign(1, got), float(x)
    if to == "tf32":
        assert not (bits[~np.isnan(FLOATS)] & 0x1FFF).any()


def test_packed_conversion_puts_the_first_source_on_top() -> None:
    x, y = np.float32([1, 3]), np.float32([2, 65520])
    (f16,) = evaluate("cvt.rn.f16x2.f32 %r30, %r10, %r11;", [x, y], [np.uint32])
    (bf16,) = evaluate("cvt.rn.bf16x2.f32 %r30, %r10, %r11;", [x, y], [np.uint32])
    assert [hex(v) for v in f16] == ["0x3c004000", "0x42007c00"]
    assert [hex(v) for v in bf16] == ["0x3f804000", "0x40404780"]


def test_widening_conversions_are_exact() -> None:
    halves = np.arange(0, 1024, 1, np.uint16) * 64 + 3
    (wide,) = evaluate("cvt.f32.f16 %r30, %h10;", [halves], [np.float32])
    np.testing.assert_array_equal(wide, halves.view(np.float16).astype(np.float32))
    (wide,) = evaluate("cvt.f32.bf16 %r30, %h10;", [halves], [np.float32])
    np.testing.assert_array_equal(wide.view(np.uint32), halves.astype(np.uint32) << 16)
    (signed,) = evaluate("cvt.s32.s16 %r30, %h10;", [halves], [np.int32])
    np.testing.assert_array_equal(signed, halves.view(np.int16).astype(np.int32))


@pytest.mark.parametrize(
    "mode, function", [("rzi", math.trunc), ("rni", round), ("rmi", math.floor), ("rpi", math.ceil)]
)
@pytest.mark.parametrize(
    "to, low, high", [("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1), ("s64", -(2**63), 2**63 - 1)]
)
def test_float_to_integer(mode: str, function, to: str, low: int, high: int) -> None:  # type: ignore[no-untyped-def]
    x = np.concatenate(
        [FLOATS, np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 2147483520, 4294967040, 2**31, -(2**31), 2**63, -(2**63)])]
    )
    register, dtype = ("d", np.int64) if to == "s64" else ("r", np.uint32 if to == "u32" else np.int32)
    (got,) = evaluate(f"cvt.{mode}.{to}.f32 %{register}30, %r10;", [x], [dtype])
    for value, result in zip(x.tolist(), got.tolist(), strict=True):
        want = 0 if math.isnan(value) else (low if value < 0 else high) if math.isinf(value) else function(value)
        assert result == min(max(want, low), high), value


def test_float_arithmetic_is_correctly_rounded() -> None:
    x, y, z = (
        RNG.standard_normal(512).astype(np.float32) * np.float32(2.0) ** RNG.integers(-20, 20, 512) for _ in range(3)
    )
    x, y, z = (v.astype(np.float32) for v in (x, y, z))
    largest = Fraction(2) ** 127 * (2 - Fraction(1, 2**23))

    def rounded(
        exact: Fraction,
    ) -> np.float32:  # to float32; float() of a Fraction is exact enough only through `nearest`
        exponent = math.floor(math.log2(abs(exact))) if exact else 0
        unit = Fraction(2) ** (exponent - 23)
        assert abs(exact) < largest
        return np.float32(float(round(exact / unit) * unit))

    product, total, fused = (
        evaluate(f"{op} %r30, {args};", [x, y, z], [np.float32])[0]
        for op, args in (("mul.f32", "%r10, %r11"), ("add.f32", "%r10, %r11"), ("fma.rn.f32", "%r10, %r11, %r12"))
    )
    for i in range(512):
        a, b, c = (Fraction(float(v[i])) for v in (x, y, z))
        assert product[i] == rounded(a * b) and total[i] == rounded(a + b) and fused[i] == rounded(a * b + c)


def test_packed_half_arithmetic() -> None:
    x, y, z = (RNG.standard_normal(128).astype(np.float16) for _ in range(3))
    packed = [v.view(np.uint32) for v in (x, y, z)]
    (fused,) = evaluate("fma.rn.f16x2 %r30, %r10, %r11, %r12;", packed, [np.uint32])
    want = np.float16([np.float64(a) * np.float64(b) + np.float64(c) for a, b, c in zip(x, y, z, strict=True)])
    np.testing.assert_array_equal(fused.view(np.float16), want)


def test_minimum_and_comparison_with_nan() -> None:
    x, y = np.float32([1, np.nan, np.nan, 2]), np.float32([np.nan, 1, np.nan, 1])
    (plain,) = evaluate("min.f32 %r30, %r10, %r11;", [x, y], [np.float32])
    (spread,) = evaluate("min.NaN.f32 %r30, %r10, %r11;", [x, y], [np.float32])
    np.testing.assert_array_equal(plain, np.float32([1, 1, np.nan, 1]))
    np.testing.assert_array_equal(spread, np.float32([np.nan, np.nan, np.nan, 1]))
    for name, nan_result in (("lt", 0), ("ltu", 1), ("ne", 0), ("neu", 1), ("num", 0), ("nan", 1)):
        (got,) = evaluate(f"setp.{name}.f32 %p1, %r10, %r11;\nselp.b32 %r30, 1, 0, %p1;", [x, y], [np.uint32])
        assert got[:3].tolist() == [nan_result] * 3, name


def test_flush_to_zero() -> None:
    x = np.float32([1e-40, -1e-40, 1.5e-38])
    (kept,) = evaluate("mul.f32 %r30, %r10, 0f3F800000;", [x], [np.float32])
    (flushed,) = evaluate("mul.ftz.f32 %r30, %r10, 0f3F800000;", [x], [np.float32])
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_array_equal(flushed, np.float32([0, -0.0, 1.5e-38]))


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


M32 = 2**32 - 1
INTEGER_CASES = {
    "mul.hi.u32 %r30, %r10, %r11;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r30, %r10, %r11;": lambda a, b, c: signed(a, 32) * signed(b, 32) >> 32,
    "mul.lo.s32 %r30, %r10, %r11;": lambda a, b, c: a * b,
    "mad.lo.s32 %r30, %r10, %r11, %r12;": lambda a, b, c: a * b + c,
    "sub.s32 %r30, %r10, %r11;": lambda a, b, c: a - b,
    "div.s32 %r30, %r10, %r11;": lambda a, b, c: int(Fraction(signed(a, 32), signed(b, 32))) if b else -1,
    "rem.u32 %r30, %r10, %r11;": lambda a, b, c: a % b if b else a - (M32 * b),
    "shl.b32 %r30, %r10, %r13;": lambda a, b, c, n: a << n if n < 32 else 0,
    "shr.u32 %r30, %r10, %r13;": lambda a, b, c, n: a >> n,
    "shr.s32 %r30, %r10, %r13;": lambda a, b, c, n: signed(a, 32) >> n,
    "bfe.u32 %r30, %r10, 5, 9;": lambda a, b, c: a >> 5 & 511,
    "bfe.s32 %r30, %r10, 5, 9;": lambda a, b, c: signed(a >> 5 & 511, 9),
    "bfe.s32 %r30, %r10, 28, 9;": lambda a, b, c: signed(a, 32) >> 28,
    "bfi.b32 %r30, %r10, %r11, 7, 10;": lambda a, b, c: b & ~(1023 << 7) | (a & 1023) << 7,
    "lop3.b32 %r30, %r10, %r11, %r12, 0xCA;": lambda a, b, c: a & b | ~a & c,
    "popc.b32 %r30, %r10;": lambda a, b, c: a.bit_count(),
    "clz.b32 %r30, %r10;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r30, %r10;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "prmt.b32 %r30, %r10, %r11, 0x9C51;": lambda a, b, c: int.from_bytes(
        bytes(
            [(s := a.to_bytes(4, "little") + b.to_bytes(4, "little"))[1], s[5], 255 * (s[4] >> 7), 255 * (s[1] >> 7)]
        ),
        "little",
    ),
    "shf.l.wrap.b32 %r30, %r10, %r11, %r13;": lambda a, b, c, n: ((b << 32 | a) << (n & 31)) >> 32,
    "shf.r.clamp.b32 %r30, %r10, %r11, %r13;": lambda a, b, c, n: (b << 32 | a) >> min(n, 32),
    "min.s32 %r30, %r10, %r11;": lambda a, b, c: min(signed(a, 32), signed(b, 32)),
    "neg.s32 %r30, %r10;": lambda a, b, c: -a,
    "not.b32 %r30, %r10;": lambda a, b, c: ~a,
}


@pytest.mark.parametrize("text", INTEGER_CASES)
def test_integer_instructions(text: str) -> None:
    a, b, c = (RNG.integers(0, 2**32, 64, np.uint32) for _ in range(3))
    a[:4], b[:4] = [0, M32, 2**31, 1], [1, M32, M32, 0]
    n = np.arange(64, dtype=np.uint32) % 40
    (got,) = evaluate(text, [a, b, c, n], [np.uint32])
    operands = [v.tolist() for v in ((a, b, c, n) if "%r13" in text else (a, b, c))]
    want = [INTEGER_CASES[text](*values) & M32 for values in zip(*operands, strict=True)]
    assert got.tolist() == want


def test_wide_integers() -> None:
    a, b = (RNG.integers(0, 2**64, 64, np.uint64) for _ in range(2))
    high, signed_high = evaluate("mul.hi.u64 %d30, %d10, %d11;\nmul.hi.s64 %d31, %d10, %d11;", [a, b], [np.uint64] * 2)
    for x, y, h, s in zip(a.tolist(), b.tolist(), high.tolist(), signed_high.tolist(), strict=True):
        assert h == x * y >> 64 and s == (signed(x, 64) * signed(y, 64) >> 64) % 2**64
    (wide,) = evaluate("mad.wide.s32 %d30, %r10, -3, 7;", [np.int32([5, -5, 2**31 - 1])], [np.int64])
    assert wide.tolist() == [-8, 22, -3 * (2**31 - 1) + 7]


def test_moves_pack_and_unpack() -> None:
    x = np.uint64([0x1122334455667788])
    low, high = evaluate("mov.b64 {%r30, %r31}, %d10;", [x], [np.uint32] * 2)
    assert (low[0], high[0]) == (0x55667788, 0x11223344)
    (back,) = evaluate("mov.b64 {%r30, %r31}, %d10;\nmov.b64 %d30, {%r31, %r30};", [x], [np.uint64])
    assert back[0] == 0x5566778811223344
