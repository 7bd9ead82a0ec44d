"""What a core can do at most, measured in the run itself: multiply-adds in registers, and reading memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from sparsekern import info

# Sizes of buffers that stand for the levels of the memory hierarchy: L1, L2, L3, and memory itself.
SIZES = (16 << 10, 256 << 10, 4 << 20, 256 << 20)
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """float32 GFLOP/s, and GB/s (1e9 bytes) by size of the buffer, of all threads together, by number of threads.

    Empty, with the reason in ``isa``, where ``sparsekern._native`` is not built.
    """

    isa: str  # the instructions that were measured
    gflops: dict[int, float] = field(default_factory=dict)
    gb_s: dict[int, dict[int, float]] = field(default_factory=dict)

    def peak_percent(self, gflops: float, threads: int) -> float | None:
        return 100 * gflops / self.gflops[threads] if threads in self.gflops else None

    def bandwidth_percent(self, gb_s: float | None, working_set: float | None, threads: int) -> float | None:
        """Of the rate at which the smallest measured buffer that would hold ``working_set`` bytes is read."""
        if gb_s is None or working_set is None or threads not in self.gb_s:
            return None
        rates = self.gb_s[threads]
        size = min((size for size in rates if size * threads >= working_set), default=max(rates))
        return 100 * gb_s / rates[size]


def measure_ceilings(threads: Sequence[int], seconds: float = 0.05) -> Ceilings:
    """Of one to several threads at once, each with a buffer of its own; medians of several tries."""
    native = info.native_module()
    if native is None:
        return Ceilings("not measured: sparsekern._native is not built")
    gflops, gb_s = {}, {}
    for n in threads:
        gflops[n] = _together(n, lambda: native.fma_peak(seconds)[0])
        gb_s[n] = {size: _together(n, _reader(native, size, seconds)) for size in SIZES}
    return Ceilings(native.fma_peak(seconds)[1], gflops, gb_s)


def _reader(native: Any, size: int, seconds: float) -> Callable[[], float]:
    return lambda: float(native.read_bandwidth(size, seconds)[0])


def _together(threads: int, rate: Callable[[], float]) -> float:
    with ThreadPoolExecutor(threads) as pool:
        return median(sum(pool.map(lambda _: rate(), range(threads))) for _ in range(REPEATS))
