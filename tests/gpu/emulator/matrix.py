"""ldmatrix, stmatrix and mma.sync, for all warps at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .formats import MATRIX_ELEMENTS
from .lanes import WARP, Lanes
from .operands import Builder, Step, instruction
from .parser import Instruction, vector
from .warp import whole_warps

if TYPE_CHECKING:
    from .machine import Machine


def row_access(
    m: Machine, lanes: Lanes, addresses: np.ndarray, matrices: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Threads 0..8n-1 of each warp give the 16-byte rows of n 8x8 matrices. -> located rows, their warps."""
    whole_warps(lanes, what)
    rows = addresses.reshape(-1, WARP)[:, : 8 * matrices].reshape(-1)
    m.counters.shared_request(((rows >> 2)[:, None] + np.arange(4)).reshape(-1, WARP))
    warps = np.repeat(lanes.warps, 8 * matrices)
    at = np.zeros(
        (len(lanes.warps), WARP), np.int64
    )  # for the error report: a bad row belongs to the thread that names it
    at[:, : 8 * matrices] = rows.reshape(-1, 8 * matrices)
    m.shared.locate(at.reshape(-1), 16, lanes.flat_warps, what)
    return m.shared.locate(rows, 16, warps, what), warps


@instruction("ldmatrix", types="b16", modifiers="sync|aligned|m8n8|x1|x2|x4|trans|shared|shared::cta")
def ldmatrix(b: Builder, i: Instruction, types: list[str]) -> Step:
    """Thread t receives the pair at row t/4, columns 2(t%4) and the next, of each matrix (.trans: of its transpose)."""
    puts, address = [b.put(x, "b32") for x in vector(i.operands[0])], b.address(i.operands[1])
    count, transpose = len(puts), "trans" in i.modifiers

    def step(m: Machine, lanes: Lanes) -> None:
        rows, warps = row_access(m, lanes, address(m, lanes), count, "ldmatrix")
        m.shared.check_read(m.shared.cells(rows, 16), warps, "ldmatrix")
        words = m.shared.view(16)[rows // 16]
        if transpose:
            halves = words.view(np.uint16).reshape(-1, count, 8, 8).swapaxes(2, 3)
            words = np.ascontiguousarray(halves).view(np.uint32)
        words = words.reshape(-1, count, WARP)
        for k, put in enumerate(puts):
            put(m, lanes, np.ascontiguousarray(words[:, k]))

    return step


@instruction("stmatrix", types="b16", modifiers="sync|aligned|m8n8|x1|x2|x4|trans|shared|shared::cta")
def stmatrix(b: Builder, i: Instruction, types: list[str]) -> Step:
    address, gets = b.address(i.operands[0]), [b.get(x, "b32") for x in vector(i.operands[1])]
    count, transpose = len(gets), "trans" in i.modifiers

    def step(m: Machine, lanes: Lanes) -> None:
        rows, warps = row_access(m, lanes, address(m, lanes), count, "stmatrix")
        words = np.stack([np.broadcast_to(get(m, lanes), lanes.shape) for get in gets], 1)
        if transpose:
            halves = words.view(np.uint16).reshape(-1, count, 8, 8).swapaxes(2, 3)
            words = np.ascontiguousarray(halves).view(np.uint32)
        m.shared.write(rows, 16, warps, words.reshape(-1, 4), "stmatrix")

    return step


class Shape:
    """The fragments of mma.sync.m16n8kK. Thread 4g+t holds, in PTX's order of registers (16-bit types two to a
    register):

    A: rows g and g+8 (inner), k = t*e.. in blocks of 4e (outer);  B: column g, the same k;  C: rows g, g+8 (outer),
    columns 2t, 2t+1.
    """

    def __init__(self, k: int, element: str) -> None:
        self.k = k
        self.size, self.decode = MATRIX_ELEMENTS[element]
        self.per_register = 4 // self.size
        self.blocks = k // (4 * self.per_register)

    def a(self, registers: np.ndarray) -> np.ndarray:
        """[tiles, 2*blocks, warps, 32] -> [warps, 16*tiles, k]"""
        values = self._values(registers).reshape(-1, self.blocks, 2, registers.shape[2], 8, 4, self.per_register)
        return np.ascontiguousarray(values.transpose(3, 0, 2, 4, 1, 5, 6)).reshape(registers.shape[2], -1, self.k)

    def b(self, registers: np.ndarray) -> np.ndarray:
        """[tiles, blocks, warps, 32] -> [warps, k, 8*tiles]"""
        values = self._values(registers).reshape(-1, self.blocks, registers.shape[2], 8, 4, self.per_register)
        return np.ascontiguousarray(values.transpose(2, 1, 4, 5, 0, 3)).reshape(registers.shape[2], self.k, -1)

    def _values(self, registers: np.ndarray) -> np.ndarray:
        return self.decode(registers.view(np.uint16) if self.size == 2 else registers)


def load_c(registers: np.ndarray) -> np.ndarray:
    """[row tiles, column tiles, 4, warps, 32] -> [warps, 16*row tiles, 8*column tiles]"""
    rows, columns, _, warps, _ = registers.shape
    values = registers.view(np.float32).reshape(rows, columns, 2, 2, warps, 8, 4)
    return np.ascontiguousarray(values.transpose(4, 0, 2, 5, 1, 6, 3)).reshape(warps, 16 * rows, 8 * columns)


def store_c(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    warps = len(values)
    split = values.reshape(warps, rows, 2, 8, columns, 4, 2)
    return np.ascontiguousarray(split.transpose(1, 4, 2, 6, 0, 3, 5)).reshape(rows, columns, 4, warps, WARP)


MMA = r"sync|aligned|row|col|f32|f16|bf16|tf32|m16n8k(4|8|16)"


@instruction("mma", modifiers=MMA)
def mma(b: Builder, i: Instruction, types: list[str]) -> Step:
    return fused(b, [i])


def parse(i: Instruction) -> tuple[int, str]:
    match = re.fullmatch(r"sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32", ".".join(i.modifiers))
    if not match:
        raise EmulatorError(f"mma.{'.'.join(i.modifiers)} is not modelled")
    k, element = int(match[1]), match[2]
    if k not in ((4, 8) if element == "tf32" else (8, 16)):
        raise EmulatorError(f"there is no mma.m16n8k{k} of {element}")
    return k, element


def fused(b: Builder, run: list[Instruction]) -> Step:
    """Several mma.sync as one product of matrices: the row tiles of A times the column tiles of B (see `tiles`)."""
    k, element = parse(run[0])
    shape = Shape(k, element)
    rows, columns = tiles(run)
    name = f"m16n8k{k}.{element}"
    counts = [2 * shape.blocks, shape.blocks]
    for i in run:
        found = [len(vector(x)) for x in i.operands]
        if found != [4, *counts, 4]:
            raise EmulatorError(f"mma.{name}: fragments of {found} registers")
    a = [[b.get(x, "b32") for x in vector(text)] for text in rows]
    right = [[b.get(x, "b32") for x in vector(text)] for text in columns]
    c = [[b.get(x, "b32") for x in vector(i.operands[3])] for i in run]
    d = [[b.put(x, "b32") for x in vector(i.operands[0])] for i in run]
    flops = len(run) * 2 * 16 * 8 * k

    def step(m: Machine, lanes: Lanes) -> None:
        whole_warps(lanes, "mma")
        warps = len(lanes.warps)
        m.counters.mma[name] += warps * len(run)
        m.counters.mma_flops += warps * flops

        def stack(gets: list) -> np.ndarray:
            return np.stack([np.stack([np.broadcast_to(get(m, lanes), lanes.shape) for get in tile]) for tile in gets])

        sums = load_c(stack(c).reshape(len(rows), len(columns), 4, warps, WARP))
        sums += np.matmul(shape.a(stack(a)), shape.b(stack(right)))
        bits = store_c(sums, len(rows), len(columns)).reshape(len(run), 4, warps, WARP).view(np.uint32)
        for tile, puts in zip(bits, d, strict=True):
            for put, value in zip(puts, tile, strict=True):
                put(m, lanes, value)

    return step


def tiles(run: list[Instruction]) -> tuple[list[str], list[str]]:
    """The A and B fragments of the run, which holds every pair of them in order."""
    rows = list(dict.fromkeys(i.operands[1] for i in run))
    columns = list(dict.fromkeys(i.operands[2] for i in run))
    return rows, columns


def find_run(code: list[Instruction], position: int, targets: set[int]) -> list[Instruction]:
    """The longest run of mma.sync from here that is one product of matrices: as many as can be executed together.

    They have the same shape and no predicate, nothing jumps between them, every pair of an A and a B fragment occurs
    once, in order, and none reads what another writes.
    """
    run: list[Instruction] = []
    written: set[str] = set()
    read: set[str] = set()
    best = 1
    for i in code[position:]:
        if i.opcode != "mma" or i.modifiers != code[position].modifiers or i.predicate is not None:
            break
        if run and i.position in targets:
            break
        results, sources = set(vector(i.operands[0])), {x for text in i.operands[1:] for x in vector(text)}
        if sources & written or results & (written | read - set(vector(i.operands[3]))):
            break
        run.append(i)
        written |= results
        read |= sources
        rows, columns = tiles(run)
        pairs = [(row, column) for row in rows for column in columns]
        if [(i.operands[1], i.operands[2]) for i in run] == pairs:
            best = len(run)
    return run[:best]
