"""What a launch did, in the units a performance model wants."""

import dataclasses
from collections import Counter

import numpy as np

BANKS = 32


@dataclasses.dataclass
class Counters:
    """Counts over all CTAs of a launch.

    `instructions` counts warp instructions by opcode, `mma` matrix instructions by shape and type (a warp's mma.sync,
    a warp group's wgmma), `mma_flops` two per multiply-add, `fma` single fused multiply-adds of threads (scalar and
    packed). Sectors are the 32-byte pieces a warp request needs from global memory. `*_bytes_unique` are bytes of
    memory touched at least once. A wavefront is one cycle of the 32 shared-memory banks; the ideal is what the
    request needs without conflicts.
    """

    instructions: Counter[str] = dataclasses.field(default_factory=Counter)
    warp_instructions: int = 0
    thread_instructions: int = 0
    warps: int = 0
    ctas: int = 0
    mma: Counter[str] = dataclasses.field(default_factory=Counter)
    mma_flops: int = 0
    fma: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    load_bytes_unique: int = 0
    store_bytes_unique: int = 0
    atomics: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_ideal: int = 0
    barriers: int = 0

    @property
    def instructions_per_warp(self) -> float:
        return self.warp_instructions / max(1, self.warps)

    @property
    def bank_conflict_ratio(self) -> float:
        return self.shared_wavefronts / max(1, self.shared_wavefronts_ideal)

    def shared_request(self, rows: np.ndarray) -> None:
        """`rows` holds the 4-byte words that each request (one row) touches at once; -1 marks absent threads.

        Every bank delivers one word a wavefront, to any number of threads.
        """
        bank = rows % BANKS + np.arange(len(rows))[:, None] * BANKS
        present = rows >= 0
        busiest = np.bincount(bank[present], minlength=len(rows) * BANKS).reshape(-1, BANKS).max(1)
        again = np.flatnonzero(busiest > 1)  # perhaps the same word twice: look closer
        if len(again):
            words = np.sort(rows[again], axis=1)
            new = words >= 0
            new[:, 1:] &= words[:, 1:] != words[:, :-1]
            bank = words % BANKS + np.arange(len(words))[:, None] * BANKS
            busiest[again] = np.bincount(bank[new], minlength=len(words) * BANKS).reshape(-1, BANKS).max(1)
        self.shared_wavefronts += int(busiest.sum())
        self.shared_wavefronts_ideal += int((busiest > 0).sum())


def sectors(addresses: np.ndarray, size: int) -> int:
    """32-byte sectors needed by each row (a warp) of byte addresses [warps, 32]; negative: absent. Accesses are
    aligned.
    """
    piece = addresses >> 5
    if (np.diff(piece, axis=1) < 0).any():
        piece = np.sort(piece, axis=1)
    new = piece >= 0
    new[:, 1:] &= piece[:, 1:] != piece[:, :-1]
    return int(new.sum()) * max(1, size // 32)
