"""mbarrier objects: phases, arrivals, expected bytes, and the threads parked on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError, require
from .lanes import Lanes
from .operands import Builder, Step, instruction
from .parser import Instruction
from .shared_memory import BARRIER, WRITTEN

if TYPE_CHECKING:
    from .machine import Machine

MOST = (1 << 20) - 1  # arrivals and bytes that the hardware's fields hold


class Mbarriers:
    """All mbarrier objects of a batch, as slots of a few arrays.

    A phase completes when no arrival and no byte is outstanding. Copies that a barrier tracks stay queued until every
    other thread of the batch is stuck or done and somebody waits for them: the latest moment a GPU could finish them.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.slots: dict[int, int] = {}  # address in the batch -> slot
        columns = machine.clocks.columns
        self.count, self.outstanding, self.bytes, self.phase = (np.zeros(0, np.int64) for _ in range(4))
        self.gathering = np.zeros((2, 0, columns), np.int32)  # clocks handed on in this phase: seen, proxied
        self.complete = np.zeros((2, 0, columns), np.int32)  # in the completed phases
        self.queues: dict[int, list] = {}  # slot -> copies under way
        self.parked: list[tuple[int, Lanes, np.ndarray]] = []  # position, threads, slots
        self.refused = np.full(machine.threads, -1)  # the position at which a thread's last try_wait said no

    def initialise(self, warps: np.ndarray, located: np.ndarray, count: np.ndarray) -> None:
        shared = self.machine.shared
        cells = shared.cells(located, 8)
        shared.check_write(cells, warps, "mbarrier.init")
        shared.note_write(cells, warps)
        shared.state[cells] |= BARRIER
        for address, n in zip(located.tolist(), count.tolist(), strict=True):
            if not 0 < n <= MOST:
                raise EmulatorError(f"mbarrier.init: count {n}, 1 to {MOST} is expected")
            slot = self.slots.get(address)
            if slot is None:
                slot = self.slots[address] = len(self.count)
                for name in ("count", "outstanding", "bytes", "phase"):
                    setattr(self, name, np.append(getattr(self, name), 0))
                for name in ("gathering", "complete"):
                    setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, 1), (0, 0))))
            self.count[slot] = self.outstanding[slot] = n
            self.bytes[slot] = self.phase[slot] = 0
            self.queues[slot] = []

    def find(self, warps: np.ndarray, located: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(located, return_inverse=True)
        slots = np.array([self.slots.get(int(a), -1) for a in unique])[inverse.reshape(-1)]
        require(slots >= 0, "mbarrier used before mbarrier.init")
        shared = self.machine.shared
        cells = shared.cells(located, 8)
        known = shared.clocks.knows(shared.clocks.seen, warps[:, None], *shared.stamp(cells))
        require(known, "race: mbarrier used while another warp's mbarrier.init is not ordered before it")
        shared.note_read(cells, warps[:, None])  # so that an mbarrier.inval must be ordered after it
        return slots

    def invalidate(self, warps: np.ndarray, located: np.ndarray) -> None:
        slots, shared = self.find(warps, located), self.machine.shared
        cells = shared.cells(located, 8)
        shared.state[cells] = WRITTEN
        shared.check_write(cells, warps, "mbarrier.inval")
        shared.state[cells] = 0
        for address, slot in zip(located.tolist(), slots.tolist(), strict=True):
            if self.queues[slot]:
                raise EmulatorError("mbarrier.inval while copies are under way")
            del self.slots[address]

    def arrive(self, warps: np.ndarray, slots: np.ndarray, arrivals: np.ndarray, expected: np.ndarray) -> None:
        handed = self.machine.clocks.release(np.unique(warps))
        row = np.searchsorted(np.unique(warps), warps)
        for kind in (0, 1):
            np.maximum.at(self.gathering[kind], slots, handed[kind][row])
        np.add.at(self.bytes, slots, expected)
        np.subtract.at(self.outstanding, slots, arrivals)
        if (self.outstanding[slots] < 0).any():
            raise EmulatorError("mbarrier: more arrivals than it expects", self.outstanding[slots] < 0)
        if (np.abs(self.bytes[slots]) > MOST).any():
            raise EmulatorError("mbarrier: too many bytes expected")
        self._settle(np.unique(slots))

    def _settle(self, slots: np.ndarray) -> None:
        done = slots[(self.outstanding[slots] == 0) & (self.bytes[slots] == 0)]
        if not len(done):
            return
        self.phase[done] ^= 1
        self.outstanding[done] = self.count[done]
        self.complete[:, done] = np.maximum(self.complete[:, done], self.gathering[:, done])
        self.gathering[:, done] = 0
        woken, self.parked = self.parked, []
        for position, lanes, _ in woken:
            self.machine.make_ready(position, lanes)

    def wait(self, lanes: Lanes, slots: np.ndarray, parity: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Which threads find the phase of this parity complete, and which go on. Those that do not are parked at
        `position`.

        A thread is told once that the phase is incomplete, as the hardware may; when it asks again it sleeps.
        """
        done = self.phase[slots] != (parity & 1)
        for kind, table in enumerate((self.machine.clocks.seen, self.machine.clocks.proxied)):
            np.maximum.at(table, lanes.flat_warps[done], self.complete[kind][slots[done]])
        goes_on = done | (self.refused[lanes.ids] != position)
        self.refused[lanes.ids] = np.where(done, -1, position)
        if not goes_on.all():
            self.parked.append((position, lanes.select(~goes_on), slots[~goes_on]))
        return done, goes_on

    def land_awaited(self) -> bool:
        """Everything is stuck: let the copies land that somebody waits for. False if there are none."""
        wanted = sorted({int(s) for _, _, slots in self.parked for s in np.unique(slots) if self.queues[int(s)]})
        for slot in wanted:
            queue, self.queues[slot] = self.queues[slot], []
            for land, size in queue:
                land()
                self.bytes[slot] -= size
        if wanted:
            self._settle(np.array(wanted))
        return bool(self.machine.ready)

    def check_deadlock(self) -> None:
        if self.parked:
            position, lanes, slots = self.parked[0]
            i = self.machine.launch.kernel.code[position]
            slot = int(slots[0])
            raise EmulatorError(
                f"deadlock: an mbarrier waits for {self.outstanding[slot]} arrivals and {self.bytes[slot]} bytes"
                f"\n  PTX line {i.line}: {i.text}\n  {self.machine.describe(int(lanes.ids[0]))}"
            )


@instruction(
    "mbarrier",
    modifiers=r"init|inval|arrive|expect_tx|try_wait|parity|shared|shared::cta|b64|release|acquire|relaxed|cta",
)
def mbarrier(b: Builder, i: Instruction, types: list[str]) -> Step:
    kind = i.modifiers[0]
    if kind == "try_wait":
        return try_wait(b, i)
    operands = i.operands
    if kind == "arrive":
        if operands[0] != "_":
            raise EmulatorError("mbarrier.arrive with a state result is not modelled")
        operands = operands[1:]
    address = b.address(operands[0])
    number = b.get(operands[1], "u32") if len(operands) > 1 else None
    expects = "expect_tx" in i.modifiers

    def step(m: Machine, lanes: Lanes) -> None:
        located = m.shared.locate(address(m, lanes), 8, lanes.flat_warps, "mbarrier")
        n = np.ones(lanes.count, np.int64) if number is None else lanes.spread(number(m, lanes)).astype(np.int64)
        if kind == "init":
            m.mbarriers.initialise(lanes.flat_warps, located, n)
            return
        if kind == "inval":
            m.mbarriers.invalidate(lanes.flat_warps, located)
            return
        slots = m.mbarriers.find(lanes.flat_warps, located)
        nothing = np.zeros_like(n)
        arrivals = nothing if kind == "expect_tx" else np.ones_like(n) if expects else n
        m.mbarriers.arrive(lanes.flat_warps, slots, arrivals, n if expects else nothing)

    return step


def try_wait(b: Builder, i: Instruction) -> Step:
    if "parity" not in i.modifiers:
        raise EmulatorError("mbarrier.try_wait without .parity is not modelled")
    put, address, parity = b.put(i.operands[0], "pred"), b.address(i.operands[1]), b.get(i.operands[2], "u32")

    def step(m: Machine, lanes: Lanes) -> bool:
        located = m.shared.locate(address(m, lanes), 8, lanes.flat_warps, "mbarrier")
        slots = m.mbarriers.find(lanes.flat_warps, located)
        done, goes_on = m.mbarriers.wait(lanes, slots, lanes.spread(parity(m, lanes)).astype(np.int64), i.position)
        if goes_on.all():
            put(m, lanes, done.reshape(lanes.shape))
            return False
        if goes_on.any():
            awake = lanes.select(goes_on)
            put(m, awake, done[goes_on].reshape(awake.shape))
            m.make_ready(i.position + 1, awake)
        return True

    return step
