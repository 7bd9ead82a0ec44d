"""The table itself: what is asked (:class:`Settings`), one line of it (:class:`Row`), and the files it is kept in."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .cases import Case

TOLERANCE = 1e-5  # of the largest true value; float32 sums of these cases stay below 2e-6
BUSY = 20.0  # involuntary context switches per second; each costs about 4 ms


@dataclass(frozen=True)
class Settings:
    """What is measured for each case; ``rounds`` and ``limit_seconds`` are those of one group (``interleaved``)."""

    blocksizes: tuple[tuple[int, int], ...] = ((1, 1), (4, 1), (4, 4), (8, 8), (16, 16))
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 25
    limit_seconds: float = 5.0


FULL = Settings()
QUICK = Settings(((1, 1), (4, 1), (8, 8)), (0.8, 0.9, 0.95), (1,), rounds=15, limit_seconds=1.0)
QUICK_CASES = ("lenet-300-100-fc1", "lenet-300-100-fc2", "lenet-5-conv2", "linear-256x1024x1024", "conv3x3-128@16")


@dataclass(frozen=True)
class Row:
    """One line of the CSV. Times are microseconds per call; quantiles are over the rounds.

    ``speedup`` is the dense time over the sparse time of the same round (so p50 is the median of ratios), ``ideal``
    1 / density, ``gflops`` counts stored weights only. ``layout`` and ``dense_layout`` are the faster ones;
    activations lie in them already. ``switches_per_second`` counts how often the system gave the processor to another
    program while the row's group was timed. A long call loses more by this than a short one, so that a busy machine
    flatters the sparse side: above :data:`BUSY` the row is not to be trusted.
    """

    case: str
    product: str
    implementation: str
    blocksize: str
    sparsity: float
    density: float
    threads: int
    layout: str
    dense_layout: str
    dense_us_p20: float
    dense_us_p50: float
    dense_us_p80: float
    sparse_us_p20: float
    sparse_us_p50: float
    sparse_us_p80: float
    speedup_p20: float
    speedup_p50: float
    speedup_p80: float
    ideal: float
    gflops: float
    rounds: int
    switches_per_second: float


@dataclass
class Results:
    """Rows so far, and what has no row because its result was wrong."""

    settings: Settings
    cases: Sequence[Case]
    rows: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    complete: bool = False

    def write(self, folder: Path, name: str, machine: dict[str, Any]) -> None:
        """Write ``folder/name.csv`` and ``.json``, replacing what was there."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Row)])
            writer.writeheader()
            writer.writerows({key: _rounded(value) for key, value in asdict(row).items()} for row in self.rows)
        header = {
            "complete": self.complete,
            "command": ["python", "-m", "bench", *sys.argv[1:]],
            "machine": machine,
            "settings": asdict(self.settings),
            "cases": {case.name: asdict(case) for case in self.cases},
            "tolerance": TOLERANCE,
            "refused": self.refused,
        }
        (folder / f"{name}.json").write_text(json.dumps(header, indent=1) + "\n")


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value
