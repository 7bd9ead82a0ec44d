"""atom and red: threads take effect in ascending order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import encoder
from .errors import EmulatorError
from .formats import DTYPES, UNSIGNED
from .lanes import Lanes
from .memory import HINTS, count_banks, space
from .operands import Builder, Step, instruction
from .parser import Instruction, vector
from .warp import REDUCE

if TYPE_CHECKING:
    from .machine import Machine

OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    **REDUCE,
    "exch": lambda old, new: new,
}


@instruction(
    "atom red", types=r"[bus](32|64)|f16|bf16|f16x2|bf16x2|f32|f64", modifiers=rf"{HINTS}|{'|'.join(OPERATIONS)}|cas"
)
def atomic(b: Builder, i: Instruction, types: list[str]) -> Step:
    type, where = types[-1], space(i)
    if len(i.operands) < 2 or any(x[0] == "{" for x in i.operands):
        return vector_atomic(b, i, type)
    returns = i.opcode == "atom"
    address = b.address(i.operands[returns])
    put = b.put(i.operands[0], type) if returns else None
    sources = i.operands[1 + returns :]
    name = "cas" if "cas" in i.modifiers else next(x for x in i.modifiers if x in OPERATIONS)
    apply = one_by_one(b, name, type, sources)
    size = DTYPES[type].itemsize

    def step(m: Machine, lanes: Lanes) -> None:
        at = address(m, lanes)
        m.counters.atomics += lanes.count
        if where == "shared":
            old = shared_atomic(m, lanes, at, size, apply)
        else:
            at = m.globals.locate(at, size, "atomic")
            m.globals.count(lanes, at, size, store=True)
            old = apply(m, lanes, m.globals.view(size), at // size)
        if put:
            put(m, lanes, old.view(DTYPES[type]).reshape(lanes.shape))

    return step


Apply = Callable[["Machine", Lanes, np.ndarray, np.ndarray], np.ndarray]


def one_by_one(b: Builder, name: str, type: str, sources: list[str]) -> Apply:
    """A function that updates words of memory for one thread after the other and returns what each thread found."""
    values = [b.get(x, type) for x in sources[: 1 + (name == "cas")]]
    bits = UNSIGNED[DTYPES[type].itemsize]

    def apply(m: Machine, lanes: Lanes, words: np.ndarray, index: np.ndarray) -> np.ndarray:
        operands = [np.ascontiguousarray(lanes.spread(get(m, lanes))) for get in values]
        old = np.empty(lanes.count, bits)
        # Threads that meet at an address go in turns: the n-th of each address in turn n.
        order = np.argsort(index, kind="stable")
        first = np.r_[True, index[order][1:] != index[order][:-1]]
        starts = np.flatnonzero(first)
        turn = np.empty(len(index), np.int64)
        turn[order] = np.arange(len(index)) - np.repeat(starts, np.diff(np.r_[starts, len(index)]))
        for now in range(int(turn.max()) + 1):
            who = np.flatnonzero(turn == now)
            found = words[index[who]]
            old[who] = found
            words[index[who]] = updated(name, type, found, [x[who] for x in operands])
        return old

    return apply


def updated(name: str, type: str, found: np.ndarray, operands: list[np.ndarray]) -> np.ndarray:
    if name == "cas":
        compare, new = (x.view(found.dtype) for x in operands)
        return np.where(found == compare, new, found)
    if name == "exch":
        return operands[0].view(found.dtype)
    encode = encoder(type)
    result = OPERATIONS[name](numbers(found, type), numbers(operands[0].view(found.dtype), type))
    return encode(result).view(found.dtype)


def numbers(bits: np.ndarray, type: str) -> np.ndarray:
    """Bits of one value a thread as numbers."""
    from .formats import bf16_to_f32, f16_to_f32

    kind = type.removesuffix("x2")
    if kind in ("f16", "bf16"):
        return (f16_to_f32 if kind == "f16" else bf16_to_f32)(bits.view(np.uint16))
    return bits.view(DTYPES[type])


def shared_atomic(m: Machine, lanes: Lanes, at: np.ndarray, size: int, apply: Apply) -> np.ndarray:
    count_banks(m, lanes, at, size)
    located = m.shared.locate(at, size, lanes.flat_warps, "atomic")
    m.shared.atomic(m.shared.cells(located, size), lanes.flat_warps)
    return apply(m, lanes, m.shared.view(size), located // size)


def vector_atomic(b: Builder, i: Instruction, type: str) -> Step:
    """.v2, .v4 (sm_90): the elements are updated one after the other."""
    returns = i.opcode == "atom"
    if space(i) != "global" or "cas" in i.modifiers or len(i.operands) != 2 + returns:
        raise EmulatorError("this vector atomic is not modelled")
    sources = vector(i.operands[1 + returns])
    puts = [b.put(x, type) for x in vector(i.operands[0])] if returns else []
    size = DTYPES[type].itemsize
    total = size * len(sources)
    if total > 16 or (puts and len(puts) != len(sources)):
        raise EmulatorError("this vector atomic is not modelled")
    name = next(x for x in i.modifiers if x in OPERATIONS)
    address = b.address(i.operands[returns])
    applies = [one_by_one(b, name, type, [source]) for source in sources]

    def step(m: Machine, lanes: Lanes) -> None:
        at = m.globals.locate(address(m, lanes), total, "atomic")
        m.counters.atomics += lanes.count * len(sources)
        m.globals.count(lanes, at, total, store=True)
        for k, apply in enumerate(applies):
            old = apply(m, lanes, m.globals.view(size), at // size + k)
            if puts:
                puts[k](m, lanes, old.view(DTYPES[type]).reshape(lanes.shape))

    return step
