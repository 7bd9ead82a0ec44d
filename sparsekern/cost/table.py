"""The coefficients of the cost model as a file: :class:`Table`, and which one holds here (:func:`current`).

``sparsekern calibrate`` writes JSON to $SPARSEKERN_CALIBRATION, by default ``sparsekern/calibration.json`` in the
user's cache folder ($XDG_CACHE_HOME or ~/.cache)::

    {"format": 1, "machine": {what it was measured on}, "seconds": of calibrating, "error": median of the fit,
     "yardstick": seconds, "busy": what showed that the machine was, or "",
     "coefficients": {name as in model.py: seconds per unit}}

Where there is none, ``default.json`` of the package holds: measured in the same way on one machine, whose name is in
it. It says which layers gain on processors like that one; only calibrating says so for this one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, info, ops
from .model import NAMES, Terms

FORMAT = 1
MACHINE = ("cpu", "isa", "torch", "sparsekern", "kernels")
SHIPPED = Path(__file__).with_name("default.json")

log = logging.getLogger("sparsekern")


@dataclass(frozen=True)
class Table:
    """Coefficients in seconds per unit, by name, and where they are from.

    Attributes:
        machine: what they were measured on, see :func:`machine`.
        seconds: how long measuring took.
        error: median of |predicted / measured - 1| over the measurements that they were fitted to.
        yardstick: seconds of the yardstick of ``timer.py``, which say how fast the machine was.
        busy: what showed that it was busy during the measurement, for people; empty where nothing did.
    """

    coefficients: Mapping[str, float]
    machine: Mapping[str, str]
    seconds: float
    error: float
    yardstick: float
    busy: str = ""

    def predict(self, terms: Terms) -> float:
        """What ``terms`` take."""
        return sum(self.coefficients[name] * amount for name, amount in terms.items())

    def source(self) -> str:
        """Where the coefficients are from, for people."""
        if self.machine == machine():
            busy = f" (busy when measured: {self.busy})" if self.busy else ""
            return f"the calibration of this machine{busy}"
        measured = f"{self.machine['cpu']} ({self.machine['isa']}), torch {self.machine['torch']}"
        return f"the package's own table, measured on {measured} (`sparsekern calibrate` measures this machine)"


@functools.cache
def machine() -> dict[str, str]:
    """What times depend on: processor, instruction set, versions, and the very library of kernels."""
    library = b"" if ops.CPU_KERNELS_MISSING else ops._LIBRARY.read_bytes()
    isa = "none" if ops.CPU_KERNELS_MISSING else torch.ops.sparsekern.cpu_isa()
    kernels = hashlib.sha256(library).hexdigest()[:16]
    return dict(zip(MACHINE, (info.cpu_model(), isa, torch.__version__, __version__, kernels), strict=True))


def path() -> Path:
    """Where this machine's calibration is kept."""
    chosen = os.environ.get("SPARSEKERN_CALIBRATION")
    return Path(chosen) if chosen else info.cache_folder() / "calibration.json"


@functools.cache
def current() -> Table:
    """The calibration of this machine, or, where there is none that holds, the table that comes with the package.

    Read once per process. A calibration that is damaged, or from another machine or version, is refused with a warning
    in the log and left alone.
    """
    file = path()
    if file.exists():
        try:
            return load(file, machine())
        except (OSError, ValueError) as error:
            log.warning("%s; `sparsekern calibrate` writes a new one. The package's own table is used.", error)
    return load(SHIPPED)


def load(file: Path, expected: Mapping[str, str] | None = None) -> Table:
    """Read a table.

    Args:
        file: the JSON file.
        expected: the machine that it must be of; any where None.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another machine or version; the message says which.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"calibration {file} is damaged: {error}") from error
    problem = _problem(data)
    if problem:
        raise ValueError(f"calibration {file} is damaged or of another version: {problem}")
    for key, value in (expected or {}).items():
        if data["machine"][key] != value:
            raise ValueError(f"calibration {file} is stale: its {key} is {data['machine'][key]!r}, here {value!r}")
    rest = (data["seconds"], data["error"], data["yardstick"], data.get("busy", ""))
    return Table(data["coefficients"], data["machine"], *rest)


def save(table: Table, file: Path) -> None:
    """Write a table; a file that is there already is replaced whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.write_text(json.dumps({"format": FORMAT, **asdict(table)}, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _problem(data: Any) -> str | None:
    """What keeps ``data`` from being a table of this version of the model."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return f"expected an object with format {FORMAT}"
    described = data.get("machine")
    if not isinstance(described, dict) or not all(isinstance(described.get(key), str) for key in MACHINE):
        return f"machine must hold {', '.join(MACHINE)}"
    if not all(_is_amount(data.get(key)) for key in ("seconds", "error", "yardstick")):
        return "seconds, error and yardstick must be numbers"
    if not isinstance(data.get("busy", ""), str):
        return "busy must be a text"
    given = data.get("coefficients")
    if not isinstance(given, dict) or given.keys() != NAMES:
        return "its coefficients are not those of this version's model"
    wrong = next((name for name, value in given.items() if not _is_amount(value)), None)
    return None if wrong is None else f"{wrong} must be a number of at least 0, got {given[wrong]!r}"


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
