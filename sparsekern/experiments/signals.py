"""What pruning does to signals, and what puts it right: Jacobians end to end and by layer, by activation.

Source: "A signal propagation perspective" (Lee et al., ICLR 2020), sections 4 and 5; table 3 has the activations.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from .. import isometry
from ..files import write_text
from .cell import Cell, load, prepared
from .grid import Progress
from .page import page

TITLE = "Signals before and after pruning, mlp-7, 90 % sparse by SNIP"
ACTIVATIONS = ("linear", "tanh", "relu", "leaky-relu", "selu")
STAGES: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "pruned": {"sparsity": 0.9},
    "isometry": {"sparsity": 0.9, "isometry": True},
    "fan-in rescaling": {"sparsity": 0.9, "rescaled": True},
}
EXAMPLES = 100
Figures = dict[str, list[float]]  # mean, std, min, max, condition


def run(name: str, out: Path, seeds: int, jobs: int, quick: bool, progress: Progress) -> Path:
    """Write ``out``/NAME.json (of every layer too) and NAME.md: statistics over 100 examples, means over seeds."""
    dataset = "synthetic" if quick else "fashion-mnist"
    rows: dict[str, dict[str, list[float | None]]] = {}
    places = [(activation, stage) for activation in ACTIVATIONS for stage in STAGES]
    for done, (activation, stage) in enumerate(places):
        cell = Cell("mlp-7", dataset=dataset, activation=activation, init="orthogonal").but(**STAGES[stage])
        found = [measured(cell.but(seed=seed)) for seed in range(1, seeds + 1)]
        rows[f"{activation}, {stage}"] = {
            what: [_mean(column) for column in zip(*(one[what] for one in found), strict=True)] for what in found[0]
        }
        progress("networks", done + 1, len(places), f"{activation}, {stage}")
    stem = out / (f"{name}-quick" if quick else name)
    facts = {"title": TITLE, "quick": quick, "columns": isometry.Statistics._fields, "rows": rows}
    write_text(stem.with_suffix(".json"), json.dumps(facts, indent=1, allow_nan=False) + "\n")
    text = (
        f"Singular values of Jacobians at {EXAMPLES} test images of Fashion-MNIST, means over {seeds} seeds: of the "
        "network (end to end), and of each layer from its input to the next one's, of which the least and the largest "
        "mean of a layer are shown. Score: mean over layers of the norm of A Aᵀ - I. Weights are orthogonal at first. "
        "Every layer's figures are in the JSON beside this page."
    )
    write_text(stem.with_suffix(".md"), page(TITLE, text, _table(rows), name, seeds, quick, picture=False))
    return stem.with_suffix(".md")


def measured(cell: Cell) -> Figures:
    """Statistics of the network ("end to end") and of every layer by name; and "score", of orthogonality, alone."""
    images = load(cell.dataset).test_images[:EXAMPLES].double()
    model, _ = prepared(cell)
    model.double()
    found = {"score": [isometry.orthogonality_score(model)]}
    found["end to end"] = list(isometry.singular_value_statistics(isometry.jacobian_singular_values(model, images)))
    for name, values in isometry.layer_jacobian_singular_values(model, images).items():
        found[name] = list(isometry.singular_value_statistics(values))
    return found


def _mean(values: tuple[float, ...]) -> float | None:
    """JSON has no infinity."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else None


def _table(rows: dict[str, dict[str, list[float | None]]]) -> list[str]:
    head = ("network", "score", "mean", "std", "min", "max", "condition number", "layers' means")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, found in rows.items():
        means = [values[0] for what, values in found.items() if what not in ("score", "end to end")]
        layers = [mean for mean in means if mean is not None]
        texts = ["∞" if value is None else f"{value:.3g}" for value in (*found["score"], *found["end to end"])]
        lines.append(f"| {row} | {' | '.join(texts)} | {min(layers):.3g} to {max(layers):.3g} |")
    return lines
