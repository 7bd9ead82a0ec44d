"""Shared memory of a batch of CTAs, with what is known about every cell of it.

A cell is as wide as the narrowest access of the kernel (accesses are aligned, so nothing is lost). Per cell: whether
it was written, whether an asynchronous copy to it is under way, how many asynchronous reads of it are, who wrote it
last and when, and when each warp last read it; where that happens, also when each warp wrote the same as others did in
one instruction, and when it last made an atomic access. Two accesses of which one writes must be ordered by barriers
(clocks.py). Threads of one warp count as ordered among themselves: a missing bar.warp.sync is not found.
"""

import numpy as np

from .clocks import Clocks
from .errors import EmulatorError, require
from .formats import UNSIGNED

# State of a cell. PROXY: written by the asynchronous proxy; BARRIER: an mbarrier object.
WRITTEN, PROXY, PENDING, BARRIER = 1, 2, 4, 8
COLUMN_BITS = 6  # of a writer's stamp: time << COLUMN_BITS | column


class SharedMemory:
    def __init__(self, ctas: int, size: int, cell: int, clocks: Clocks) -> None:
        self.limit, self.size = size, (size + 15) // 16 * 16  # what may be accessed, and the distance between CTAs
        self.cell = cell
        self.clocks = clocks
        self.bytes = np.full(max(16, ctas * self.size), 0xFF, np.uint8)
        cells = len(self.bytes) // cell
        self.state = np.zeros(cells, np.uint8)
        self.reading = np.zeros(cells, np.int16)
        self.writer = np.zeros(cells, np.int32)
        self.read_time = np.zeros((cells, clocks.per_cta), np.int32)
        # Made by the first such access; most kernels have none.
        self.shared_write_time: np.ndarray | None = None
        self.atomic_time: np.ndarray | None = None

    def view(self, size: int) -> np.ndarray:
        """The bytes as words of 1 to 8 bytes, or as rows of four 32-bit words for 16."""
        return self.bytes.view(np.uint32).reshape(-1, 4) if size == 16 else self.bytes.view(UNSIGNED[size])

    def locate(self, address: np.ndarray, size: int, warps: np.ndarray, what: str) -> np.ndarray:
        """Addresses in a CTA's window -> addresses in the batch, bounds and alignment checked."""
        if (address & (size - 1)).any():
            raise EmulatorError(
                f"misaligned {size}-byte shared {what} at {hex_of(address, address & (size - 1))}", address % size != 0
            )
        outside = (address < 0) | (address > self.limit - size)
        if outside.any():
            raise EmulatorError(
                f"shared {what} out of bounds at {hex_of(address, outside)} of {self.limit:#x}", outside
            )
        return address + warps // self.clocks.per_cta * self.size

    def cells(self, located: np.ndarray, size: int) -> np.ndarray:
        """The cells of each access, [accesses, cells]."""
        first = located // self.cell
        return first[:, None] if size == self.cell else first[:, None] + np.arange(size // self.cell)

    def check_read(self, cells: np.ndarray, warps: np.ndarray, what: str, asynchronous: bool = False) -> None:
        """Raise unless the cells hold data that `warps` may read. Asynchronous readers register separately."""
        state = self.check_data(cells, what)
        column, time = self.stamp(cells)
        known = self.clocks.knows(self.clocks.seen, warps[:, None], column, time)
        require(known, race(what, "reads", "wrote"))
        for times in (self.shared_write_time, self.atomic_time):
            self.check_times(times, cells, warps, f"race: {what} reads what another warp wrote, no barrier in between")
        if asynchronous:
            unfenced, ordinary = (
                f"{what} reads an ordinary write without a fence.proxy.async in between",
                state & PROXY == 0,
            )
            require(self.clocks.knows(self.clocks.proxied, warps[:, None], column, time) | ~ordinary, unfenced)
            for times in (self.shared_write_time, self.atomic_time):
                self.check_times(times, cells, warps, unfenced, self.clocks.proxied, ordinary)
        else:
            self.note_read(cells, warps[:, None])

    def check_data(self, cells: np.ndarray, what: str) -> np.ndarray:
        """The states of cells that hold data."""
        state = self.state[cells]
        if ((state & (WRITTEN | PENDING | BARRIER)) != WRITTEN).any():
            require(
                state & PENDING == 0, f"{what} reads shared memory before an asynchronous copy to it was waited for"
            )
            require(state & BARRIER == 0, f"{what} reads an mbarrier object as data")
            raise EmulatorError(f"{what} reads uninitialised shared memory", state & WRITTEN == 0)
        return state

    def check_times(
        self,
        times: np.ndarray | None,
        cells: np.ndarray,
        warps: np.ndarray,
        message: str,
        table: np.ndarray | None = None,
        of: np.ndarray | None = None,
    ) -> None:
        """Raise unless each warp knows what all warps of its CTA did at those times to the cells (those marked)."""
        if times is not None:
            known = (self.clocks.seen if table is None else table)[warps][:, None, : self.clocks.per_cta]
            late = (times[cells] > known).any(-1)
            if late.any():
                require(~late if of is None else ~(late & of), message)

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
        require(known, race(what, "overwrites", "wrote"))
        warps = warps[:, 0]
        for times in (self.shared_write_time, self.atomic_time):
            self.check_times(
                times, cells, warps, f"race: {what} overwrites what another warp wrote, no barrier in between"
            )
        if self.clocks.per_cta > 1:
            self.check_times(self.read_time, cells, warps, race(what, "overwrites", "reads"))

    def atomic(self, cells: np.ndarray, warps: np.ndarray) -> None:
        """Check and note atomic accesses, which do not race with each other, but with all others."""
        self.check_data(cells, "atomic")
        require(self.reading[cells] == 0, "atomic overwrites what an unfinished asynchronous operation reads")
        known = self.clocks.knows(self.clocks.seen, warps[:, None], *self.stamp(cells))
        wrote, reads = (
            f"race: atomic overwrites what another warp {did}, no barrier in between" for did in ("wrote", "reads")
        )
        require(known, wrote)
        self.check_times(self.shared_write_time, cells, warps, wrote)
        self.check_times(self.read_time, cells, warps, reads)
        if self.atomic_time is None:
            self.atomic_time = np.zeros_like(self.read_time)
        self.state[cells] = WRITTEN
        self.atomic_time[cells, self.clocks.column[warps][:, None]] = self.clocks.own[warps][:, None]

    def note_write(self, cells: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Returns which accesses share a cell with another warp's access of the same instruction."""
        clocks = self.clocks
        stamp = (clocks.own[warps] << COLUMN_BITS | clocks.column[warps])[:, None]
        self.state[cells] = WRITTEN
        self.writer[cells] = stamp
        shared = (self.writer[cells] != stamp).any(-1)
        if shared.any():  # the stamp is of one of them: the others are noted here
            if self.shared_write_time is None:
                self.shared_write_time = np.zeros_like(self.read_time)
            who = warps[shared][:, None]
            self.shared_write_time[cells[shared], clocks.column[who]] = clocks.own[who]
        return shared

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


def race(what: str, does: str, did: str) -> str:
    return f"race: {what} {does} what another warp {did}, no barrier in between"


def hex_of(address: np.ndarray, bad: np.ndarray) -> str:
    return hex(int(np.asarray(address)[np.asarray(bad) != 0][0]))
