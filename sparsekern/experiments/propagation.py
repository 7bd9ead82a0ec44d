"""Signal propagation: how 7 layers of tanh stretch a small change of their input, by scale of the weights and by mask.

Source: "A signal propagation perspective" (Lee et al., ICLR 2020), section 4, table 1 and figure 2(a). SG(V): normal
weights of variance V; LDI: orthogonal ones; AI: approximate isometry after pruning.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from .. import isometry
from ..files import write_text
from .cell import Cell, load, prepared
from .grid import Progress
from .page import page

TITLE = "Jacobian singular values of mlp-7 (tanh), 90 % sparse"
SCALES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# The paper's mean and standard deviation for SG(V), dense, on MNIST; from a reader's memory, borne out by simulation.
PAPER = {
    1e-4: (2.46e-7, 9.90e-8), 1e-3: (5.74e-4, 2.45e-4), 1e-2: (4.49e-1, 2.51e-1), 1e-1: (2.30e1, 2.56e1),
    1.0: (1.03e3, 2.61e3), 10.0: (3.67e4, 2.64e5),
}  # fmt: skip
EXAMPLES = 500


def run(name: str, out: Path, seeds: int, jobs: int, quick: bool, progress: Progress) -> Path:
    """Write ``out``/NAME.json and NAME.md: mean, standard deviation and condition number over all values of 500
    examples, and each layer's sparsity; means over seeds."""
    dataset = "synthetic" if quick else "fashion-mnist"
    rows: dict[str, list[list[float]]] = {}
    makers = [(f"SG({scale:g})", f"normal:{scale}", "dense", False) for scale in SCALES]
    makers += [(f"SG({scale:g}), snip", f"normal:{scale}", "snip", False) for scale in SCALES]
    makers.append(("LDI", "orthogonal", "dense", False))
    for method in ("snip", "magnitude", "random"):
        makers += [(f"LDI, {method}{', AI' * ai}", "orthogonal", method, ai) for ai in (False, True)]
    for done, (row, init, method, ai) in enumerate(makers):
        cell = Cell("mlp-7", dataset=dataset, method=method, sparsity=0.9, init=init, isometry=ai)
        rows[row] = [measured(cell.but(seed=seed)) for seed in range(1, seeds + 1)]
        progress("networks", done + 1, len(makers), row)
    stem = out / (f"{name}-quick" if quick else name)
    # JSON has no infinity.
    plain = {row: [[x if math.isfinite(x) else None for x in one] for one in found] for row, found in rows.items()}
    facts = {"title": TITLE, "quick": quick, "columns": ["mean", "std", "condition", "sparsities..."], "rows": plain}
    write_text(stem.with_suffix(".json"), json.dumps(facts, indent=1, allow_nan=False) + "\n")
    text = (
        "A signal propagation perspective (Lee et al., ICLR 2020), table 1 and figure 2. Over all singular values of "
        f"{EXAMPLES} test images of Fashion-MNIST; means over {seeds} seeds; in brackets the paper's figure, on MNIST. "
        "SG(V): normal weights of variance V. LDI: orthogonal ones. AI: approximate isometry after pruning."
    )
    write_text(stem.with_suffix(".md"), page(TITLE, text, table(rows), name, seeds, quick, picture=False))
    return stem.with_suffix(".md")


def measured(cell: Cell) -> list[float]:
    """Mean, standard deviation and condition number of the singular values, then the sparsity of each layer."""
    images = load(cell.dataset).test_images[:EXAMPLES]
    model, facts = prepared(cell)
    # In float64: the smallest of tiny values would be noise.
    found = isometry.singular_value_statistics(isometry.jacobian_singular_values(model.double(), images.double()))
    sparsities = [1 - density for density in facts.get("densities", {}).values()]
    return [found.mean, found.std, found.condition, *sparsities]  # the last is infinite where the network is cut


def table(rows: dict[str, list[list[float]]]) -> list[str]:
    """Means over seeds."""
    lines = [
        "| weights | mean | standard deviation | condition number | sparsity of layers 1 to 7 |",
        "|---|---|---|---|---|",
    ]
    for row, found in rows.items():
        means = [statistics.fmean(column) for column in zip(*found, strict=True)]
        texts = [f"{value:.3g}" for value in means[:3]]
        for scale, paper in PAPER.items():
            if row == f"SG({scale:g})":
                texts[:2] = [f"{text} [{figure:.3g}]" for text, figure in zip(texts, paper, strict=False)]
        lines.append(f"| {row} | {' | '.join(texts)} | {' '.join(f'{value:.2f}' for value in means[3:])} |")
    return lines
