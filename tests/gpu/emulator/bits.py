"""Logic, shifts, bit fields, byte permutation, and moves that pack and unpack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import elementwise
from .errors import EmulatorError
from .formats import DTYPES
from .lanes import Lanes
from .operands import Builder, Step, instruction
from .parser import Instruction, vector

if TYPE_CHECKING:
    from .machine import Machine

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}


@instruction("and or xor not", types=r"pred|b(16|32|64)")
def logic(b: Builder, i: Instruction, types: list[str]) -> Step:
    return elementwise(b, i, types[-1], LOGIC[i.opcode])


@instruction("shl shr", types=r"[bus](16|32|64)")
def shift(b: Builder, i: Instruction, types: list[str]) -> Step:
    """Amounts beyond the width shift everything out (shr.s: copies of the sign)."""
    type = types[-1]
    put, value, amount = b.put(i.operands[0], type), b.get(i.operands[1], type), b.get(i.operands[2], "u32")
    dtype = DTYPES[type]
    width, left, arithmetic = 8 * dtype.itemsize, i.opcode == "shl", type[0] == "s"

    def step(m: Machine, lanes: Lanes) -> None:
        x, n = value(m, lanes), amount(m, lanes)
        capped = np.minimum(n, width - 1).astype(dtype)
        result = x << capped if left else x >> capped
        if not arithmetic or left:
            result = np.where(n < width, result, dtype.type(0))
        put(m, lanes, result.astype(dtype))

    return step


@instruction("shf", types="b32", modifiers="l|r|wrap|clamp")
def funnel_shift(b: Builder, i: Instruction, types: list[str]) -> Step:
    left, wrap = "l" in i.modifiers, "wrap" in i.modifiers

    def function(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        n = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return elementwise(b, i, "b32", function)


@instruction("bfe", types=r"[us](32|64)")
def extract_field(b: Builder, i: Instruction, types: list[str]) -> Step:
    type = types[-1]
    dtype = DTYPES[type]
    width = 8 * dtype.itemsize
    put, value = b.put(i.operands[0], type), b.get(i.operands[1], type)
    begin, length = b.get(i.operands[2], "u32"), b.get(i.operands[3], "u32")

    def step(m: Machine, lanes: Lanes) -> None:
        x = value(m, lanes)
        at, count = (np.asarray(v & np.uint32(255)).astype(np.int64) for v in (begin(m, lanes), length(m, lanes)))
        # Move the field to the top, then down again: the type's own shift fills with zeros or the sign.
        end = np.minimum(at + count, width)
        up, down = (width - end).astype(dtype), np.minimum(width - end + at, width - 1).astype(dtype)
        sign = x >> dtype.type(width - 1) if type[0] == "s" else dtype.type(0)
        inside = (x << up) >> down
        put(m, lanes, np.where(count == 0, dtype.type(0), np.where(at >= width, sign, inside)).astype(dtype))

    return step


@instruction("bfi", types=r"b(32|64)")
def insert_field(b: Builder, i: Instruction, types: list[str]) -> Step:
    type = types[-1]
    dtype = DTYPES[type]
    width = 8 * dtype.itemsize
    put = b.put(i.operands[0], type)
    field, into = b.get(i.operands[1], type), b.get(i.operands[2], type)
    begin, length = b.get(i.operands[3], "u32"), b.get(i.operands[4], "u32")

    def step(m: Machine, lanes: Lanes) -> None:
        at, count = (np.asarray(v & np.uint32(255)).astype(np.int64) for v in (begin(m, lanes), length(m, lanes)))
        ones = np.where(
            count >= width,
            ~dtype.type(0),
            (dtype.type(1) << np.minimum(count, width - 1).astype(dtype)) - dtype.type(1),
        )
        move = np.minimum(at, width - 1).astype(dtype)
        mask = np.where(at >= width, dtype.type(0), (ones << move).astype(dtype))
        put(m, lanes, ((into(m, lanes) & ~mask) | ((field(m, lanes) << move) & mask)).astype(dtype))

    return step


@instruction("lop3", types="b32")
def any_logic_of_three(b: Builder, i: Instruction, types: list[str]) -> Step:
    table = int(i.operands[4], 0)

    def function(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        result = np.zeros_like(x | y | z)
        for row in range(8):
            if table >> row & 1:
                result = result | (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        return result

    return elementwise(b, i, "b32", function, i.operands[1:4])


@instruction("prmt", types="b32")
def permute_bytes(b: Builder, i: Instruction, types: list[str]) -> Step:
    """Every nibble of the selector names one of the eight bytes; its top bit asks for copies of that byte's sign."""

    def function(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        result = np.uint32(0)
        for place in range(4):
            nibble = (selector >> np.uint32(4 * place)) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint64(128), 255, 0), byte).astype(np.uint32)
            result = result | byte << np.uint32(8 * place)
        return result

    return elementwise(b, i, "b32", function)


@instruction("popc clz brev", types=r"b(32|64)")
def count_bits(b: Builder, i: Instruction, types: list[str]) -> Step:
    type = types[-1]
    dtype = DTYPES[type]
    places = [dtype.type(n) for n in range(8 * dtype.itemsize)]
    value, put = b.get(i.operands[1], type), b.put(i.operands[0], type if i.opcode == "brev" else "u32")

    def step(m: Machine, lanes: Lanes) -> None:
        x = np.asarray(value(m, lanes))
        if i.opcode == "popc":
            put(m, lanes, np.asarray(np.bitwise_count(x), np.uint32))
        elif i.opcode == "clz":
            leading = [(x >> place) == 0 for place in places]
            put(m, lanes, np.asarray(np.sum(leading, axis=0), np.uint32))
        else:
            reverse = np.zeros_like(x)
            for place, mirrored in zip(places, reversed(places), strict=True):
                reverse = reverse | ((x >> place) & dtype.type(1)) << mirrored
            put(m, lanes, reverse)

    return step


@instruction("mov", types=r"pred|[bus](16|32|64)|f16|f32|f64|bf16|f16x2|bf16x2")
def mov(b: Builder, i: Instruction, types: list[str]) -> Step:
    type = types[-1]
    to, source = i.operands
    if to[0] == "{":
        return unpack(b, vector(to), source, type)
    put = b.put(to, type)
    if source[0] == "{":
        parts = vector(source)
        wide = DTYPES[f"b{8 * DTYPES[type].itemsize}"]
        width = 8 * wide.itemsize // len(parts)
        get = [b.get(part, f"b{width}") for part in parts]

        def pack(m: Machine, lanes: Lanes) -> None:
            result = wide.type(0)
            for place, part in enumerate(get):
                result = result | part(m, lanes).astype(wide) << wide.type(place * width)
            put(m, lanes, result)

        return pack
    get_one = b.get(source, type)
    return lambda m, lanes: put(m, lanes, get_one(m, lanes))


def unpack(b: Builder, parts: list[str], source: str, type: str) -> Step:
    wide = DTYPES[f"b{8 * DTYPES[type].itemsize}"]
    width = 8 * wide.itemsize // len(parts)
    if width not in (16, 32):
        raise EmulatorError(f"mov into pieces of {width} bits is not modelled")
    narrow = DTYPES[f"b{width}"]
    get, put = b.get(source, f"b{8 * wide.itemsize}"), [b.put(part, f"b{width}") for part in parts]

    def step(m: Machine, lanes: Lanes) -> None:
        x = get(m, lanes).copy()
        for place, store in enumerate(put):
            store(m, lanes, (x >> wide.type(place * width)).astype(narrow))

    return step
