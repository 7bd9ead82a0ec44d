"""From the text of an operand to a closure that fetches or stores it, and the table of instructions.

Every instruction is compiled once per kernel to a `Step`: a closure that executes it for a set of threads. A Step
that has parked its threads (at a barrier) returns True.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError, require
from .formats import DTYPES, UNSIGNED
from .lanes import Lanes
from .parser import Instruction, Kernel, vector

if TYPE_CHECKING:
    from .machine import Machine

Get = Callable[["Machine", Lanes], np.ndarray]
Put = Callable[["Machine", Lanes, np.ndarray], None]
Step = Callable[["Machine", Lanes], "bool | None"]
Build = Callable[["Builder", Instruction, list[str]], Step]

TABLE: dict[str, tuple[Build, re.Pattern[str], re.Pattern[str]]] = {}
FLOATS = {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8}


def instruction(names: str, types: str = "", modifiers: str = "") -> Callable[[Build], Build]:
    """Register the builder of some opcodes. `types` and `modifiers` are patterns of what it models; the rest raises."""

    def register(build: Build) -> Build:
        for name in names.split():
            TABLE[name] = build, re.compile(types), re.compile(modifiers)
        return build

    return register


@dataclasses.dataclass
class Compiled:
    step: Step
    instruction: Instruction
    marks: tuple[int, ...]  # watched registers that it writes
    length: int = 1  # instructions that the step executes


class Builder:
    """Compiles the instructions of a kernel.

    `watched` registers may be read before they are written: their reads are checked thread by thread. `matrix`
    registers belong to wgmma: ordinary accesses must not meet an unfinished one.
    """

    def __init__(self, kernel: Kernel, watched: frozenset[int] = frozenset()) -> None:
        self.kernel, self.watched = kernel, watched
        self.matrix: set[int] = set()
        for i in kernel.code:
            if i.opcode == "wgmma" and "mma_async" in i.modifiers:
                fragments = [x for operand in i.operands[:2] if operand[0] == "{" for x in vector(operand)]
                self.matrix |= {self.register(x)[0] for x in fragments}
        self.reads: list[set[int]] = [set() for _ in kernel.code]
        self.writes: list[set[int]] = [set() for _ in kernel.code]
        self.at = 0
        self.compiled = [self._compile(i) for i in kernel.code]
        self._fuse()

    def _fuse(self) -> None:
        """Let one step execute a run of matrix instructions."""
        from .matrix import find_run, fused

        self.at = 0
        while self.at < len(self.compiled):
            run = (
                find_run(self.kernel.code, self.at, self.kernel.targets)
                if self.kernel.code[self.at].opcode == "mma"
                else []
            )
            if len(run) > 1:
                marks = {number for i in run for number in self.compiled[i.position].marks}
                self.compiled[self.at] = Compiled(fused(self, run), run[0], tuple(marks), len(run))
            self.at += max(1, len(run))

    def _compile(self, i: Instruction) -> Compiled:
        self.at = i.position
        try:
            if i.predicate is not None:
                self.reads[self.at].add(i.predicate)
            step = self._build(i)
        except EmulatorError as error:
            raise EmulatorError(f"{error}\n  PTX line {i.line}: {i.text}") from None
        return Compiled(step, i, tuple(self.writes[self.at] & self.watched))

    def _build(self, i: Instruction) -> Step:
        if i.opcode not in TABLE:
            raise EmulatorError(f"instruction {i.opcode!r} is not modelled")
        build, types, modifiers = TABLE[i.opcode]
        found = []
        for modifier in i.modifiers:
            if modifier in DTYPES and types.fullmatch(modifier):
                found.append(modifier)
            elif not modifiers.fullmatch(modifier):
                raise EmulatorError(f"{i.opcode}: modifier or type {modifier!r} is not modelled")
        return build(self, i, found)

    def register(self, name: str) -> tuple[int, int]:
        if name not in self.kernel.registers:
            raise EmulatorError(f"unknown register {name!r}")
        return self.kernel.registers[name]

    def get(self, operand: str, type: str, raw: bool = False) -> Get:
        """Fetch an operand as `type`. Constants come as scalars, registers in the shape of the threads.

        `raw` leaves out the checks of wgmma's registers (wgmma does its own).
        """
        dtype = DTYPES[type]
        if operand in self.kernel.registers:
            return self._get_register(operand, dtype, raw)
        if operand.startswith("!"):
            inner = self.get(operand[1:].strip(), type)
            return lambda m, lanes: ~inner(m, lanes)
        if operand in SPECIAL:
            return lambda m, lanes: m.special[operand][lanes.index].astype(dtype)
        if re.fullmatch(r"[A-Za-z_$%][\w$]*", operand):
            known = set(self.kernel.shared) | {p.name for p in self.kernel.parameters if p.array}
            if operand not in known:
                raise EmulatorError(f"operand {operand!r} is not modelled")
            return lambda m, lanes: dtype.type(m.symbols[operand])
        value = constant(operand, type)
        return lambda m, lanes: value

    def _get_register(self, operand: str, dtype: np.dtype, raw: bool) -> Get:
        number, width = self.register(operand)
        self.reads[self.at].add(number)
        if (width == 1) != (dtype.kind == "b") or (width > 1 and width // 8 < dtype.itemsize):
            raise EmulatorError(f"register {operand} of {width} bits used as {dtype}")
        watched = number in self.watched
        matrix = number in self.matrix and not raw
        if width == 1 or width // 8 == dtype.itemsize:
            if width == 1 or dtype == UNSIGNED[dtype.itemsize]:

                def get(m: Machine, lanes: Lanes) -> np.ndarray:
                    return m.registers[number][lanes.index]
            else:

                def get(m: Machine, lanes: Lanes) -> np.ndarray:
                    return m.registers[number][lanes.index].view(dtype)
        else:
            narrow = UNSIGNED[dtype.itemsize]

            def get(m: Machine, lanes: Lanes) -> np.ndarray:
                return m.registers[number][lanes.index].astype(narrow).view(dtype)

        if not watched and not matrix:
            return get

        def checked(m: Machine, lanes: Lanes) -> np.ndarray:
            if watched:
                require(m.defined[number][lanes.index], f"register {operand} was never written")
            if matrix:
                m.wgmma.check_register(number, lanes, f"reads {operand}")
            return get(m, lanes)

        return checked

    def put(self, operand: str, type: str, raw: bool = False) -> Put:
        """Store values of `type` (their dtype must be its dtype) into a register, extended by their sign if it is
        wider.
        """
        if operand == "_":
            return lambda m, lanes, value: None
        number, width = self.register(operand)
        self.writes[self.at].add(number)
        dtype = DTYPES[type]
        if (width == 1) != (dtype.kind == "b") or (width > 1 and width // 8 < dtype.itemsize):
            raise EmulatorError(f"register {operand} of {width} bits written as {dtype}")
        if width == 1:

            def put(m: Machine, lanes: Lanes, value: np.ndarray) -> None:
                m.registers[number][lanes.index] = value

        elif width // 8 == dtype.itemsize:
            unsigned = UNSIGNED[dtype.itemsize]

            def put(m: Machine, lanes: Lanes, value: np.ndarray) -> None:
                m.registers[number][lanes.index] = value.view(unsigned)

        else:
            wide, signed = UNSIGNED[width // 8], dtype.kind == "i"

            def put(m: Machine, lanes: Lanes, value: np.ndarray) -> None:
                extended = value.astype(np.int64).view(np.uint64) if signed else value.view(UNSIGNED[dtype.itemsize])
                m.registers[number][lanes.index] = extended.astype(wide)

        if number not in self.matrix or raw:
            return put

        def checked(m: Machine, lanes: Lanes, value: np.ndarray) -> None:
            m.wgmma.check_register(number, lanes, f"writes {operand}")
            m.wgmma.unfenced[number][lanes.warps] = True
            put(m, lanes, value)

        return checked

    def predicate_pair(self, operand: str) -> tuple[Put, Put]:
        """`p|q`, where either may be missing: stores for both."""
        first, _, second = operand.partition("|")
        return self.put(first.strip(), "pred"), self.put(second.strip() or "_", "pred")

    def address(self, operand: str) -> Callable[[Machine, Lanes], np.ndarray]:
        """`[base+offset]` -> flat int64 addresses, one a thread."""
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if not match:
            raise EmulatorError(f"address {operand!r} is not modelled")
        name = match[1]
        wide = name in self.kernel.registers and self.register(name)[1] == 64
        base = self.get(name, "u64" if wide else "u32")
        offset = np.int64(int(match[2] or "0", 0))
        return lambda m, lanes: lanes.spread(base(m, lanes)).astype(np.int64) + offset


def compile_kernel(kernel: Kernel) -> Builder:
    """Compile, and once more if some registers turn out to need watching."""
    from .flow import unproven_reads

    builder = Builder(kernel)
    watched = unproven_reads(kernel.code, builder.reads, builder.writes)
    never = watched - set().union(*builder.writes) if watched else set()
    for number in never:
        name = next(n for n, (k, _) in kernel.registers.items() if k == number)
        i = kernel.code[next(p for p, reads in enumerate(builder.reads) if number in reads)]
        raise EmulatorError(f"register {name} is never written\n  PTX line {i.line}: {i.text}")
    return Builder(kernel, frozenset(watched)) if watched else builder


def constant(operand: str, type: str) -> np.ndarray:
    """An immediate: 0f/0d hexadecimal floats are bit patterns, integers wrap to the type's width."""
    dtype = DTYPES[type]
    bits = UNSIGNED[dtype.itemsize]
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
        single = np.array(int(match[1], 16), np.uint32)
        return single.view(np.float32).astype(dtype)[()] if type in ("f16", "f64") else single.view(dtype)[()]
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
        double = np.array(int(match[1], 16), np.uint64)
        return double.view(dtype)[()]
    if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        value = int(match[2], 0) * (-1 if match[1] else 1)
        if type == "pred":
            return np.bool_(value != 0)
        return np.array(value % (1 << 8 * dtype.itemsize), bits).view(dtype)[()]
    raise EmulatorError(f"operand {operand!r} is not modelled")


SPECIAL = frozenset(
    [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
    + [f"%{name}.{axis}" for name in ("cluster_ctaid", "cluster_nctaid") for axis in "xyz"]
    + [
        "%laneid",
        "%warpid",
        "%nwarpid",
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%lanemask_lt",
        "%lanemask_le",
        "%lanemask_eq",
    ]
)
