"""Shared memory of a batch of CTAs, with what is known about every cell of it.

A cell is as wide as the narrowest access of the kernel (accesses are aligned, so nothing is lost). Per cell: whether
it was written, whether an asynchronous copy to it is under way, how many asynchronous reads of it are, who wrote it
last and when, and when each warp last read it. Two accesses of which one writes must be ordered by barriers
(clocks.py). Threads of one warp count as ordered among themselves: a missing bar.warp.sync is not found.
"""

import numpy as np

from .clocks import Clocks
from .errors import EmulatorError, require
from .formats import UNSIGNED

# State of a cell. PROXY: written by the asynchronous proxy; ATOMIC: by an atomic instruction; BARRIER: an mbarrier
# object.
WRITTEN, PROXY, ATOMIC, PENDING, BARRIER = 1, 2, 4, 8, 16
COLUMN_BITS = 6  # of a writer's stamp: time << COLUMN_BITS | column


class SharedMemory:
    def __init__(self, ctas: int, size: int, cell: int, clocks: Clocks) -> None:
        self.size = (size + 15) // 16 * 16
        self.cell = cell
        self.clocks = clocks
        self.bytes = np.full(max(16, ctas * self.size), 0xFF, np.uint8)
        cells = len(self.bytes) // cell
        self.state = np.zeros(cells, np.uint8)
        self.reading = np.zeros(cells, np.int16)
        self.writer = np.zeros(cells, np.int32)
        self.read_time = np.zeros((cells, clocks.per_cta), np.int32)

    def view(self, size: int) -> np.ndarray:
        """The bytes as words of 1 to 8 bytes, or as rows of four 32-bit words for 16."""
        return self.bytes.view(np.uint32).reshape(-1, 4) if size == 16 else self.bytes.view(UNSIGNED[size])

    def locate(self, address: np.ndarray, size: int, warps: np.ndarray, what: str) -> np.ndarray:
        """Addresses in a CTA's window -> addresses in the batch, bounds and alignment checked."""
        if (address & (size - 1)).any():
            raise EmulatorError(
                f"misaligned {size}-byte shared {what} at {hex_of(address, address & (size - 1))}", address % size != 0
            )
        outside = (address < 0) | (address > self.size - size)
        if outside.any():
            raise EmulatorError(f"shared {what} out of bounds at {hex_of(address, outside)} of {self.size:#x}", outside)
        return address + warps // self.clocks.per_cta * self.size

    def cells(self, located: np.ndarray, size: int) -> np.ndarray:
        """The cells of each access, [accesses, cells]."""
        first = located // self.cell
        return first[:, None] if size == self.cell else first[:, None] + np.arange(size // self.cell)

    def check_read(self, cells: np.ndarray, warps: np.ndarray, what: str, asynchronous: bool = False) -> None:
        """Raise unless the cells hold data that `warps` may read. Asynchronous readers register separately."""
        state = self.state[cells]
        if ((state & (WRITTEN | PENDING | BARRIER)) != WRITTEN).any():
            require(
                state & PENDING == 0, f"{what} reads shared memory before an asynchronous copy to it was waited for"
            )
            require(state & BARRIER == 0, f"{what} reads an mbarrier object as data")
            raise EmulatorError(f"{what} reads uninitialised shared memory", state & WRITTEN == 0)
        column, time = self.stamp(cells)
        warps = warps[:, None]
        known = self.clocks.knows(self.clocks.seen, warps, column, time)
        require(known, f"race: {what} reads what another warp wrote, no barrier in between")
        if asynchronous:
            known = self.clocks.knows(self.clocks.proxied, warps, column, time)
            require(
                known | (state & PROXY != 0), f"{what} reads an ordinary write without a fence.proxy.async in between"
            )
        else:
            self.note_read(cells, warps)

    def note_read(self, cells: np.ndarray, warps: np.ndarray) -> None:
        clocks = self.clocks
        self.read_time.reshape(-1)[cells * clocks.per_cta + clocks.column[warps]] = clocks.own[warps]

    def check_write(self, cells: np.ndarray, warps: np.ndarray, what: str, landing: bool = False) -> None:
        """Raise if somebody else may still read or write the cells. `landing`: the end of a copy that was announced."""
        state = self.state[cells]
        if state.max(initial=0) >= PENDING:  # PENDING or BARRIER
            require(state & BARRIER == 0, f"{what} overwrites an mbarrier object")
            require((state & PENDING == 0) | landing, f"{what} writes where an unfinished asynchronous copy will write")
        require(self.reading[cells] == 0, f"{what} overwrites what an unfinished asynchronous operation reads")
        warps = warps[:, None]
        known = self.clocks.knows(self.clocks.seen, warps, *self.stamp(cells))
        require(known, f"race: {what} overwrites what another warp wrote, no barrier in between")
        if self.clocks.per_cta > 1:
            late = self.read_time[cells] > self.clocks.seen[warps, : self.clocks.per_cta]
            if late.any():
                raise EmulatorError(
                    f"race: {what} overwrites what another warp reads, no barrier in between", late.any(-1)
                )

    def note_write(self, cells: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Returns which accesses share a cell with another warp's access of the same instruction."""
        clocks = self.clocks
        stamp = (clocks.own[warps] << COLUMN_BITS | clocks.column[warps])[:, None]
        self.state[cells] = WRITTEN
        self.writer[cells] = stamp
        return (self.writer[cells] != stamp).any(-1)

    def write(
        self, located: np.ndarray, size: int, warps: np.ndarray, words: np.ndarray, what: str, landing: bool = False
    ) -> None:
        """Store one word (or row of words) per access."""
        cells = self.cells(located, size)
        self.check_write(cells, warps, what, landing)
        view = self.view(size)
        view[located // size] = words
        shared = self.note_write(cells, warps)
        if shared.any():  # harmless only where all write the same
            lost = (view[located // size] != words).reshape(len(located), -1).any(-1)
            require(~(shared & lost), f"race: {what} of two warps write different values to one place")

    def check_distinct(self, cells: np.ndarray, what: str) -> None:
        """Two threads of one instruction that write one cell: which of them wins is undefined."""
        flat = np.sort(cells.reshape(-1))
        if (flat[1:] == flat[:-1]).any():
            raise EmulatorError(f"{what}: two threads write the same shared memory at once")

    def stamp(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stamp = self.writer[cells]
        return stamp & ((1 << COLUMN_BITS) - 1), stamp >> COLUMN_BITS


def hex_of(address: np.ndarray, bad: np.ndarray) -> str:
    return hex(int(np.asarray(address)[np.asarray(bad) != 0][0]))
