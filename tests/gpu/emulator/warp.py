"""Instructions that exchange data within a warp: shfl, vote, match, redux, elect, activemask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .formats import DTYPES
from .lanes import WARP, Lanes
from .operands import Builder, Get, Step, instruction
from .parser import Instruction

if TYPE_CHECKING:
    from .machine import Machine

LANE = np.arange(WARP)


def whole_warps(lanes: Lanes, what: str) -> None:
    if not lanes.whole:
        raise EmulatorError(f"divergent {what}: only a part of a warp reaches it")


def collective(b: Builder, i: Instruction, mask: str) -> Callable[[Machine, Lanes], None]:
    """A check that all 32 threads of the warp are there and the mask says so."""
    get = b.get(mask, "b32")

    def check(m: Machine, lanes: Lanes) -> None:
        whole_warps(lanes, i.opcode)
        if (np.asarray(get(m, lanes)) != np.uint32(0xFFFFFFFF)).any():
            raise EmulatorError(f"{i.opcode} with a partial member mask is not modelled")

    return check


def table(get: Get, m: Machine, lanes: Lanes) -> np.ndarray:
    return np.broadcast_to(get(m, lanes), lanes.shape)


@instruction("shfl", types="b32", modifiers="sync|bfly|idx|up|down")
def shfl(b: Builder, i: Instruction, types: list[str]) -> Step:
    """The fourth operand packs a clamp (bits 0-4) and the mask that splits the warp into segments (bits 8-12)."""
    mode = i.modifiers[1]
    names = [x.strip() for x in i.operands[0].split("|")]
    put, put_valid = b.put(names[0], "b32"), b.put(names[1] if len(names) > 1 else "_", "pred")
    value, distance, clamp = b.get(i.operands[1], "b32"), b.get(i.operands[2], "b32"), b.get(i.operands[3], "b32")
    check = collective(b, i, i.operands[4])

    def step(m: Machine, lanes: Lanes) -> None:
        check(m, lanes)
        n, packed = (table(g, m, lanes).astype(np.int64) for g in (distance, clamp))
        n, segment, limit = n & 31, packed >> 8 & 31, packed & 31
        highest = (LANE & segment) | (limit & ~segment)
        source = {"up": LANE - n, "down": LANE + n, "bfly": LANE ^ n, "idx": (LANE & segment) | (n & ~segment)}[mode]
        valid = source >= highest if mode == "up" else source <= highest
        source = np.where(valid, source, LANE)
        put(m, lanes, np.take_along_axis(table(value, m, lanes), source, 1))
        put_valid(m, lanes, valid)

    return step


@instruction("vote", types="pred|b32", modifiers="sync|all|any|uni|ballot")
def vote(b: Builder, i: Instruction, types: list[str]) -> Step:
    mode = i.modifiers[1]
    put, predicate = b.put(i.operands[0], types[-1]), b.get(i.operands[1], "pred")
    check = collective(b, i, i.operands[2])

    def step(m: Machine, lanes: Lanes) -> None:
        check(m, lanes)
        p = table(predicate, m, lanes)
        if mode == "ballot":
            result = ballot(p)
        else:
            every, some = p.all(1, keepdims=True), p.any(1, keepdims=True)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        put(m, lanes, np.broadcast_to(result, lanes.shape))

    return step


def ballot(p: np.ndarray) -> np.ndarray:
    return (p.astype(np.uint64) << LANE.astype(np.uint64)).sum(1, keepdims=True).astype(np.uint32)


@instruction("match", types=r"b(32|64)", modifiers="sync|any|all")
def match(b: Builder, i: Instruction, types: list[str]) -> Step:
    if "all" in i.modifiers:
        raise EmulatorError("match.all is not modelled")
    put, value, check = b.put(i.operands[0], "b32"), b.get(i.operands[1], types[-1]), collective(b, i, i.operands[2])

    def step(m: Machine, lanes: Lanes) -> None:
        check(m, lanes)
        x = table(value, m, lanes)
        same = x[:, :, None] == x[:, None, :]
        put(m, lanes, (same.astype(np.uint64) << LANE.astype(np.uint64)).sum(2).astype(np.uint32))

    return step


REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux", types=r"[bus]32", modifiers="sync|" + "|".join(REDUCE))
def redux(b: Builder, i: Instruction, types: list[str]) -> Step:
    reduce = next(REDUCE[x] for x in i.modifiers if x in REDUCE)
    put, value = b.put(i.operands[0], types[-1]), b.get(i.operands[1], types[-1])
    check, dtype = collective(b, i, i.operands[2]), DTYPES[types[-1]]

    def step(m: Machine, lanes: Lanes) -> None:
        check(m, lanes)
        result = reduce.reduce(table(value, m, lanes), axis=1, keepdims=True, dtype=dtype)
        put(m, lanes, np.broadcast_to(result, lanes.shape))

    return step


@instruction("elect", modifiers="sync")
def elect(b: Builder, i: Instruction, types: list[str]) -> Step:
    """The hardware may elect any thread: here lane 0."""
    leader, _, chosen = i.operands[0].partition("|")
    put, put_chosen = b.put(leader.strip(), "b32"), b.put(chosen.strip(), "pred")
    check = collective(b, i, i.operands[1])

    def step(m: Machine, lanes: Lanes) -> None:
        check(m, lanes)
        put(m, lanes, np.uint32(0))
        put_chosen(m, lanes, np.broadcast_to(LANE == 0, lanes.shape))

    return step


@instruction("activemask", types="b32")
def activemask(b: Builder, i: Instruction, types: list[str]) -> Step:
    raise EmulatorError("activemask depends on how the hardware schedules: not modelled")
