"""Integer and floating-point arithmetic, comparison and selection."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .formats import DTYPES, bf16_to_f32, f32_to_bf16, f32_to_f16, flush_subnormals
from .lanes import Lanes
from .operands import FLOATS, Builder, Get, Step, instruction
from .parser import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Function = Callable[..., np.ndarray]
INTEGERS = r"[us](16|32|64)"
HALVES = r"(b?f16)(x2)?"
ANY = rf"{INTEGERS}|{HALVES}|f32|f64"


def elementwise(b: Builder, i: Instruction, type: str, function: Function, operands: list[str] | None = None) -> Step:
    """d = function(a, b, ...), all of one type, in that type's arithmetic."""
    put = b.put(i.operands[0], type)
    get = [decoded(b, x, type, "ftz" in i.modifiers) for x in (operands or i.operands[1:])]
    encode = encoder(type, "ftz" in i.modifiers, "sat" in i.modifiers)
    if len(get) == 2:
        first, second = get
        return lambda m, lanes: put(m, lanes, encode(function(first(m, lanes), second(m, lanes))))
    return lambda m, lanes: put(m, lanes, encode(function(*[g(m, lanes) for g in get])))


def decoded(b: Builder, operand: str, type: str, ftz: bool) -> Get:
    """Fetch as numbers: 16-bit floats as float32, packed pairs with a doubled last axis."""
    bits = b.get(operand, type)
    if type in ("f16x2", "bf16x2"):
        decode = bf16_to_f32 if type == "bf16x2" else lambda x: x.view(np.float16).astype(np.float32)
        return lambda m, lanes: decode(
            np.ascontiguousarray(np.broadcast_to(bits(m, lanes), lanes.shape)).view(np.uint16)
        )
    if type == "f16":
        return lambda m, lanes: bits(m, lanes).astype(np.float32)
    if type == "bf16":
        return lambda m, lanes: bf16_to_f32(np.asarray(bits(m, lanes)))
    if type == "f32" and ftz:
        return lambda m, lanes: flush_subnormals(bits(m, lanes))
    return bits


def encoder(type: str, ftz: bool = False, sat: bool = False) -> Function:
    clamp: Function = (lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1))) if sat else (lambda x: x)
    if sat and type not in FLOATS:
        raise EmulatorError(f"saturating {type} arithmetic is not modelled")
    if type in ("f16x2", "bf16x2"):
        narrow = f32_to_bf16 if type == "bf16x2" else f32_to_f16
        return lambda x: np.ascontiguousarray(narrow(clamp(x))).view(np.uint32)
    if type == "f16":
        return lambda x: f32_to_f16(clamp(x)).view(np.float16)
    if type == "bf16":
        return lambda x: f32_to_bf16(clamp(x))
    dtype = DTYPES[type]
    if ftz and type == "f32":
        return lambda x: flush_subnormals(np.asarray(clamp(x), dtype))
    return lambda x: np.asarray(clamp(x), dtype)


def simple(names: str, function: Function, types: str = ANY, modifiers: str = "rn|ftz|sat") -> None:
    @instruction(names, types=types, modifiers=modifiers)
    def build(b: Builder, i: Instruction, found: list[str]) -> Step:
        return elementwise(b, i, found[-1], function)


simple("add", np.add)
simple("sub", np.subtract)
simple("neg", np.negative, modifiers="ftz")
simple("abs", np.abs, modifiers="ftz")
FLOAT = rf"{HALVES}|f32|f64"
simple("rcp", lambda x: 1 / x, FLOAT, "rn|approx|ftz")
simple("sqrt", np.sqrt, FLOAT, "rn|approx|ftz")
simple("rsqrt", lambda x: 1 / np.sqrt(x.astype(np.float64)), FLOAT, "approx|ftz")
simple("ex2", lambda x: np.exp2(x.astype(np.float64)), FLOAT, "approx|ftz")
simple("lg2", lambda x: np.log2(x.astype(np.float64)), FLOAT, "approx|ftz")
simple("sin", lambda x: np.sin(x.astype(np.float64)), FLOAT, "approx|ftz")
simple("cos", lambda x: np.cos(x.astype(np.float64)), FLOAT, "approx|ftz")
simple("tanh", lambda x: np.tanh(x.astype(np.float64)), FLOAT, "approx|ftz")
simple("copysign", lambda a, b: np.copysign(b, a), "f32|f64", "")


@instruction("min max", types=ANY, modifiers="ftz|NaN")
def extremum(b: Builder, i: Instruction, types: list[str]) -> Step:
    """Of two floats the one that is a number wins, unless .NaN asks for NaN."""
    propagate = "NaN" in i.modifiers or types[-1] not in FLOATS
    table = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
    return elementwise(b, i, types[-1], table[i.opcode][propagate])


@instruction("div", types=rf"{INTEGERS}|f32|f64", modifiers="rn|full|approx|ftz")
def div(b: Builder, i: Instruction, types: list[str]) -> Step:
    return elementwise(b, i, types[-1], np.divide if types[-1] in FLOATS else truncated_division)


@instruction("rem", types=INTEGERS)
def rem(b: Builder, i: Instruction, types: list[str]) -> Step:
    return elementwise(b, i, types[-1], lambda x, y: x - truncated_division(x, y) * y)


def truncated_division(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Towards zero. By zero: all ones (PTX leaves it open; LLVM divides speculatively)."""
    x, y = np.broadcast_arrays(x, y)
    quotient = x // np.where(y == 0, y.dtype.type(1), y)
    if x.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * y != x))
    return np.where(y == 0, ~np.zeros_like(x), quotient)


def high_half(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    size = x.dtype.itemsize * 8
    if size < 64:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return ((x.astype(wide) * y.astype(wide)) >> wide(size)).astype(x.dtype)
    u, v = np.asarray(x).view(np.uint64), np.asarray(y).view(np.uint64)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    low, middle = (u & mask) * (v & mask), (u >> half) * (v & mask)
    carry = (low >> half) + (middle & mask) + (u & mask) * (v >> half)
    high = (u >> half) * (v >> half) + (middle >> half) + (carry >> half)
    if x.dtype.kind == "i":  # the unsigned product of a negative factor is too large by the other factor
        high = high - np.where(x < 0, v, np.uint64(0)) - np.where(y < 0, u, np.uint64(0))
    return high.view(x.dtype)


@instruction("mul mad", types=ANY, modifiers="lo|hi|wide|rn|ftz|sat")
def mul(b: Builder, i: Instruction, types: list[str]) -> Step:
    type = types[-1]
    if type in FLOATS:
        return fma(b, i, types) if i.opcode == "mad" else elementwise(b, i, type, np.multiply)
    if "wide" in i.modifiers:
        double = f"{type[0]}{2 * int(type[1:])}"
        x, y, put, dtype = (
            b.get(i.operands[1], type),
            b.get(i.operands[2], type),
            b.put(i.operands[0], double),
            DTYPES[double],
        )
        addend = b.get(i.operands[3], double) if i.opcode == "mad" else None

        def step(m: Machine, lanes: Lanes) -> None:
            product = x(m, lanes).astype(dtype) * y(m, lanes).astype(dtype)
            put(m, lanes, product if addend is None else product + addend(m, lanes))

        return step
    product = high_half if "hi" in i.modifiers else operator.mul
    if i.opcode == "mad":
        return elementwise(b, i, type, lambda x, y, z: product(x, y) + z)
    return elementwise(b, i, type, product)


@instruction("fma", types=FLOAT, modifiers="rn|ftz|sat|relu")
def fma(b: Builder, i: Instruction, types: list[str]) -> Step:
    type = types[-1]
    if type == "f64":
        raise EmulatorError("fma.f64 is not modelled")  # NumPy would round twice
    relu = "relu" in i.modifiers

    def function(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        exact = x.astype(np.float64) * y  # exact; z is added in float64, then rounded to the type
        exact += z
        return np.where(exact > 0, exact, np.where(np.isnan(exact), exact, 0)) if relu else exact

    step = elementwise(b, i, type, function)
    per_thread = 2 if type.endswith("x2") else 1

    def counted(m: Machine, lanes: Lanes) -> None:
        m.counters.fma += lanes.count * per_thread
        step(m, lanes)

    return counted


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, floats: bool) -> Function:
    """`ltu` and its like are true for NaN, the plain ones false (ne: PTX's `ne` is false, `neu` true)."""
    if name in ("num", "nan"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    if name in UNSIGNED_NAMES:
        return COMPARE[UNSIGNED_NAMES[name]]
    if name == "ne" and floats:
        return lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y)
    if name in COMPARE:
        return COMPARE[name]
    plain = COMPARE[name[:-1]]
    return lambda x, y: plain(x, y) | np.isnan(x) | np.isnan(y)


@instruction(
    "setp set",
    types=rf"{ANY}|b(16|32|64)",
    modifiers=r"(eq|ne|lt|le|gt|ge)u?|lo|ls|hi|hs|num|nan|and|or|xor|ftz",
)
def setp(b: Builder, i: Instruction, types: list[str]) -> Step:
    if i.opcode == "set" or types[-1].endswith("x2"):
        raise EmulatorError("set and packed comparisons are not modelled")
    name, type = i.modifiers[0], types[-1]
    compare = comparison(name, type in FLOATS)
    if name in UNSIGNED_NAMES:
        type = "u" + type[1:]
    combine = next((COMBINE[x] for x in i.modifiers[1:] if x in COMBINE), None)
    put, put_other = b.predicate_pair(i.operands[0])
    x, y = (decoded(b, operand, type, "ftz" in i.modifiers) for operand in i.operands[1:3])
    third = b.get(i.operands[3], "pred") if combine else None

    def step(m: Machine, lanes: Lanes) -> None:
        result = compare(x(m, lanes), y(m, lanes))
        other = ~result
        if combine and third:
            result, other = combine(result, third(m, lanes)), combine(other, third(m, lanes))
        put(m, lanes, result)
        put_other(m, lanes, other)

    return step


@instruction("selp", types=r"[bus](16|32|64)|f32|f64")
def selp(b: Builder, i: Instruction, types: list[str]) -> Step:
    put, predicate = b.put(i.operands[0], types[-1]), b.get(i.operands[3], "pred")
    x, y = b.get(i.operands[1], types[-1]), b.get(i.operands[2], types[-1])
    return lambda m, lanes: put(m, lanes, np.where(predicate(m, lanes), x(m, lanes), y(m, lanes)))
