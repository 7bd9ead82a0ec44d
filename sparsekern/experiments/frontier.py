"""Accuracy against measured time: pruned networks beside narrower dense ones.

Equal density is what papers compare; time is what is bought. A narrower dense network is the rival that needs no
sparse kernel at all.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from .. import plots
from ..files import write_text
from ..prune.by_time import Of
from ..timing import keep_freed_memory
from . import blocks, equal_time, grid
from .cell import Cell, in_best_format, load, prepared
from .page import page
from .study import small

WIDTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
# Line in the plot: what is pruned, at each of the block study's sparsities.
LINES: dict[str, dict[str, Any]] = {
    "1x1, global SNIP": {"placement": "global"},
    "8x8": {"blocksize": (8, 8)},
    "16x16": {"blocksize": (16, 16)},
    "16x16, random": {"blocksize": (16, 16), "placement": "random", "balance": "both"},
}
NARROW = "dense, narrower"
LABELS: dict[Of, str] = {"step": "training step", "inference": "inference", "eval": "inference, not frozen"}


def kinds(base: Cell) -> tuple[Of, Of]:
    """What is timed; ``sk.freeze`` does not take zero-padded shortcuts."""
    return ("step", "eval") if base.model.startswith("resnet") else ("step", "inference")


def cells(base: Cell) -> dict[tuple[str, str], Cell]:
    """{(line, point): cell}; those of the block study are the same cells."""
    found = {(NARROW, f"width {width:g}"): base.but(width=base.width * width, method="dense") for width in WIDTHS}
    for line, rules in LINES.items():
        for sparsity in sorted(blocks.SPARSITIES):
            found[line, f"{sparsity:.0%}"] = base.but(sparsity=sparsity, **rules)
    return found


def run(base: Cell, name: str, out: Path, seeds: int, jobs: int, quick: bool, progress: grid.Progress) -> Path:
    """Train what the block study of the network has not trained yet, time everything, and write NAME.md, .json, .png.

    Times are of the networks of seed 1 on batches of the training's size, one thread, each interleaved with the dense
    one; to be trusted they need a quiet machine. With ``jobs`` 0 nothing is trained, but everything is timed.
    """
    every = {place: small(cell) if quick else cell for place, cell in cells(base).items()}
    stem = out / (f"{name}-quick" if quick else name)
    file = stem.with_name(stem.name.replace("time-", "blocks-") + ".jsonl")
    wanted = [cell.but(seed=seed) for seed in range(1, seeds + 1) for cell in every.values()]
    results = grid.fill(wanted, file, jobs, progress) if jobs else grid.read(file)
    rows = _timed(every, base, seeds, results, progress)
    if not rows:
        raise ValueError(f"{file} holds no result of this experiment")
    title = f"Accuracy against measured time: {base.model}" + (f", width {base.width:g}" if base.width != 1 else "")
    write_text(stem.with_suffix(".json"), json.dumps({"title": title, "quick": quick, "rows": rows}, indent=1) + "\n")
    note = (
        f"Mean ± standard deviation of accuracy in %, over as many as {seeds} seeds; how many times faster than dense, "
        "median (p20 to p80) of interleaved samples on one thread, batches of "
        f"{base.batch_size}, against dense torch in its faster memory format. Inference is of networks as sk.freeze "
        "deploys them, narrower dense ones too. Blocks: by default, or random ones of SNIP's layer "
        "densities, rows and columns even."
    )
    write_text(stem.with_suffix(".md"), page(title, note, _table(rows, kinds(base)), name, seeds, quick))
    _draw(title, rows, kinds(base), stem.with_suffix(".png"))
    return stem.with_suffix(".md")


def _timed(
    every: dict[tuple[str, str], Cell], base: Cell, seeds: int, results: grid.Results, progress: grid.Progress
) -> list[dict[str, Any]]:
    """A row for each cell with results, its network timed on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    try:
        dense, _ = prepared(every[NARROW, "width 1"].but(seed=1))
        for done, ((line, point), cell) in enumerate(every.items()):
            keys = [cell.but(seed=seed).key for seed in range(1, seeds + 1)]
            if not (found := [results[key]["accuracy"] for key in keys if key in results]):
                continue
            model = in_best_format(prepared(cell.but(seed=1))[0])
            dataset = load(cell.dataset)
            batch = dataset.train_images[: cell.batch_size], dataset.train_labels[: cell.batch_size]
            row: dict[str, Any] = {"line": line, "point": point, "accuracies": found}
            rows.append(row | {of: equal_time.measured(dense, model, batch, of) for of in kinds(base)})
            progress("timing", done + 1, len(every), f"{line}, {point}")
    finally:
        torch.set_num_threads(threads)
    return rows


def _table(rows: list[dict[str, Any]], times: tuple[Of, Of]) -> list[str]:
    lines = [f"| network | accuracy | {' | '.join(LABELS[of] for of in times)} |", "|---|---|---|---|"]
    for row in rows:
        found = row["accuracies"]
        spread = f" ± {100 * statistics.stdev(found):.2f}" if len(found) > 1 else ""
        factors = " | ".join(f"{row[of]['p50']:.2f}x ({row[of]['p20']:.2f} to {row[of]['p80']:.2f})" for of in times)
        lines.append(f"| {row['line']}, {row['point']} | {100 * statistics.fmean(found):.2f}{spread} | {factors} |")
    return lines


def _draw(title: str, rows: list[dict[str, Any]], times: tuple[Of, Of], path: Path) -> None:
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        for axes, of in zip(figure.subplots(1, 2, sharey=True), times, strict=True):
            for line in dict.fromkeys(row["line"] for row in rows):
                points = [row for row in rows if row["line"] == line]
                means = [100 * statistics.fmean(row["accuracies"]) for row in points]
                spreads = [
                    100 * statistics.stdev(found) if len(found := row["accuracies"]) > 1 else 0 for row in points
                ]
                style = {"color": "black", "linestyle": ":"} if line == NARROW else {}
                axes.errorbar(
                    [row[of]["p50"] for row in points], means, spreads, marker="o", markersize=4, linewidth=1,
                    capsize=2, label=line, **style,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_xlabel(f"speed-up of {LABELS[of]} over dense")
            axes.legend(frameon=False, fontsize=8)
        figure.axes[0].set_ylabel("accuracy (%)")
        best = max(100 * statistics.fmean(row["accuracies"]) for row in rows)
        low, high = figure.axes[0].get_ylim()
        figure.axes[0].set_ylim(max(low, best - 12), high)
        figure.suptitle(title, fontsize=10)
        plots.save(figure, path)
