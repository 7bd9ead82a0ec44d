"""A study is a table of cells: rows by columns, several seeds each; beside it what the paper found."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import plots
from ..files import write_text
from . import grid
from .cell import Cell
from .page import page

Place = tuple[str, str]  # (row, column)
MANY, REACH = 8, 12


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        title: one line.
        source: the paper and the part of it.
        cells: {(row, column): cell}; the seed is filled in.
        paper: {(row, column): what the paper has there, with its unit}.
        note: how this differs from the paper, on what it ran.
        columns: what the columns are.
        metric: the key of a cell's result that is shown, a fraction; "curve:N" is the Nth entry of a list. A metric
            that begins with "speedup" is a factor, and is not drawn.
        metrics: {column: metric} where it is another.
    """

    title: str
    source: str
    cells: Mapping[Place, Cell]
    columns: str
    paper: Mapping[Place, str] = field(default_factory=dict)
    note: str = ""
    metric: str = "accuracy"
    metrics: Mapping[str, str] = field(default_factory=dict)

    def value(self, place: Place, result: Mapping[str, Any]) -> float:
        """What the table shows of a cell's result."""
        key, _, index = self.metrics.get(place[1], self.metric).partition(":")
        found = result[key]
        if isinstance(found, Mapping):
            return float(found[index])
        if index:  # a quick run has fewer
            return float(found[min(int(index), len(found) - 1)])
        return float(found)

    def factor(self, column: str) -> bool:
        """Whether a column holds speed-ups."""
        return self.metrics.get(column, self.metric).startswith("speedup")


def run(study: Study, name: str, out: Path, seeds: int, jobs: int, quick: bool, progress: grid.Progress) -> Path:
    """Compute what is missing in ``out``/NAME.jsonl, then write NAME.json, NAME.md and NAME.png; returns NAME.md.

    Args:
        seeds: runs of every cell, with seeds 1 to ``seeds``.
        jobs: processes; with 0 nothing is computed, and the table is of what there is.
        quick: one epoch on synthetic data, to see that it works; its figures mean nothing, and its files say so.
    """
    cells = {place: small(cell) if quick else cell for place, cell in study.cells.items()}
    stem = out / (f"{name}-quick" if quick else name)
    file = stem.with_suffix(".jsonl")
    # Seed by seed, so that what is there after an interruption is balanced.
    wanted = [cell.but(seed=seed) for seed in range(1, seeds + 1) for cell in cells.values()]
    results = grid.fill(wanted, file, jobs, progress) if jobs else grid.read(file)
    values = {}
    for place, cell in cells.items():
        keys = [cell.but(seed=seed).key for seed in range(1, seeds + 1)]
        if found := [study.value(place, results[key]) for key in keys if key in results]:
            values[place] = found
    if not values:
        raise ValueError(f"{file} holds no result of this experiment")
    write_text(stem.with_suffix(".json"), json.dumps(as_dict(study, values, quick), indent=1) + "\n")
    write_text(stem.with_suffix(".md"), markdown(study, name, values, quick))
    draw(study, values, stem.with_suffix(".png"))
    return stem.with_suffix(".md")


def small(cell: Cell) -> Cell:
    """The same in seconds: synthetic data, one epoch, few images to prune on."""
    on = None if cell.prune_on is None else "synthetic"
    return cell.but(dataset="synthetic", prune_on=on, epochs=1, images=min(cell.images, 200))


def as_dict(study: Study, values: Mapping[Place, list[float]], quick: bool) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "title": study.title,
        "source": study.source,
        "note": study.note,
        "quick": quick,
        "metric": study.metric,
        "cells": [
            {
                "row": place[0],
                "column": place[1],
                "values": found,
                "mean": statistics.fmean(found),
                "std": statistics.stdev(found) if len(found) > 1 else None,
                "paper": study.paper.get(place),
            }
            for place, found in values.items()
        ],
    }


def markdown(study: Study, name: str, values: Mapping[Place, list[float]], quick: bool) -> str:
    """The table, and what it has to be read with."""
    rows, columns = (list(dict.fromkeys(place[axis] for place in values)) for axis in (0, 1))
    numbers = sorted({len(found) for found in values.values()})
    seeds = numbers[-1]
    over = f"{seeds} seeds" if len(numbers) == 1 else f"{numbers[0]} to {seeds} seeds (not all are done)"
    text = (
        f"{study.source}. Mean ± standard deviation of {study.metric}, in %, over {over}"
        f"{'; in brackets the figure of the paper' if study.paper else ''}. {study.note}"
    )
    lines = [f"| {study.columns} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in rows:
        texts = [_text(study, (row, column), values.get((row, column))) for column in columns]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return page(study.title, text, lines, name, seeds, quick)


def _text(study: Study, place: Place, found: list[float] | None) -> str:
    if found is None:
        return ""
    scale, unit = (1, "x") if study.factor(place[1]) else (100, "")
    spread = f" ± {scale * statistics.stdev(found):.2f}" if len(found) > 1 else ""
    paper = f" [{study.paper[place]}]" if place in study.paper else ""
    return f"{scale * statistics.fmean(found):.2f}{spread}{unit}{paper}"


def draw(study: Study, values: Mapping[Place, list[float]], path: Path) -> None:
    """A line per row, a point per column: means, and bars of a standard deviation.

    Many rows named "panel, line" get a panel each; a row of another name, such as dense, is a level in all of them.
    Panels reach ``REACH`` points down from the best, so that what fails does not press the rest together.
    """
    rows, columns = (list(dict.fromkeys(place[axis] for place in values)) for axis in (0, 1))
    levels = [row for row in rows if ", " not in row] if len(rows) > MANY else []
    panels: dict[str, list[str]] = {}
    for row in rows:
        if row not in levels:
            panels.setdefault(row.partition(", ")[0] if levels else "", []).append(row)
    columns = [
        column
        for column in columns
        if not study.factor(column) and any((row, column) in values for row in rows if row not in levels)
    ]
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(8, 4.5 * len(panels)), 5), layout="constrained")
        for axes, (panel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _panel(axes, [(line.removeprefix(f"{panel}, "), line) for line in lines], columns, values)
            for row in levels:
                level = statistics.fmean(x for (r, _), found in values.items() if r == row for x in found)
                axes.axhline(100 * level, color="black", linestyle=":", linewidth=1, label=row)
            axes.set_title(panel, fontsize=10)
            axes.set_xlabel(study.columns.partition("\\")[2].strip() or study.columns)
            axes.set_ylabel(f"{study.metric} (%)")
            if len(lines) > 1:
                axes.legend(frameon=False, fontsize=8)
        figure.suptitle(study.title, fontsize=10)
        plots.save(figure, path)


def _panel(axes: Axes, lines: list[tuple[str, str]], columns: list[str], values: Mapping[Place, list[float]]) -> None:
    best = -math.inf
    for number, (label, row) in enumerate(lines):
        there = [(x, values[row, column]) for x, column in enumerate(columns) if (row, column) in values]
        # Side by side, or the bars of one hide those of another.
        xs = [x + 0.08 * (number - (len(lines) - 1) / 2) for x, _ in there]
        means = [100 * statistics.fmean(found) for _, found in there]
        spread = [100 * statistics.stdev(found) if len(found) > 1 else 0.0 for _, found in there]
        axes.errorbar(xs, means, yerr=spread, marker="o", markersize=4, linewidth=1, capsize=2, label=label)
        best = max([best, *means])
    axes.set_xticks(range(len(columns)), columns)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, best - REACH), high)
