"""Pictures of finished runs: speed-up against sparsity, the roofline, and where sparse layers break even."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .run import OURS

Row = dict[str, str]

PANELS = (
    "lenet-300-100-fc1", "linear-256x1024x1024", "linear-1024x4096x4096",
    "conv3x3-64@32", "conv3x3-128@16", "conv3x3-256@8",
)  # fmt: skip
# Okabe-Ito colours, told apart by the colour-blind too; with markers, one per blocksize in the order of the file.
STYLES = (
    ("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"),
    ("#E69F00", "P"), ("#000000", "X"), ("#999999", "<"), ("#F0E442", ">"),
)  # fmt: skip
GREYS = ("x", "+", "1", "2", "3", "4")  # markers of peers
WORDS = {"layer": "forward + backward through the layer"}
LEVELS = {16 << 10: "L1", 256 << 10: "L2", 4 << 20: "L3", 256 << 20: "memory"}


def speedups(rows: Sequence[Row], product: str, title: str) -> Figure:
    """Up to six panels; points are medians, bands reach from the 20 % to the 80 % quantile of the rounds."""
    rows = [row for row in rows if row["product"] == product and float(row["sparsity"]) > 0]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    cases = ([case for case in PANELS if case in cases] or cases)[:6]
    rows = [row for row in rows if row["case"] in cases]
    columns = 2 if len(cases) == 4 else min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.6 + 3.1 * lines), layout="constrained")
    figure.suptitle(f"{WORDS.get(product, product)}: times faster than dense torch\n{title}", fontsize=10)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten().tolist()
    blocks = list(dict.fromkeys(row["blocksize"] for row in rows))
    handles: dict[str, Any] = {}
    for ax, case in zip(axes, cases, strict=False):
        _panel(ax, case, [row for row in rows if row["case"] == case], blocks)
        handles |= {str(line.get_label()): line for line in ax.get_lines()}
    for ax in axes[len(cases) :]:
        ax.set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _panel(ax: Axes, case: str, rows: Sequence[Row], blocks: Sequence[str]) -> None:
    names = sorted(dict.fromkeys((row["implementation"], row["blocksize"]) for row in rows), key=lambda n: n[0] != OURS)
    peers = sorted({name for name, _ in names if name != OURS})
    for name, blocksize in names:
        chosen = [row for row in rows if (row["implementation"], row["blocksize"]) == (name, blocksize)]
        # By what was really kept, so that the ideal is one straight line for all blocksizes.
        kept = [float(row["ideal"]) for row in chosen]
        low, middle, high = ([float(row[f"speedup_{p}"]) for row in chosen] for p in ("p20", "p50", "p80"))
        if name == OURS:
            colour, marker = STYLES[blocks.index(blocksize) % len(STYLES)]
            ax.plot(kept, middle, color=colour, marker=marker, markersize=4, linewidth=1.3, label=f"blocks {blocksize}")
            ax.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
        elif blocksize == "1x1":
            marker = GREYS[peers.index(name) % len(GREYS)]
            ax.plot(kept, middle, color="grey", linestyle=":", marker=marker, label=f"{name} {blocksize}")
    ends = [min(float(row["ideal"]) for row in rows), max(float(row["ideal"]) for row in rows)]
    ax.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="ideal (1 / density)", zorder=1)
    ax.axhline(1, color="black", linewidth=1, label="dense torch", zorder=1)
    ax.set(title=case, xscale="log", yscale="log", xlabel="sparsity (weights removed)", ylabel="speed-up")
    ax.label_outer()
    sparsities = sorted({float(row["sparsity"]) for row in rows})
    ax.set_xticks([1 / (1 - s) for s in sparsities], [f"{s:.0%}" for s in sparsities])
    ax.set_yticks([0.25, 0.5, 1, 2, 5, 10, 20, 50])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def roofline(rows: Sequence[Row], product: str, title: str, gflops: float, gb_s: dict[int, float]) -> Figure:
    """A point for every sparse layer: GFLOP/s on kept weights over flops per byte that must move; ceilings above."""
    rows = [row for row in rows if row["implementation"] == OURS and row["product"] == product and row["gb_s"]]
    figure = Figure(figsize=(8.2, 5), layout="constrained")
    figure.suptitle(f"{WORDS.get(product, product)}: roofline\n{title}", fontsize=10)
    ax = figure.subplots()
    for i, blocksize in enumerate(dict.fromkeys(row["blocksize"] for row in rows)):
        chosen = [row for row in rows if row["blocksize"] == blocksize]
        colour, marker = STYLES[i % len(STYLES)]
        rates = [float(row["gflops"]) for row in chosen]
        intensity = [rate / float(row["gb_s"]) for rate, row in zip(rates, chosen, strict=True)]
        ax.scatter(intensity, rates, s=14, color=colour, marker=marker, alpha=0.7, label=f"blocks {blocksize}")
    low, high = ax.get_xlim()
    low, high = max(low, min(gflops / max(gb_s.values()), 0.1)), max(high, 4 * gflops / min(gb_s.values()))
    for (size, rate), style in zip(gb_s.items(), (":", "-.", "--", "-"), strict=False):
        corner = gflops / rate
        name = LEVELS.get(size, f"{size} bytes")
        ax.plot([low, corner], [low * rate, gflops], color="grey", linestyle=style, label=f"{name}: {rate:.0f} GB/s")
    ax.plot([gflops / max(gb_s.values()), high], [gflops, gflops], color="black", label=f"peak: {gflops:.0f} GFLOP/s")
    ax.set(xscale="log", yscale="log", xlabel="flops / byte, each number moved once", ylabel="GFLOP/s on kept weights")
    ax.set_ylim(0.5, 1.5 * gflops)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def break_even(rows: Sequence[Row], product: str, title: str) -> Figure:
    """The sparsity from which on a layer is faster than dense torch; hollow where that is beyond what was measured."""
    rows = [row for row in rows if row["implementation"] == OURS and row["product"] == product]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    blocks = list(dict.fromkeys(row["blocksize"] for row in rows))
    figure = Figure(figsize=(8.2, 1.4 + 0.24 * len(cases)), layout="constrained")
    figure.suptitle(f"{WORDS.get(product, product)}: sparsity from which sparse is faster\n{title}", fontsize=10)
    ax = figure.subplots()
    for i, blocksize in enumerate(blocks):
        colour, marker = STYLES[i % len(STYLES)]
        for y, case in enumerate(cases):
            chosen = [row for row in rows if (row["case"], row["blocksize"]) == (case, blocksize)]
            if chosen:
                kept, measured = crossing([(float(row["ideal"]), float(row["speedup_p50"])) for row in chosen])
                ax.plot(
                    kept, y + 0.08 * (i - len(blocks) / 2), color=colour, marker=marker, linestyle="", markersize=5,
                    markerfacecolor=colour if measured else "none", label=f"blocks {blocksize}",
                )  # fmt: skip
    ax.set_yticks(range(len(cases)), cases, fontsize=8)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="sparsity (hollow: faster at the lowest, or slower at the highest one measured)")
    sparsities = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    ax.set_xticks([1 / (1 - s) for s in sparsities], [f"{s:.0%}" for s in sparsities])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    handles = {str(line.get_label()): line for line in ax.get_lines() if line.get_markerfacecolor() != "none"}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def crossing(points: Sequence[tuple[float, float]]) -> tuple[float, bool]:
    """Where the line through (1 / density, speed-up), straight on logarithmic axes, last rises through 1.

    Returns:
        (1 / density, True); or, with False, the smallest one where all is faster, the largest where the end is slower.
    """
    points = sorted(points)
    if points[-1][1] < 1:
        return points[-1][0], False
    for (x0, y0), (x1, y1) in zip(points[-2::-1], points[:0:-1], strict=True):
        if y0 < 1:
            share = -math.log(y0) / (math.log(y1) - math.log(y0))
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0))), True
    return points[0][0], False
