"""The files of a run, each written whole or not at all."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import Any

from .. import plots
from .loop import Point

RESULT, HISTORY, MODEL = "result.json", "history.csv", "model.safetensors"


def prepare(out: Path) -> None:
    """Make the folder and remove the files of an earlier run in it, so that none is taken for one of this run."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, HISTORY, MODEL, *plots.NAMES):
        (out / name).unlink(missing_ok=True)


def write(out: Path, result: Mapping[str, Any], history: Iterable[Point]) -> None:
    """result.json and history.csv of what there is so far."""
    text = StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(point) for point in history)
    _write_text(out / HISTORY, text.getvalue())
    _write_text(out / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        part = Path(scratch) / path.name
        part.write_text(text, encoding="utf-8")
        part.replace(path)
