"""ld, st and the width of every shared-memory access."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .formats import DTYPES, UNSIGNED
from .lanes import WARP, Lanes
from .operands import Builder, Step, instruction
from .parser import Instruction, vector

if TYPE_CHECKING:
    from .machine import Machine

# Cache and ordering hints have no effect on one CTA's own view of memory.
HINTS = (
    r"global|shared|shared::cta|param|v2|v4|nc|ca|cg|cs|cv|lu|wb|wt|volatile|weak|relaxed|acquire|release|acq_rel"
    r"|cta|gpu|sys|cluster|L1::\w+|L2::(64B|128B|256B|cache_hint|evict_\w+)|noftz"
)
TYPES = r"[bus](8|16|32|64)|f32|f64|pred"


def space(i: Instruction) -> str:
    """global, shared or param; the rest is not modelled."""
    for modifier in i.modifiers:
        if modifier.partition("::")[0] in ("global", "shared", "param"):
            return modifier.partition("::")[0]
    raise EmulatorError(f"{i.opcode}: generic, local and const addresses are not modelled")


def shared_access_size(i: Instruction) -> int:
    """Bytes of the narrowest aligned access to shared memory that the instruction makes; 16 if it makes none."""
    if i.opcode in ("ld", "st", "atom", "red") and any(m.startswith("shared") for m in i.modifiers):
        size = next(DTYPES[m].itemsize for m in reversed(i.modifiers) if m in DTYPES)
        count = next((int(m[1:]) for m in i.modifiers if re.fullmatch(r"v\d", m)), 1)
        return size * count
    if i.opcode == "cp" and "bulk" not in i.modifiers and len(i.operands) > 2:
        return int(i.operands[2], 0)
    return 8 if i.opcode == "mbarrier" else 16


@instruction("ld", types=TYPES, modifiers=HINTS)
def load(b: Builder, i: Instruction, types: list[str]) -> Step:
    type, where = types[-1], space(i)
    if where == "param":
        return load_parameter(b, i, type)
    names = vector(i.operands[0])
    size = DTYPES[type].itemsize
    total = checked_width(size * len(names))
    puts, address = [b.put(name, type) for name in names], b.address(i.operands[1])
    dtype = DTYPES[type]

    def step(m: Machine, lanes: Lanes) -> None:
        at = address(m, lanes)
        if where == "shared":
            words = read_shared(m, lanes, at, total)
        else:
            at = m.globals.locate(at, total, "load")
            m.globals.count(lanes, at, total, store=False)
            words = m.globals.view(total)[at // total]
        if len(puts) == 1:
            puts[0](m, lanes, words.view(dtype).reshape(lanes.shape))
            return
        pieces = words.reshape(-1).view(dtype).reshape(-1, len(puts))
        for k, put in enumerate(puts):
            put(m, lanes, np.ascontiguousarray(pieces[:, k]).reshape(lanes.shape))

    return step


def checked_width(total: int) -> int:
    if total not in (1, 2, 4, 8, 16):
        raise EmulatorError(f"accesses of {total} bytes are not modelled")
    return total


def load_parameter(b: Builder, i: Instruction, type: str) -> Step:
    name = i.operands[1].strip("[] ")
    known = {p.name: p for p in b.kernel.parameters}
    if name not in known or known[name].array:
        raise EmulatorError(f"parameter {i.operands[1]} is not modelled")
    put, dtype = b.put(i.operands[0], type), DTYPES[type]
    declared = known[name].type

    def step(m: Machine, lanes: Lanes) -> None:
        value = m.parameters[name]
        if isinstance(value, float):
            bits = np.array(value, DTYPES[declared if declared[0] == "f" else f"f{8 * dtype.itemsize}"])
        else:
            bits = np.array(value % (1 << 8 * dtype.itemsize), UNSIGNED[dtype.itemsize])
        put(m, lanes, bits.view(dtype))

    return step


@instruction("st", types=TYPES, modifiers=HINTS)
def store(b: Builder, i: Instruction, types: list[str]) -> Step:
    where, names = space(i), vector(i.operands[1])
    size = DTYPES[types[-1]].itemsize
    total = checked_width(size * len(names))
    gets, address = [b.get(name, f"u{8 * size}") for name in names], b.address(i.operands[0])

    def step(m: Machine, lanes: Lanes) -> None:
        at = address(m, lanes)
        pieces = np.empty((lanes.count, len(gets)), UNSIGNED[size])
        for k, get in enumerate(gets):
            pieces[:, k] = lanes.spread(get(m, lanes))
        words = pieces.view(np.uint32) if total == 16 else pieces.view(UNSIGNED[total])[:, 0]
        if where == "shared":
            write_shared(m, lanes, at, total, words)
        else:
            at = m.globals.locate(at, total, "store")
            m.globals.count(lanes, at, total, store=True)
            m.globals.view(total)[at // total] = words

    return step


def read_shared(m: Machine, lanes: Lanes, at: np.ndarray, size: int) -> np.ndarray:
    count_banks(m, lanes, at, size)
    located = m.shared.locate(at, size, lanes.flat_warps, "load")
    m.shared.check_read(m.shared.cells(located, size), lanes.flat_warps, "load")
    return m.shared.view(size)[located // size]


def write_shared(m: Machine, lanes: Lanes, at: np.ndarray, size: int, words: np.ndarray) -> None:
    count_banks(m, lanes, at, size)
    located = m.shared.locate(at, size, lanes.flat_warps, "store")
    m.shared.write(located, size, lanes.flat_warps, words, "store")


def count_banks(m: Machine, lanes: Lanes, at: np.ndarray, size: int) -> None:
    """A warp's request goes in one piece up to 4 bytes a thread, in halves for 8 and in quarters for 16."""
    rows = lanes.by_warp(at, -(1 << 20))
    if size <= 4:
        words = rows >> 2
    else:
        threads = WARP * 4 // size
        words = ((rows >> 2).reshape(-1, threads, 1) + np.arange(size // 4)).reshape(-1, WARP)
    m.counters.shared_request(np.maximum(words, -1))
