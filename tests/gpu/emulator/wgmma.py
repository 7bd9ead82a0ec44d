"""wgmma (sm_90a): matrix products of warp groups whose operands lie in shared memory.

A group's result is written to its registers when it is waited for, the latest legal moment; until then it is kept as
a matrix, to which later wgmma of the same accumulator add.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import numpy as np

from .async_copy import Groups
from .errors import EmulatorError
from .formats import MATRIX_ELEMENTS
from .lanes import WARP, Lanes
from .matrix import Shape
from .operands import Builder, Get, Step, instruction
from .parser import Instruction, vector

if TYPE_CHECKING:
    from .machine import Machine

GROUP = 4  # warps
SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes, by the descriptor's layout field
XOR = {0: 0, 128: 7, 64: 3, 32: 1}


class Wgmma:
    """Unfinished products of a batch, by warp group."""

    def __init__(self, machine: Machine, registers: set[int]) -> None:
        self.machine = machine
        self.warp_groups = -(-machine.warps // GROUP)
        self.groups = Groups(self.warp_groups)
        # By register: which warps wait for a product that writes (or reads) it, and which wrote it since the last
        # fence.
        self.busy = {number: np.zeros(machine.warps, np.int32) for number in registers}
        self.unfenced = {number: np.zeros(machine.warps, bool) for number in registers}
        # By accumulator: its matrices, and in how many unfinished products of each warp group it is.
        self.sums: dict[tuple[int, ...], np.ndarray] = {}
        self.uses: dict[tuple[int, ...], np.ndarray] = {}

    def finish(self) -> None:
        if self.groups.pending:
            raise EmulatorError("the kernel ended with a wgmma that nobody waited for")

    def count_readers(self, groups: np.ndarray, cells: np.ndarray, change: int) -> None:
        """Unfinished reads of cells; the warp groups of one CTA may share cells, so they are counted one after the
        other.
        """
        groups_per_cta = max(1, self.machine.warps_per_cta // GROUP)
        for place in range(groups_per_cta):
            self.machine.shared.reading[cells[groups % groups_per_cta == place]] += change

    def check_register(self, number: int, lanes: Lanes, what: str) -> None:
        if self.busy[number][lanes.warps].any():
            raise EmulatorError(f"{what}, a register of an unfinished wgmma")

    def accumulator(self, numbers: tuple[int, ...], groups: np.ndarray, columns: int) -> np.ndarray:
        """The current sums of these warp groups, [groups, 64, columns]: from the registers unless a product is under
        way.
        """
        if numbers not in self.sums:
            self.sums[numbers] = np.zeros((self.warp_groups, 64, columns), np.float32)
            self.uses[numbers] = np.zeros(self.warp_groups, np.int64)
        fresh = groups[self.uses[numbers][groups] == 0]
        if len(fresh):
            warps = (fresh[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
            for number in numbers:
                self.check_idle(number, warps)
            bits = np.stack([self.machine.registers[number][warps] for number in numbers])
            values = bits.view(np.float32).reshape(columns // 8, 2, 2, len(fresh), GROUP, 8, 4)
            self.sums[numbers][fresh] = values.transpose(3, 4, 1, 5, 0, 6, 2).reshape(len(fresh), 64, columns)
        return self.sums[numbers][groups]

    def check_idle(self, number: int, warps: np.ndarray) -> None:
        if self.busy[number][warps].any():
            raise EmulatorError("wgmma uses a register of another unfinished wgmma")
        if self.unfenced[number][warps].any():
            raise EmulatorError("wgmma uses a register written since the last wgmma.fence")

    def write_back(self, numbers: tuple[int, ...], groups: np.ndarray) -> None:
        warps = (groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
        sums = self.sums[numbers][groups]
        columns = sums.shape[2]
        split = sums.reshape(len(groups), GROUP, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        bits = np.ascontiguousarray(split).reshape(len(numbers), len(warps), WARP).view(np.uint32)
        for number, value in zip(numbers, bits, strict=True):
            self.machine.registers[number][warps] = value


def warp_groups(lanes: Lanes, what: str) -> np.ndarray:
    """The warp groups, all of whose 128 threads must be there."""
    groups = lanes.warps[::GROUP] // GROUP
    whole = lanes.whole and len(lanes.warps) % GROUP == 0
    if not whole or (lanes.warps.reshape(-1, GROUP) != groups[:, None] * GROUP + np.arange(GROUP)).any():
        raise EmulatorError(f"divergent {what}: a part of a warp group is missing")
    return groups


@instruction("wgmma", modifiers=r"\w+")
def wgmma(b: Builder, i: Instruction, types: list[str]) -> Step:
    kind = i.modifiers[0]
    if kind == "fence":

        def fence(m: Machine, lanes: Lanes) -> None:
            for unfenced in m.wgmma.unfenced.values():
                unfenced[lanes.warps] = False

        return fence
    if kind == "commit_group":
        return lambda m, lanes: m.wgmma.groups.commit(warp_groups(lanes, "wgmma.commit_group"))
    if kind == "wait_group":
        leave = int(i.operands[0], 0)
        return lambda m, lanes: m.wgmma.groups.wait(m, warp_groups(lanes, "wgmma.wait_group"), leave)
    return product(b, i)


def product(b: Builder, i: Instruction) -> Step:
    match = re.fullmatch(r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(f16|bf16|tf32)\.\3", ".".join(i.modifiers))
    if not match:
        raise EmulatorError(f"wgmma.{'.'.join(i.modifiers)} is not modelled")
    columns, k, element = int(match[1]), int(match[2]), match[3]
    size, decode = MATRIX_ELEMENTS[element]
    names = vector(i.operands[0])
    if k * size != 32 or columns % 8 or not 8 <= columns <= 256 or len(names) != columns // 2:
        raise EmulatorError(f"there is no wgmma.m64n{columns}k{k} of {element} with {len(names)} result registers")
    numbers = tuple(b.register(x)[0] for x in names)
    for x in names:
        b.get(x, "b32", raw=True)
        b.put(x, "b32", raw=True)
    in_registers = i.operands[1][0] == "{"
    a_names = vector(i.operands[1]) if in_registers else []
    a_numbers = [b.register(x)[0] for x in a_names]
    a_gets = [b.get(x, "b32", raw=True) for x in a_names] or [b.get(i.operands[1], "b64")]
    right, scale_d = b.get(i.operands[2], "b64"), b.get(i.operands[3], "pred")
    scale_a, scale_b, *transposed = (int(x) for x in i.operands[4:])
    transpose_a, transpose_b = [0, *transposed] if in_registers and transposed else (transposed or [0, 0])
    if size == 4 and (transpose_a or transpose_b):
        raise EmulatorError("wgmma of tf32 cannot be transposed")
    sign = np.float32(scale_a * scale_b)
    shape, name = Shape(k, element), f"m64n{columns}k{k}.{element}"

    def step(m: Machine, lanes: Lanes) -> None:
        groups = warp_groups(lanes, "wgmma")
        m.counters.mma[name] += len(groups)
        m.counters.mma_flops += len(groups) * 2 * 64 * columns * k
        cells = []
        if in_registers:
            for number in a_numbers:
                m.wgmma.check_idle(number, lanes.warps)
            bits = np.stack([np.broadcast_to(g(m, lanes), lanes.shape) for g in a_gets])[None]
            left = shape.a(bits).reshape(len(groups), 64, k)
        else:
            left, read = tile(m, groups, heads(a_gets[0], m, lanes), 64, size, bool(transpose_a))
            left = decode(left)
            cells.append(read)
        bits, read = tile(m, groups, heads(right, m, lanes), columns, size, bool(transpose_b))
        cells.append(read)
        keep = np.broadcast_to(scale_d(m, lanes), lanes.shape)[::GROUP, 0]
        sums = m.wgmma.accumulator(numbers, groups, columns)
        result = np.matmul(left, decode(bits).swapaxes(1, 2))
        if sign != 1:
            result *= sign
        m.wgmma.sums[numbers][groups] = result + np.where(keep[:, None, None], sums, np.float32(0))
        m.wgmma.uses[numbers][groups] += 1
        everything = np.concatenate(cells, 1)
        m.wgmma.count_readers(groups, everything, 1)
        for number in (*numbers, *a_numbers):
            m.wgmma.busy[number][lanes.warps] += 1
        m.wgmma.groups.add(groups, [everything], finish)

    def finish(m: Machine, groups: np.ndarray, data: list[np.ndarray]) -> None:
        m.wgmma.count_readers(groups, data[0], -1)
        warps = groups[:, None] * GROUP + np.arange(GROUP)
        # Each warp knows only that its own part is done: before others overwrite the operands, all must meet at a
        # barrier.
        for column in range(GROUP):
            m.shared.note_read(data[0], warps[:, column, None])
        for number in (*numbers, *a_numbers):
            m.wgmma.busy[number][warps.reshape(-1)] -= 1
        m.wgmma.uses[numbers][groups] -= 1
        done = groups[m.wgmma.uses[numbers][groups] == 0]
        if len(done):
            m.wgmma.write_back(numbers, done)

    return step


def heads(get: Get, m: Machine, lanes: Lanes) -> np.ndarray:
    """A descriptor per warp group; all its threads must agree."""
    values = np.broadcast_to(get(m, lanes), lanes.shape).reshape(-1, GROUP * WARP)
    if (values != values[:, :1]).any():
        raise EmulatorError("the threads of a warp group give different wgmma descriptors")
    return values[:, 0]


@functools.cache
def chunks(rows: int, size: int, transposed: bool, leading: int, stride: int, swizzle: int) -> np.ndarray:
    """Where the 16-byte pieces of a tile lie relative to its start, before swizzling, [major, minor].

    K-major: [rows, 2] (32 bytes of k). Transposed: [k, rows * size / 16].
    """
    if not transposed:
        row, piece = np.indices((rows, 2))
        if swizzle:
            return row // 8 * stride + row % 8 * swizzle + piece * 16
        return row // 8 * stride + row % 8 * 16 + piece * leading
    k, piece = np.indices((32 // size, rows * size // 16))
    if swizzle:
        per = swizzle // 16
        return piece // per * leading + piece % per * 16 + k // 8 * stride + k % 8 * swizzle
    return piece * stride + k // 8 * leading + k % 8 * 16


def tile(
    m: Machine, groups: np.ndarray, descriptors: np.ndarray, rows: int, size: int, transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Element bits [groups, rows, k] that the matrix descriptors name, and the cells they lie in."""
    fields = np.unique(descriptors >> np.uint64(16))
    if len(fields) != 1:
        raise EmulatorError("wgmma descriptors of different layouts at once are not modelled")
    layout = int(fields[0])
    if layout >> 33 & 7:
        raise EmulatorError("wgmma descriptors with a base offset are not modelled")
    swizzle = SWIZZLE[layout >> 46 & 3]
    relative = chunks(rows, size, transposed, (layout & 0x3FFF) << 4, (layout >> 16 & 0x3FFF) << 4, swizzle)
    start = (descriptors & np.uint64(0x3FFF)).astype(np.int64) << 4
    address = start[:, None] + relative.reshape(-1)
    address = address ^ ((address >> 7 & XOR[swizzle]) << 4)
    if (address > m.shared.limit - 16).any():
        raise EmulatorError(f"wgmma descriptor reaches beyond the {m.shared.limit:#x} bytes of shared memory")
    located = address + (groups * GROUP // m.warps_per_cta * m.shared.size)[:, None]
    cells = located // m.shared.cell
    if m.shared.cell < 16:
        cells = (cells[:, :, None] + np.arange(16 // m.shared.cell)).reshape(len(groups), -1)
    # Any warp of the group may read any part: all four must know of the writes.
    for column in range(GROUP):
        m.shared.check_read(cells, groups * GROUP + column, "wgmma", asynchronous=True)
    words = m.shared.view(16)[located // 16].view(np.uint16 if size == 2 else np.uint32)
    elements = words.reshape(len(groups), *relative.shape[:1], -1)
    return (elements.swapaxes(1, 2) if transposed else elements), cells
