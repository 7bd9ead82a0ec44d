"""The pictures of a training run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from .pattern import BlockPattern

if TYPE_CHECKING:
    from .train.loop import Point

CURVES, FIRST_LAYER, DENSITY, SPEEDUP = "learning_curves.png", "first_layer.png", "density.png", "speedup.png"
NAMES = (CURVES, FIRST_LAYER, DENSITY, SPEEDUP)
# Okabe-Ito colours, told apart by the colour-blind too; one per network, the same in every picture.
COLOURS = {"dense": "#000000", "sparse": "#D55E00", "small_dense": "#0072B2", "random_mask": "#009E73"}
NETWORKS = tuple(COLOURS)
MARKERS = {"dense": "s", "sparse": "o", "small_dense": "^", "random_mask": "D"}
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
MOSAIC_COLUMNS = 10


def draw(out: Path, result: Mapping[str, Any], history: Sequence[Point], patterns: Mapping[str, BlockPattern]) -> None:
    """Draw what the figures of a run allow; a picture that has nothing to show is left out.

    Args:
        result, history: what :func:`sparsekern.train.run` writes to result.json and history.csv.
        patterns: of the sparse network, in the model's order.
    """
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium"}):
        if history:
            save(_learning_curves(result, history), out / CURVES)
        if patterns:
            save(_first_layer(result, *next(iter(patterns.items()))), out / FIRST_LAYER)
            save(_density(result, patterns), out / DENSITY)
        if result["speedup"] is not None:
            save(_speedup(result), out / SPEEDUP)


def title(result: Mapping[str, Any]) -> str:
    """One line that names model, data and pruning of a run."""
    s = result["settings"]
    bh, bw = s["blocksize"]
    prune = f"{s['pruner']}{' + isometry' if s['isometry'] else ''}"
    data = f"{s['dataset']} data" if s["dataset"] == "synthetic" else s["dataset"]
    return f"{s['model']} on {data}, {prune}, {s['sparsity']:.4g} sparse, blocks {bh}x{bw}, seed {s['seed']}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    FigureCanvasAgg(figure)
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, format="png", dpi=130)
    part.replace(path)


def _figure(result: Mapping[str, Any], width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title(result) + ("" if result["complete"] else "  (incomplete run)"), fontsize=10)
    return figure


def _learning_curves(result: Mapping[str, Any], history: Sequence[Point]) -> Figure:
    figure = _figure(result, 10, 6.5)
    axes = figure.subplots(2, 2, sharey="row")
    xs = (("step", "training steps"), ("seconds", "training time (s), without evaluation"))
    ys = (("accuracy", "test accuracy"), ("loss", "mean training loss"))
    for column, (x, label) in enumerate(xs):
        for row, (y, name) in enumerate(ys):
            ax: Axes = axes[row, column]
            for model in dict.fromkeys(point.model for point in history):
                points = [point for point in history if point.model == model]
                ax.plot(
                    [getattr(point, x) for point in points], [getattr(point, y) for point in points],
                    color=COLOURS[model], marker=MARKERS[model], markersize=4, linewidth=1.3, label=model,
                )  # fmt: skip
            ax.set_xlim(left=0)
            ax.grid(alpha=0.25)
            if row == 1:
                ax.set_xlabel(label)
            if column == 0:
                ax.set_ylabel(name)
            if y == "accuracy":
                ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0, 0].legend(frameon=False)
    return figure


def _first_layer(result: Mapping[str, Any], name: str, pattern: BlockPattern) -> Figure:
    mask = pattern.to_element_mask().float()
    channels, height, width = result["dataset"]["image_shape"]
    if pattern.shape[1] == channels * height * width:
        figure = _figure(result, 6.5, 5)
        ax = figure.subplots()
        seen = mask.mean(0).view(channels, height, width).mean(0)
        picture = ax.imshow(seen.numpy(), cmap="viridis", vmin=0)
        ax.set_title(f"{name}: which pixels it still sees")
        figure.colorbar(picture, ax=ax, label=f"share of the {pattern.shape[0]} units connected to the pixel")
    else:
        side = round((pattern.shape[1] / channels) ** 0.5)
        rows = -(-pattern.shape[0] // MOSAIC_COLUMNS)
        figure = _figure(result, 7.5, 0.9 + 0.75 * rows)
        ax = figure.subplots()
        kernels = mask.view(-1, side, side, channels).mean(3)
        ax.imshow(_mosaic(kernels).numpy(), cmap="Greys", vmin=0, vmax=1.3)
        ax.set_title(f"{name}: kept weights (black) of its {pattern.shape[0]} kernels of {side}x{side}")
    ax.set_axis_off()
    return figure


def _mosaic(tiles: Tensor, columns: int = MOSAIC_COLUMNS) -> Tensor:
    """[n, h, w] in [0, 1] to one picture, 0 for missing, 1 for kept, NaN for the gaps between tiles."""
    n, height, width = tiles.shape
    rows = -(-n // columns)
    picture = torch.full((rows * (height + 1), columns * (width + 1)), float("nan"))
    for i, one in enumerate(tiles):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        picture[top : top + height, left : left + width] = 0.15 + 0.85 * one
    return picture[:-1, :-1]


def _density(result: Mapping[str, Any], patterns: Mapping[str, BlockPattern]) -> Figure:
    figure = _figure(result, 7.5, 1.6 + 0.5 * len(patterns))
    ax = figure.subplots()
    names = [f"{name}\n{_times(p.shape)}, blocks {_times(p.blocksize)}" for name, p in patterns.items()]
    densities = [pattern.density for pattern in patterns.values()]
    bars = ax.barh(names, densities, color=COLOURS["sparse"], height=0.6)
    ax.bar_label(bars, [f"{p.density:.1%}  ({p.nnz:,} weights)" for p in patterns.values()], padding=4, bbox=LABEL)
    overall = sum(p.nnz for p in patterns.values()) / sum(p.shape[0] * p.shape[1] for p in patterns.values())
    ax.axvline(overall, color="grey", linestyle="--", linewidth=1, zorder=0)
    ax.annotate(f"all layers {overall:.1%}", (overall, 1), xycoords=("data", "axes fraction"), xytext=(3, 2),
                textcoords="offset points", color="grey", fontsize=8)  # fmt: skip
    ax.set_xlim(0, max(densities) * 1.45)
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= 1])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("density: weights kept / weights")
    ax.invert_yaxis()
    return figure


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _speedup(result: Mapping[str, Any]) -> Figure:
    figure = _figure(result, 7.5, 4)
    ax = figure.subplots()
    kinds = {"train_step": "training step", "train_total": "whole training", "inference": "inference"}
    models = [name for name in COLOURS if name != "dense" and (result.get(name) or {}).get("speedup")]
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        values = [result[model]["speedup"][kind] for kind in kinds]
        places = [k + (i - (len(models) - 1) / 2) * width for k in range(len(kinds))]
        bars = ax.bar(places, values, width * 0.92, color=COLOURS[model], label=model)
        ax.bar_label(bars, [f"{value:.2f}x" for value in values], padding=2, fontsize=8, bbox=LABEL)
    ceiling = result["ceiling"]
    ax.axhline(ceiling, color=COLOURS["sparse"], linestyle="--", linewidth=1, zorder=0)
    text = f"ceiling of sparse: {ceiling:.1f}x ({result['macs_kept']:.1%} of the multiply-adds kept)"
    ax.annotate(text, (0, ceiling), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points",
                color=COLOURS["sparse"], fontsize=8)  # fmt: skip
    ax.axhline(1, color=COLOURS["dense"], linewidth=1, zorder=0)
    ax.set_xticks(range(len(kinds)), list(kinds.values()))
    ax.set_ylabel("times faster than dense torch")
    ax.set_ylim(0, max(ceiling, *ax.get_ylim()) * 1.12)
    ax.legend(frameon=False, ncols=len(models), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return figure
