"""Sets of threads. A register is an array [warps, 32]; a `Lanes` says which part of it an instruction touches."""

import functools

import numpy as np

WARP = 32


class Lanes:
    """The threads of a batch that execute one instruction together.

    `index` selects them in a register: a slice or warp numbers while all warps are whole (values are then [warps, 32]),
    else a pair (warp, lane) (values are then [threads]).
    """

    def __init__(self, ids: np.ndarray, total: int) -> None:
        self.ids = ids  # sorted thread numbers in the batch
        self.count = len(ids)
        self.total = total
        self.index: slice | np.ndarray | tuple[np.ndarray, np.ndarray]
        self.whole, self.shape = True, (self.count // WARP, WARP)
        if self.count == total:
            self.warps = np.arange(total // WARP)
            self.index = slice(None)
            return
        heads = ids[::WARP]
        if self.count % WARP == 0 and not (heads % WARP).any() and (ids[WARP - 1 :: WARP] - heads == WARP - 1).all():
            self.warps = heads // WARP
            first, last = int(self.warps[0]), int(self.warps[-1])
            dense = last - first + 1 == len(self.warps)
            self.index = slice(first, last + 1) if dense else self.warps
            return
        warp = ids // WARP
        self.whole, self.shape = False, (self.count,)
        self.warps = warp[np.flatnonzero(np.r_[True, warp[1:] != warp[:-1]])] if self.count else warp
        self.index = (warp, ids % WARP)

    @functools.cached_property
    def flat_warps(self) -> np.ndarray:
        """The warp of each thread, one entry a thread."""
        return self.ids // WARP

    def spread(self, values: np.ndarray) -> np.ndarray:
        """A value per thread (a constant is repeated), flat."""
        return np.broadcast_to(values, self.shape).reshape(-1)

    def by_warp(self, values: np.ndarray, fill: int) -> np.ndarray:
        """Flat values as [warps, 32], absent threads filled: what counters look at."""
        if self.whole:
            return values.reshape(self.shape)
        out = np.full((len(self.warps), WARP), fill, values.dtype)
        out[np.searchsorted(self.warps, self.flat_warps), self.ids % WARP] = values
        return out

    def select(self, mask: np.ndarray) -> "Lanes":
        return Lanes(self.ids[mask.reshape(-1)], self.total)


def merge(a: Lanes | None, b: Lanes) -> Lanes:
    return b if a is None else Lanes(np.sort(np.concatenate([a.ids, b.ids])), a.total)
