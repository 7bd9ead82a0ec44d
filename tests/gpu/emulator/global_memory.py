"""Global memory of a launch: the storages behind the arguments, copied into one arena.

Each storage has a window of addresses of its own, far from those of others: a wrong stride or offset never lands in
another argument.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .counters import Counters, sectors
from .errors import EmulatorError, require
from .formats import UNSIGNED
from .lanes import Lanes

BASE = 1 << 40  # no valid pointer fits 32 bits: truncated pointers are found
WINDOW_BITS = 36
GAP = 256


@dataclasses.dataclass(frozen=True)
class Pointer:
    """A pointer argument: `offset` bytes into `storage` (uint8, 1-D). All of the storage may be accessed."""

    storage: np.ndarray
    offset: int = 0


class TensorMap:
    """What cuTensorMapEncodeTiled would encode, innermost dimension first, strides in bytes.

    Elements outside `dims` read as zero and are not written. `swizzle` is 0, 32, 64 or 128 (bytes).
    """

    def __init__(
        self,
        array: np.ndarray,
        offset: int,
        element_size: int,
        dims: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: int = 0,
    ) -> None:
        self.array, self.offset, self.element_size = array, offset, element_size
        self.dims, self.strides, self.box, self.swizzle = tuple(dims), tuple(strides), tuple(box), swizzle
        inner = self.box[0] * element_size
        if any(stride % 16 for stride in self.strides[1:]) or self.strides[0] != element_size:
            raise EmulatorError("tensor map: outer strides must be multiples of 16 bytes, the innermost dense")
        if inner % 16 or swizzle not in (0, 32, 64, 128) or (swizzle and inner > swizzle):
            raise EmulatorError(f"tensor map: inner box of {inner} bytes does not go with swizzle {swizzle}")
        if not len(self.dims) == len(self.strides) == len(self.box) <= 5 or any(not 0 < b <= 256 for b in self.box):
            raise EmulatorError("tensor map: 1 to 5 dimensions, boxes of 1 to 256")
        if any(dim <= 0 for dim in self.dims):
            raise EmulatorError("tensor map: dimensions must be positive")


class GlobalMemory:
    def __init__(self, arrays: Sequence[np.ndarray], counters: Counters) -> None:
        self.counters = counters
        spans = sorted((start_of(a), start_of(a) + a.nbytes) for a in arrays)
        self.clusters: list[tuple[int, int, int]] = []  # first and last host address, arena offset
        size = GAP
        for start, stop in spans:
            if self.clusters and start < self.clusters[-1][1]:  # views of one storage share it
                first, last, at = self.clusters[-1]
                self.clusters[-1] = (first, max(last, stop), at)
            else:
                self.clusters.append((start, stop, size))
            first, last, at = self.clusters[-1]
            size = at + (last - first + 2 * GAP - 1) // GAP * GAP
        self.starts = np.array([at for _, _, at in self.clusters] or [0])
        self.spans = np.array([last - first for first, last, _ in self.clusters] or [0])
        self.bytes = np.zeros(size + GAP, np.uint8)
        self.valid = np.zeros(len(self.bytes), np.uint8)  # 1 where an access is allowed
        self.loaded = np.zeros(len(self.bytes), np.uint8)
        self.stored = np.zeros(len(self.bytes), np.uint8)
        self.arrays = list(arrays)
        for array in arrays:
            at = self.offset(array)
            self.bytes[at : at + array.nbytes] = as_bytes(array)
            self.valid[at : at + array.nbytes] = 1

    def offset(self, array: np.ndarray) -> int:
        """Where an argument begins in the arena."""
        start = start_of(array)
        return next(at + start - first for first, _, at in reversed(self.clusters) if first <= start)

    def address(self, array: np.ndarray) -> int:
        """The pointer that the kernel gets for it."""
        start = start_of(array)
        number, first = next((n, c[0]) for n, c in reversed(list(enumerate(self.clusters))) if c[0] <= start)
        return BASE + (number << WINDOW_BITS) + start - first

    def finish(self) -> None:
        """Copy what was stored back, and count."""
        for array in self.arrays:
            at = self.offset(array)
            if self.stored[at : at + array.nbytes].any():
                if not array.flags.writeable:
                    raise EmulatorError("the kernel stored to a read-only array")
                as_bytes(array)[:] = self.bytes[at : at + array.nbytes]
        self.counters.load_bytes_unique = int(np.count_nonzero(self.loaded))
        self.counters.store_bytes_unique = int(np.count_nonzero(self.stored))

    def view(self, size: int) -> np.ndarray:
        return rows(self.bytes, size)

    def locate(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        """Device addresses -> arena offsets, bounds and alignment checked."""
        relative = address.astype(np.int64) - BASE
        require(relative % size == 0, f"misaligned {size}-byte global {what}")
        window = relative >> WINDOW_BITS
        require((window >= 0) & (window < len(self.starts)), f"global {what} out of bounds")
        inside = relative & ((1 << WINDOW_BITS) - 1)
        require(inside <= self.spans[window] - size, f"global {what} out of bounds")
        return self.check(self.starts[window] + inside, size, what)

    def check(self, at: np.ndarray, size: int, what: str) -> np.ndarray:
        """Raise unless these places of the arena may be accessed."""
        require((at >= 0) & (at <= len(self.bytes) - size), f"global {what} out of bounds")
        allowed = rows(self.valid, size)[at // size]
        full = ONES[size] if size in ONES else ONES[4]
        ok = allowed == full
        require(ok, f"global {what} out of bounds")
        return at

    def count(self, lanes: Lanes, at: np.ndarray, size: int, store: bool) -> None:
        counters = self.counters
        needed = sectors(lanes.by_warp(at, -1), size)
        rows(self.stored if store else self.loaded, size)[at // size] = ONES.get(size, ONES[4])
        if store:
            counters.store_sectors += needed
            counters.store_bytes += size * len(at)
        else:
            counters.load_sectors += needed
            counters.load_bytes += size * len(at)


ONES = {size: np.frombuffer(b"\1" * size, dtype)[0] for size, dtype in UNSIGNED.items()}


def rows(array: np.ndarray, size: int) -> np.ndarray:
    """Bytes as words, or as rows of four 32-bit words for 16 bytes."""
    return array.view(np.uint32).reshape(-1, 4) if size == 16 else array.view(UNSIGNED[size])


def start_of(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def as_bytes(array: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise EmulatorError("array arguments must be contiguous: pass a Pointer into the storage")
    return array.reshape(-1).view(np.uint8)
