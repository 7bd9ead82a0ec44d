"""cp.async.bulk.tensor: tiled copies between global memory and shared memory by tensor maps."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .barriers import uniform
from .errors import EmulatorError
from .global_memory import TensorMap
from .lanes import Lanes
from .operands import Builder, Step
from .parser import Instruction
from .shared_memory import COLUMN_BITS, PENDING, PROXY, WRITTEN

if TYPE_CHECKING:
    from .machine import Machine

SWIZZLE_BITS = {0: 0, 32: 1, 64: 3, 128: 7}
LOAD = {
    "async",
    "bulk",
    "tensor",
    "shared::cta",
    "shared::cluster",
    "global",
    "mbarrier::complete_tx::bytes",
    "tile",
    "L2::cache_hint",
}
STORE = {"async", "bulk", "tensor", "global", "shared::cta", "bulk_group", "tile", "L2::cache_hint"}
DIMENSIONS = {"1d", "2d", "3d", "4d", "5d"}


def bulk(b: Builder, i: Instruction) -> Step:
    if "commit_group" in i.modifiers:
        return lambda m, lanes: m.bulk.commit(lanes.ids)
    if "wait_group" in i.modifiers:
        # .read waits only until shared memory has been read; both are one here (what is written back is fixed by then).
        leave = int(i.operands[0], 0)
        return lambda m, lanes: m.bulk.wait(m, lanes.ids, leave)
    modifiers = set(i.modifiers) - DIMENSIONS
    if "tensor" in modifiers and modifiers <= LOAD and "mbarrier::complete_tx::bytes" in modifiers:
        return load(b, i)
    if "tensor" in modifiers and modifiers <= STORE and "bulk_group" in modifiers:
        return store(b, i)
    raise EmulatorError("this kind of cp.async.bulk is not modelled")


class Box:
    """The pieces of a tensor map's box: where they lie in shared and global memory relative to its corner.

    A piece is 16 bytes where the innermost coordinate allows it, else one element.
    """

    def __init__(self, tensor: TensorMap, piece: int) -> None:
        per_piece = piece // tensor.element_size
        extents = (tensor.box[0] // per_piece, *tensor.box[1:])
        index = np.indices(extents[::-1])[::-1].reshape(len(extents), -1)
        index[0] *= per_piece
        self.index = index  # coordinates of each piece
        self.shared = np.arange(index.shape[1]) * piece
        self.size = index.shape[1] * piece

    def find(self, tensor: TensorMap, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets into the tensor and whether they are inside, [boxes, pieces]; `corners` is [boxes, dimensions]."""
        inside = np.ones((len(corners), self.index.shape[1]), bool)
        offset = np.zeros(inside.shape, np.int64)
        for axis, (dim, stride) in enumerate(zip(tensor.dims, tensor.strides, strict=True)):
            coordinate = self.index[axis] + corners[:, axis, None]
            inside &= (coordinate >= 0) & (coordinate < dim)
            offset += coordinate * stride
        return offset, inside


class Access:
    """The operands of one TMA instruction for the threads that issue it."""

    def __init__(
        self, m: Machine, lanes: Lanes, map_address: np.ndarray, corners: list[np.ndarray], shared: np.ndarray
    ) -> None:
        from .machine import MAPS

        number = uniform(lanes, map_address, "tensor map") - MAPS
        if not 0 <= number < len(m.maps):
            raise EmulatorError("not the address of a tensor map")
        tensor, base = m.maps[number]
        if len(corners) != len(tensor.dims):
            raise EmulatorError(f"{len(corners)} coordinates for a tensor map of {len(tensor.dims)} dimensions")
        if base % 16:
            raise EmulatorError("tensor map: the tensor is not 16-byte aligned")
        at = np.stack([lanes.spread(c).astype(np.int64) for c in corners], 1)
        aligned = not (at[:, 0] * tensor.element_size % 16).any() and tensor.dims[0] * tensor.element_size % 16 == 0
        self.piece = 16 if aligned else tensor.element_size
        box = Box(tensor, self.piece)
        offset, self.inside = box.find(tensor, at)
        self.size = box.size
        warps = lanes.flat_warps
        if (shared % 128).any():
            raise EmulatorError("TMA: the shared address must be a multiple of 128", shared % 128 != 0)
        m.shared.locate(shared, 16, warps, "TMA")
        m.shared.locate(shared + box.size - 16, 16, warps, "TMA")
        place = box.shared + shared[:, None]
        place = place ^ ((place >> 7 & SWIZZLE_BITS[tensor.swizzle]) << 4)
        self.place = place + (warps // m.warps_per_cta * m.shared.size)[:, None]
        self.source = np.where(self.inside, base + offset, base)
        if self.inside.any():
            m.globals.check(self.source[self.inside], self.piece, "TMA")
        self.cells = (shared + warps // m.warps_per_cta * m.shared.size)[:, None] // m.shared.cell + np.arange(
            box.size // m.shared.cell
        )


def operands(b: Builder, tensor: str, shared: str):
    match = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*\{(.*)\}\s*\]", tensor)
    if not match:
        raise EmulatorError(f"tensor operand {tensor!r} is not modelled")
    return b.get(match[1], "u64"), [b.get(c.strip(), "s32") for c in match[2].split(",")], b.address(shared)


def count(m: Machine, access: Access, store: bool) -> None:
    at = access.source[access.inside]
    marks = (m.globals.stored if store else m.globals.loaded).reshape(-1)
    for byte in range(access.piece):
        marks[at + byte] = 1
    sectors = sum(len(np.unique(row[ok] >> 5)) for row, ok in zip(access.source, access.inside, strict=True))
    if store:
        m.counters.store_sectors += sectors
        m.counters.store_bytes += access.piece * len(at)
    else:
        m.counters.load_sectors += sectors
        m.counters.load_bytes += access.piece * len(at)


def load(b: Builder, i: Instruction) -> Step:
    tensor, corners, shared = operands(b, i.operands[1], i.operands[0])
    barrier = b.address(i.operands[2])

    def step(m: Machine, lanes: Lanes) -> None:
        access = Access(m, lanes, tensor(m, lanes), [c(m, lanes) for c in corners], shared(m, lanes))
        warps = lanes.flat_warps
        slots = m.mbarriers.find(warps, m.shared.locate(barrier(m, lanes), 8, warps, "mbarrier"))
        m.shared.check_write(access.cells, warps, "TMA load")
        m.shared.state[access.cells] |= PENDING
        count(m, access, store=False)
        for row, slot in enumerate(slots.tolist()):
            m.mbarriers.queues[slot].append(
                (lambda row=row, slot=slot: land(m, access, row, slot, warps[row]), access.size)
            )

    return step


def land(m: Machine, access: Access, row: int, slot: int, warp: int) -> None:
    """The bytes arrive, ordered before whoever waits for this phase: the TMA unit has its own column in the clocks."""
    words = m.globals.view(access.piece)[access.source[row] // access.piece]
    words[~access.inside[row]] = 0
    m.shared.view(access.piece)[access.place[row] // access.piece] = words
    clocks = m.clocks
    time = clocks.next_tma(warp)
    m.shared.state[access.cells[row]] = WRITTEN | PROXY
    m.shared.writer[access.cells[row]] = time << COLUMN_BITS | clocks.tma
    for kind in (0, 1):
        m.mbarriers.gathering[kind, slot, clocks.tma] = max(time, int(m.mbarriers.gathering[kind, slot, clocks.tma]))


def store(b: Builder, i: Instruction) -> Step:
    tensor, corners, shared = operands(b, i.operands[0], i.operands[1])

    def step(m: Machine, lanes: Lanes) -> None:
        access = Access(m, lanes, tensor(m, lanes), [c(m, lanes) for c in corners], shared(m, lanes))
        m.shared.check_read(access.cells, lanes.flat_warps, "TMA store", asynchronous=True)
        m.shared.reading[access.cells] += 1
        count(m, access, store=True)
        m.bulk.add(lanes.ids, [access.cells, access.place, access.source, access.inside], finish(access.piece))

    def finish(piece: int):
        def write(m: Machine, threads: np.ndarray, data: list[np.ndarray]) -> None:
            cells, place, source, inside = data
            m.globals.view(piece)[source[inside] // piece] = m.shared.view(piece)[place[inside] // piece]
            m.shared.reading[cells] -= 1
            m.shared.note_read(cells, (threads // 32)[:, None])

        return write

    return step
