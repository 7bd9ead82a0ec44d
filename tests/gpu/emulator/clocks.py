"""Happens-before between the warps of a CTA, as vector clocks.

`seen[w, v]` is the latest time of warp v (of the same CTA) whose effects warp w may rely on; a warp's own time
advances when it releases (at barriers, arrivals, proxy fences). `proxied` is the same for what is also visible to the
asynchronous proxy (wgmma, TMA): ordinary writes need a fence.proxy.async on the way there. Column `warps_per_cta` is
the TMA unit.
"""

import numpy as np


class Clocks:
    def __init__(self, ctas: int, warps_per_cta: int) -> None:
        self.per_cta = warps_per_cta
        self.columns = warps_per_cta + 1
        self.tma = warps_per_cta
        self._tma_time = np.zeros(ctas, np.int32)
        self.seen = np.zeros((ctas * warps_per_cta, self.columns), np.int32)
        self.proxied = np.zeros_like(self.seen)
        warps = np.arange(ctas * warps_per_cta)
        self.column = warps % warps_per_cta  # of a warp in its CTA
        self.own = self.seen.reshape(-1)[warps * self.columns + self.column]  # times, kept flat for speed
        self.tick(warps)

    def tick(self, warps: np.ndarray) -> None:
        self.own[warps] += 1
        self.seen[warps, self.column[warps]] = self.own[warps]

    def next_tma(self, warp: int) -> int:
        """A new time of the TMA unit in the CTA of this warp."""
        self._tma_time[warp // self.per_cta] += 1
        return int(self._tma_time[warp // self.per_cta])

    def knows(self, table: np.ndarray, warps: np.ndarray, column: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Whether each warp may rely on `column`'s effects up to `time`."""
        return table.reshape(-1)[warps * self.columns + column] >= time

    def fence_proxy(self, warps: np.ndarray) -> None:
        self.proxied[warps] = np.maximum(self.proxied[warps], self.seen[warps])
        self.tick(warps)

    def release(self, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What these warps hand on; what they do afterwards is not part of it."""
        handed = self.seen[warps].copy(), self.proxied[warps].copy()
        self.tick(warps)
        return handed

    def acquire(self, warps: np.ndarray, seen: np.ndarray, proxied: np.ndarray) -> None:
        self.seen[warps] = np.maximum(self.seen[warps], seen)
        self.proxied[warps] = np.maximum(self.proxied[warps], proxied)
