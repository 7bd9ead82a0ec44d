"""The table itself: one line of it (:class:`Row`), and the files it is kept in (:class:`Results`)."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .cases import CASES
from .ceilings import Ceilings
from .cover import Cover

TOLERANCE = 1e-5  # of the largest true value; float32 sums of these cases stay below 2e-6
BUSY = 20.0  # involuntary context switches per second and thread; each costs about 4 ms


@dataclass(frozen=True)
class Row:
    """One line of the CSV. Times are microseconds per call; quantiles are over the rounds.

    ``speedup`` is the dense time over the sparse time of the same round (so p50 is the median of ratios), ``ideal``
    what the multiply-adds that are kept allow (1 / density of a layer), ``gflops`` counts stored weights only.
    ``layout`` and ``mode`` (eager, compiled), ``dense_layout`` and ``dense_mode`` are the fastest ones; activations lie
    in the layout already. ``gb_s`` is what must be moved (``Case.traffic``) over the time; ``peak_percent`` and
    ``bandwidth_percent`` are shares of the ceilings measured in the same run (:class:`bench.ceilings.Ceilings`).
    ``switches_per_second`` counts how often the system gave the processor to another program while the row's group was
    timed; calls that this hit are dropped, but caches are not what they were: above :data:`BUSY` the row is not to be
    trusted.
    """

    case: str
    batch: int
    product: str
    implementation: str
    blocksize: str
    sparsity: float
    density: float
    threads: int
    layout: str
    mode: str
    dense_layout: str
    dense_mode: str
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
    gb_s: float | None
    peak_percent: float | None
    bandwidth_percent: float | None
    rounds: int
    switches_per_second: float


@dataclass
class Results:
    """Rows so far, and what has no row because its result was wrong."""

    cover: Cover
    ceilings: Ceilings
    peers: dict[str, str]  # name: version, or why it is missing
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
        cases = {case for part in self.cover.parts for case in part.cases}
        header = {
            "complete": self.complete,
            "command": ["python", "-m", "bench", *sys.argv[1:]],
            "machine": machine,
            "ceilings": asdict(self.ceilings),
            "peers": self.peers,
            "cover": asdict(self.cover),
            "cases": {name: asdict(case) for name, case in CASES.items() if name in cases},
            "tolerance": TOLERANCE,
            "refused": self.refused,
        }
        (folder / f"{name}.json").write_text(json.dumps(header, indent=1) + "\n")


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
