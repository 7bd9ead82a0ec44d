"""cp.async and the bookkeeping of asynchronous groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .lanes import Lanes
from .operands import Builder, Step, instruction
from .parser import Instruction
from .shared_memory import PENDING

if TYPE_CHECKING:
    from .machine import Machine

Finish = Callable[["Machine", np.ndarray, list[np.ndarray]], None]


class Groups:
    """Asynchronous operations, in groups by commit. An owner (a thread, a warp group) waits until all but its last n
    committed groups are done, and that is when they happen: the latest moment allowed."""

    def __init__(self, owners: int) -> None:
        self.committed = np.zeros(owners, np.int64)
        self.pending: list[tuple[np.ndarray, np.ndarray, list[np.ndarray], Finish]] = []

    def add(self, owners: np.ndarray, data: list[np.ndarray], finish: Finish) -> None:
        """An operation of each owner; `data` has one row per owner. finish(machine, owners, data) performs it."""
        self.pending.append((owners, self.committed[owners], data, finish))

    def commit(self, owners: np.ndarray) -> None:
        self.committed[owners] += 1

    def wait(self, machine: Machine, owners: np.ndarray, leave: int) -> None:
        limit = np.full(len(self.committed), -1)
        limit[owners] = self.committed[owners] - leave
        keep = []
        for who, group, data, finish in self.pending:
            done = group < limit[who]
            if done.all():
                finish(machine, who, data)
                continue
            if done.any():
                finish(machine, who[done], [x[done] for x in data])
                who, group, data = who[~done], group[~done], [x[~done] for x in data]
            keep.append((who, group, data, finish))
        self.pending = keep

    def finish(self) -> None:
        """The end of the kernel: nobody may still read shared memory."""
        if self.pending:
            raise EmulatorError("the kernel ended before its asynchronous stores had read shared memory")


@instruction("cp", types="", modifiers=r"\S+")
def cp(b: Builder, i: Instruction, types: list[str]) -> Step:
    from . import tma

    if not i.modifiers or i.modifiers[0] != "async":
        raise EmulatorError(f"{i.text} is not modelled")
    if "bulk" in i.modifiers:
        return tma.bulk(b, i)
    if "commit_group" in i.modifiers:
        return lambda m, lanes: m.copies.commit(lanes.ids)
    if "wait_group" in i.modifiers:
        leave = int(i.operands[0], 0)
        return lambda m, lanes: m.copies.wait(m, lanes.ids, leave)
    if "wait_all" in i.modifiers:

        def wait_all(m: Machine, lanes: Lanes) -> None:
            m.copies.commit(lanes.ids)
            m.copies.wait(m, lanes.ids, 0)

        return wait_all
    return copy(b, i)


def copy(b: Builder, i: Instruction) -> Step:
    """cp.async: `size` bytes, of which the first `source_size` come from global memory and the rest are zero."""
    known = {
        "async",
        "ca",
        "cg",
        "shared",
        "shared::cta",
        "global",
        "L2::cache_hint",
        "L2::128B",
        "L2::256B",
        "L2::64B",
    }
    if unknown := set(i.modifiers) - known:
        raise EmulatorError(f"cp.async: {sorted(unknown)} is not modelled")
    size = int(i.operands[2], 0)
    if size not in (4, 8, 16) or ("cg" in i.modifiers and size != 16):
        raise EmulatorError(f"cp.async of {size} bytes")
    hint = "L2::cache_hint" in i.modifiers
    if len(i.operands) - hint > 3 and b.kernel.registers.get(i.operands[3], (0, 32))[1] == 1:
        raise EmulatorError("cp.async with an ignore-src predicate is not modelled")
    to, source = b.address(i.operands[0]), b.address(i.operands[1])
    given = b.get(i.operands[3], "u32") if len(i.operands) - hint > 3 else None

    def step(m: Machine, lanes: Lanes) -> None:
        count = np.full(lanes.count, size) if given is None else lanes.spread(given(m, lanes)).astype(np.int64)
        if (count > size).any():
            raise EmulatorError("cp.async: source size exceeds the copy", count > size)
        located = m.shared.locate(to(m, lanes), size, lanes.flat_warps, "cp.async")
        reads = count > 0
        at = np.zeros(lanes.count, np.int64)
        if reads.any():
            active = lanes if reads.all() else lanes.select(reads)
            at[reads] = m.globals.locate(source(m, lanes)[reads], size, "cp.async")
            m.globals.count(active, at[reads], size, store=False)
        cells = m.shared.cells(located, size)
        m.shared.check_write(cells, lanes.flat_warps, "cp.async")
        m.shared.check_distinct(cells, "cp.async")
        m.shared.state[cells] |= PENDING
        m.copies.add(lanes.ids, [located, at, count], land)

    def land(m: Machine, threads: np.ndarray, data: list[np.ndarray]) -> None:
        located, at, count = data
        words = m.globals.view(size)[at // size].copy()
        words[count == 0] = 0
        partial = np.flatnonzero((count > 0) & (count < size))
        if len(partial):
            rows = words.view(np.uint8).reshape(-1, size)
            rows[partial] *= np.arange(size) < count[partial, None]
        m.shared.write(located, size, threads // 32, words, "cp.async", landing=True)

    return step
