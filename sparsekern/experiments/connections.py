"""Which connections survive: the inputs that the first layer of LeNet-300-100 keeps, as images.

Source: SNIP (Lee et al., ICLR 2019), section 5.4 and figure 2: scores from 100 examples of one class keep the pixels
that draw it.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import data, models, plots, prune
from ..files import write_text
from .grid import Progress
from .page import page

SPARSITIES = (0.1, 0.3, 0.5, 0.7, 0.9)
EXAMPLES = 100
TITLE = "Connections of the first layer that survive, by class"


def run(name: str, out: Path, seeds: int, jobs: int, quick: bool, progress: Progress) -> Path:
    """Write ``out``/NAME.png (a row of images per class, as they are and inverted), NAME.json and NAME.md.

    The JSON holds, for every class, the correlation over pixels between the connections kept and the mean image of the
    examples, means over seeds.
    """
    dataset = data.load("synthetic" if quick else "fashion-mnist")
    classes = int(dataset.train_labels.max()) + 1
    stem = out / (f"{name}-quick" if quick else name)
    shown: dict[str, list[list[Tensor]]] = {}
    correlations: dict[str, list[list[float]]] = {}
    # Standardised pixels change their sign where images are inverted: the background, not the object, is far from 0.
    lowest, highest = float(dataset.train_images.min()), float(dataset.train_images.max())
    done = 0
    for kind in ("as they are", "inverted"):
        shown[kind], correlations[kind] = [], []
        for label in range(classes):
            row: list[Tensor] = []
            found = []
            for sparsity in SPARSITIES:
                kept = torch.zeros(28, 28)
                for seed in range(1, seeds + 1):
                    images = _examples(dataset, label, seed)
                    images = lowest + highest - images if kind == "inverted" else images
                    kept += _kept(images, label, sparsity, seed) / seeds
                row.append(kept)
                found.append(_correlation(kept, images.abs().mean((0, 1))))
                done += 1
                progress("masks", done, 2 * classes * len(SPARSITIES), "")
            shown[kind].append(row)
            correlations[kind].append(found)
    facts = {"title": TITLE, "quick": quick, "seeds": seeds, "sparsities": SPARSITIES, "correlation": correlations}
    write_text(stem.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    text = (
        "SNIP (Lee et al., ICLR 2019), section 5.4. Share of the first layer's units that keep each pixel, pruned with "
        f"{EXAMPLES} examples of one class; means over {seeds} seeds. The table: correlation over pixels with the "
        "absolute values of the standardised pixels of the examples."
    )
    write_text(stem.with_suffix(".md"), page(TITLE, text, _table(correlations), name, seeds, quick))
    _draw(shown, stem.with_suffix(".png"))
    return stem.with_suffix(".md")


def _examples(dataset: data.Dataset, label: int, seed: int) -> Tensor:
    of_class = (dataset.train_labels == label).nonzero().flatten()
    order = torch.randperm(len(of_class), generator=torch.Generator().manual_seed(seed))
    return dataset.train_images[of_class[order[:EXAMPLES]]]


def _kept(images: Tensor, label: int, sparsity: float, seed: int) -> Tensor:
    """[28, 28]: the share of the 300 hidden units that keep each pixel."""
    model = models.build("lenet-300-100", generator=torch.Generator().manual_seed(seed))
    batch = images, torch.full((len(images),), label)
    pattern = prune.snip(model, batch, cross_entropy, sparsity, (1, 1))["fc1"]
    return pattern.to_mask().float().mean(0).view(28, 28)


def _correlation(kept: Tensor, image: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([kept.flatten(), image.flatten()]))[0, 1].nan_to_num(0))


def _draw(shown: dict[str, list[list[Tensor]]], path: Path) -> None:
    with matplotlib.rc_context({"axes.titlesize": "small"}):
        classes, columns = len(next(iter(shown.values()))), len(shown) * len(SPARSITIES)
        figure = Figure(figsize=(0.8 * columns, 0.8 * classes + 0.6), layout="constrained")
        grid = figure.subplots(classes, columns, squeeze=False)
        for number, (kind, rows) in enumerate(shown.items()):
            for label, row in enumerate(rows):
                for at, image in enumerate(row):
                    axes = grid[label, number * len(SPARSITIES) + at]
                    axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=max(float(image.max()), 1e-9))
                    axes.set_xticks([])
                    axes.set_yticks([])
                    if label == 0:
                        axes.set_title(f"{SPARSITIES[at]:.0%}" + (f"\n{kind}" if at == 0 else "\n"))
        plots.save(figure, path)


def _table(correlations: dict[str, list[list[float]]]) -> list[str]:
    columns = [f"{kind}, {sparsity:.0%}" for kind in correlations for sparsity in SPARSITIES]
    lines = [f"| class | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for label in range(len(next(iter(correlations.values())))):
        values = [f"{value:.2f}" for rows in correlations.values() for value in rows[label]]
        lines.append(f"| {label} | {' | '.join(values)} |")
    return lines
