"""The files of a run, each written whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import Any

from .. import plots
from ..files import write_text
from .loop import Point

RESULT, HISTORY, MODEL = "result.json", "history.csv", "model.safetensors"


def holds_run(out: Path) -> bool:
    """Whether the folder holds what would be lost: the figures or the network of a run, complete or not."""
    return any((out / name).exists() for name in (RESULT, HISTORY, MODEL))


def clear(out: Path) -> None:
    """Remove the files of an earlier run, and what a killed one left, so that none is taken for one of this run."""
    names = (RESULT, HISTORY, MODEL, *plots.NAMES)
    parts = (out / f"{name}.part" for name in names)
    for path in (*(out / name for name in names), *parts, *out.glob(f"{MODEL}.*.tmp")):
        path.unlink(missing_ok=True)


def write(out: Path, result: Mapping[str, Any], history: Iterable[Point]) -> None:
    """result.json and history.csv of what there is so far."""
    text = StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(point) for point in history)
    write_text(out / HISTORY, text.getvalue())
    write_text(out / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")
