"""bar / barrier with ids and thread counts, warp barriers, fences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError, require
from .lanes import WARP, Lanes
from .operands import Builder, Step, instruction
from .parser import Instruction

if TYPE_CHECKING:
    from .machine import Machine

IDS = 16


class Barriers:
    """The 16 hardware barriers of each CTA. Warps arrive as a whole; what counts is the id, not the position in the
    code.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        ctas, per_cta = len(machine.ctas), machine.warps_per_cta
        columns = machine.clocks.columns
        self.arrived = np.zeros((IDS, ctas), np.int64)  # warps
        self.expected = np.zeros((IDS, ctas), np.int64)
        self.parked = np.full((IDS, ctas, per_cta), -1, np.int64)  # where the warp goes on, -1: not waiting
        self.seen = np.zeros((IDS, ctas, columns), np.int32)
        self.proxied = np.zeros((IDS, ctas, columns), np.int32)

    def arrive(self, lanes: Lanes, id: int, count: int | None, resume: int | None) -> None:
        """`count` threads take part (None: all of the CTA). `resume`: where to go on once all are there, None: no
        waiting.
        """
        machine, per_cta = self.machine, self.machine.warps_per_cta
        if not lanes.whole:
            raise EmulatorError("divergent barrier: only a part of a warp arrives")
        if not 0 <= id < IDS:
            raise EmulatorError(f"barrier {id}: there are {IDS}")
        expected = per_cta if count is None else count // WARP
        if count is not None and (count % WARP or not 0 < count <= per_cta * WARP):
            raise EmulatorError(f"barrier {id}: {count} threads, a multiple of 32 up to {per_cta * WARP} is expected")
        warps = lanes.warps
        ctas, column = warps // per_cta, machine.clocks.column[warps]
        if count is None:
            alive = machine.alive.reshape(len(machine.ctas), -1).all(1)
            require(np.repeat(alive[ctas], WARP), "some threads of the CTA have exited and never reach this barrier")
        busy = self.arrived[id][ctas] > 0
        if (self.expected[id][ctas][busy] != expected).any():
            raise EmulatorError(f"barrier {id}: its participants state different thread counts")
        self.expected[id][ctas] = expected
        seen, proxied = machine.clocks.release(warps)
        np.maximum.at(self.seen[id], ctas, seen)
        np.maximum.at(self.proxied[id], ctas, proxied)
        if resume is not None:
            self.parked[id, ctas, column] = resume
        np.add.at(self.arrived[id], ctas, 1)
        touched = np.unique(ctas)
        if (self.arrived[id][touched] > self.expected[id][touched]).any():
            raise EmulatorError(f"barrier {id}: more threads arrive than it expects")
        full = touched[self.arrived[id][touched] == expected]
        if len(full):
            self._open(id, full)

    def _open(self, id: int, ctas: np.ndarray) -> None:
        machine, per_cta = self.machine, self.machine.warps_per_cta
        which, column = np.nonzero(self.parked[id][ctas] >= 0)
        warps = ctas[which] * per_cta + column
        positions = self.parked[id][ctas[which], column]
        machine.clocks.acquire(warps, self.seen[id][ctas[which]], self.proxied[id][ctas[which]])
        for position in np.unique(positions):
            ids = (warps[positions == position, None] * WARP + np.arange(WARP)).reshape(-1)
            machine.make_ready(int(position), Lanes(ids, machine.threads))
        machine.counters.barriers += len(ctas)
        self.parked[id][ctas] = -1
        for table in (self.arrived, self.seen, self.proxied):
            table[id][ctas] = 0

    def check_deadlock(self) -> None:
        waiting = np.argwhere(self.parked >= 0)
        if len(waiting):
            id, cta, column = map(int, waiting[0])
            i = self.machine.launch.kernel.code[int(self.parked[id, cta, column]) - 1]
            warp = cta * self.machine.warps_per_cta + column
            raise EmulatorError(
                f"deadlock: barrier {id} has {self.arrived[id, cta] * WARP} of {self.expected[id, cta] * WARP} threads"
                f"\n  PTX line {i.line}: {i.text}\n  {self.machine.describe(warp * WARP)}"
            )
        if self.arrived.any():
            raise EmulatorError("the kernel ended with an unfinished bar.arrive")


@instruction("bar barrier", modifiers="sync|arrive|aligned|cta|warp")
def bar(b: Builder, i: Instruction, types: list[str]) -> Step:
    if "warp" in i.modifiers:
        return warp_barrier
    resume = None if "arrive" in i.modifiers else i.position + 1
    ids = b.get(i.operands[0], "u32")
    counts = b.get(i.operands[1], "u32") if len(i.operands) > 1 else None

    def step(m: Machine, lanes: Lanes) -> bool:
        id = uniform(lanes, ids(m, lanes), "barrier id")
        count = None if counts is None else uniform(lanes, counts(m, lanes), "barrier count")
        m.barriers.arrive(lanes, id, count, resume)
        return resume is not None

    return step


def uniform(lanes: Lanes, values: np.ndarray, what: str) -> int:
    flat = np.asarray(values).reshape(-1)
    if (flat != flat[0]).any():
        raise EmulatorError(f"{what} differs between threads: not modelled")
    return int(flat[0])


def warp_barrier(m: Machine, lanes: Lanes) -> None:
    if not lanes.whole:
        raise EmulatorError("divergent bar.warp.sync")


@instruction(
    "fence membar",
    modifiers=r"proxy|async|acq_rel|sc|cta|gpu|gl|sys|cluster|release|acquire|mbarrier_init|shared::cta|global|sync_restrict::\S+",
)
def fence(b: Builder, i: Instruction, types: list[str]) -> Step:
    if "proxy" in i.modifiers and i.modifiers[-1] != "global":
        return lambda m, lanes: m.clocks.fence_proxy(lanes.warps)
    return lambda m, lanes: None


@instruction(
    "griddepcontrol prefetch prefetchu nanosleep setmaxnreg applypriority discard nop", types="u32", modifiers=r"\S+"
)
def no_effect(b: Builder, i: Instruction, types: list[str]) -> Step:
    """Hints: they change when and where things happen, not what."""
    return lambda m, lanes: None


@instruction("implicit_def")
def implicit_def(b: Builder, i: Instruction, types: list[str]) -> Step:
    """LLVM says that a register's value is of no interest: it counts as written and keeps its poison."""
    b.writes[i.position].add(b.register(i.operands[0])[0])
    return lambda m, lanes: None
