"""cvt and cvta."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import formats
from .arithmetic import decoded
from .errors import EmulatorError
from .formats import DTYPES
from .lanes import Lanes
from .operands import FLOATS, Builder, Step, instruction
from .parser import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Convert = Callable[[np.ndarray], np.ndarray]
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
SHARED_WINDOW = 1 << 40  # where shared memory lies among the generic addresses


@instruction(
    "cvt",
    types=r"[us](8|16|32|64)|b32|b?f16(x2)?|f32|f64|tf32",
    modifiers="rn|rz|rna|rni|rzi|rmi|rpi|sat|relu|satfinite|ftz",
)
def cvt(b: Builder, i: Instruction, types: list[str]) -> Step:
    to, source = types[0], types[-1]
    if len(types) != 2:
        raise EmulatorError("cvt needs two types")
    if "satfinite" in i.modifiers or ("sat" in i.modifiers and to in FLOATS):
        raise EmulatorError("cvt with saturation to a float is not modelled")
    put = b.put(i.operands[0], to)
    convert = converter(to, source, i.modifiers)
    if to in ("f16x2", "bf16x2"):
        high, low = (decoded(b, x, source, "ftz" in i.modifiers) for x in i.operands[1:3])
        if source != "f32":
            raise EmulatorError(f"cvt.{to}.{source} is not modelled")

        def pack(m: Machine, lanes: Lanes) -> None:
            upper, lower = convert(high(m, lanes)), convert(low(m, lanes))
            put(m, lanes, upper.astype(np.uint32) << np.uint32(16) | lower.astype(np.uint32))

        return pack
    get = decoded(b, i.operands[1], source, "ftz" in i.modifiers)
    return lambda m, lanes: put(m, lanes, convert(np.asarray(get(m, lanes))))


def converter(to: str, source: str, modifiers: tuple[str, ...]) -> Convert:
    """From numbers (16-bit floats already as float32) to values of `to`'s dtype."""
    dtype = DTYPES[to]
    toward_zero = "rz" in modifiers
    if to in FLOATS or to == "tf32":
        round_first = next((TO_INTEGER[x] for x in modifiers if x in TO_INTEGER), lambda x: x)
        relu: Convert = (lambda x: np.where(x < 0, x.dtype.type(0), x)) if "relu" in modifiers else (lambda x: x)
        narrow = to_float(to, source, toward_zero, modifiers)
        return lambda x: narrow(relu(round_first(x)))
    if source in FLOATS:
        rounding = next((TO_INTEGER[x] for x in modifiers if x in TO_INTEGER), None)
        if rounding is None:
            raise EmulatorError("cvt from float to integer needs a rounding to integer")
        return lambda x: float_to_integer(rounding(x.astype(np.float64)), dtype)
    if "sat" in modifiers:
        return lambda x: clamp_integer(x, dtype)
    return lambda x: x.astype(dtype)


def to_float(to: str, source: str, toward_zero: bool, modifiers: tuple[str, ...]) -> Convert:
    kind = to.removesuffix("x2")
    if toward_zero and kind != "bf16":
        raise EmulatorError(f"cvt.rz to {to} is not modelled")
    if kind == "tf32":
        return lambda x: formats.f32_to_tf32(x, ties_to_even="rna" not in modifiers)
    if kind in ("f16", "bf16") and source not in ("f16", "bf16", "f32"):
        if kind == "bf16" or source == "f64":
            raise EmulatorError(f"cvt.{to}.{source} is not modelled")
        return lambda x: x.astype(np.float16)  # integers: one rounding
    if kind == "bf16":
        return formats.f32_to_bf16_toward_zero if toward_zero else formats.f32_to_bf16
    if to == "f16x2":
        return formats.f32_to_f16
    if kind == "f16":
        return lambda x: formats.f32_to_f16(x).view(np.float16)
    if "rna" in modifiers:
        raise EmulatorError(f"cvt.rna to {to} is not modelled")
    if "ftz" in modifiers and to == "f32":
        return lambda x: formats.flush_subnormals(x.astype(np.float32))
    return lambda x: x.astype(DTYPES[to])


def float_to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Out of range saturates, NaN gives 0. (float64 holds the 64-bit limits only rounded: those are set apart.)"""
    limits = np.iinfo(dtype)
    inside = (x > float(limits.min) - (dtype.itemsize < 8)) & (x < float(limits.max) + (dtype.itemsize < 8))
    result = np.where(inside, x, 0).astype(dtype)
    result = np.where(x >= float(limits.max), dtype.type(limits.max), result)
    return np.where(x <= float(limits.min), dtype.type(limits.min), result)


def clamp_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    limits, own = np.iinfo(dtype), np.iinfo(x.dtype)
    low, high = max(limits.min, own.min), min(limits.max, own.max)
    return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)


@instruction("cvta", types="u32|u64", modifiers="to|global|shared|shared::cta|param")
def cvta(b: Builder, i: Instruction, types: list[str]) -> Step:
    type = types[-1]
    shared = any(x.startswith("shared") for x in i.modifiers)
    put, get = b.put(i.operands[0], type), b.get(i.operands[1], type)
    if not shared:
        return lambda m, lanes: put(m, lanes, get(m, lanes))
    if type != "u64":
        raise EmulatorError("32-bit generic addresses are not modelled")
    window = np.uint64(SHARED_WINDOW)
    if "to" in i.modifiers:
        return lambda m, lanes: put(m, lanes, get(m, lanes) - window)
    return lambda m, lanes: put(m, lanes, get(m, lanes) + window)
