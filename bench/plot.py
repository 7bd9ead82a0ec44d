"""Picture and tables of finished runs.

    python -m bench.plot bench/results/X.csv [--runs demo/*] [--readme README.md]

The picture is X.png: speed-up over dense torch against sparsity, one panel per layer, beside the ideal 1 / density.
The table of layers goes to the terminal, or into a file between ``<!-- bench:begin -->`` and ``<!-- bench:end -->``;
that of whole networks, from the folders that ``sparsekern train --compare-dense`` wrote, between
``<!-- demo:begin -->`` and ``<!-- demo:end -->``.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sparsekern.report import read_result

from .cases import PRODUCTS
from .run import OURS, SCIPY, TORCH
from .table import BUSY

PANELS = (
    "lenet-300-100-fc1", "linear-256x1024x1024", "transformer-mlp-up",
    "lenet-5-conv2", "conv3x3-64@32", "conv3x3-128@16",
)  # fmt: skip
# Okabe-Ito colours, told apart by the colour-blind too; with markers, one per blocksize in the order of the file.
STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"))
PEERS = {TORCH: "x", SCIPY: "+"}
MOSTLY_QUIET = 0.05  # share of busy rows that a picture may have without saying so
WORDS = {"layer": "forward + backward through the layer"}

Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Picture and table of a run.")
    parser.add_argument("csv", type=Path, help="written by python -m bench; the .json beside it is read too")
    parser.add_argument("--product", choices=PRODUCTS, default="layer", help="in the picture (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the table (%(default)s)")
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], help="folders of sparsekern train, for a second table"
    )
    parser.add_argument("--readme", type=Path, help="put the tables into this file instead of printing them")
    args = parser.parse_args(argv)

    with args.csv.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["threads"]) == args.threads]
    if not rows:
        parser.error(f"{args.csv} has no figures for --threads {args.threads}")
    title = _title(json.loads(args.csv.with_suffix(".json").read_text()), args.threads, rows)
    at = [row for row in rows if row["implementation"] == OURS and float(row["sparsity"]) == args.sparsity]
    if not at:
        parser.error(f"{args.csv} has no figures for --sparsity {args.sparsity:g}")
    texts = {"bench": f"At {args.sparsity:.4g} sparsity, {title}:\n\n{table(at)}"}
    if args.runs:
        texts["demo"] = network_table([read_result(folder) for folder in args.runs])
    for name, text in texts.items():
        if args.readme is None:
            print(text)
        else:
            replace_marked(args.readme, name, text)
    figure = draw([row for row in rows if row["product"] == args.product], args.product, title)
    FigureCanvasAgg(figure)
    figure.savefig(args.csv.with_suffix(".png"), dpi=130)
    return 0


def draw(rows: Sequence[Row], product: str, title: str) -> Figure:
    """Up to six panels; points are medians, bands reach from the 20 % to the 80 % quantile of the rounds."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    cases = ([case for case in PANELS if case in cases] or cases)[:6]
    columns = 2 if len(cases) == 4 else min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.6 + 3.1 * lines), layout="constrained")
    figure.suptitle(f"{WORDS.get(product, product)}: times faster than dense torch\n{title}", fontsize=10)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax, case in zip(panels, cases, strict=False):
        _panel(ax, case, [row for row in rows if row["case"] == case])
    for ax in panels[len(cases) :]:
        ax.set_visible(False)
    panels[0].set_ylim(min(0.5, *(0.8 * float(row["speedup_p20"]) for row in rows)))
    by_label = {str(line.get_label()): line for ax in panels for line in ax.get_lines()}
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _panel(ax: Axes, case: str, rows: Sequence[Row]) -> None:
    names = sorted(dict.fromkeys((row["implementation"], row["blocksize"]) for row in rows), key=lambda n: n[0] != OURS)
    blocks = list(dict.fromkeys(row["blocksize"] for row in rows))
    for name, blocksize in names:
        chosen = [row for row in rows if (row["implementation"], row["blocksize"]) == (name, blocksize)]
        # By what was really kept, so that the ideal is one straight line for all blocksizes.
        kept = [float(row["ideal"]) for row in chosen]
        low, middle, high = ([float(row[f"speedup_{p}"]) for row in chosen] for p in ("p20", "p50", "p80"))
        if name == OURS:
            colour, marker = STYLES[blocks.index(blocksize) % len(STYLES)]
            ax.plot(kept, middle, color=colour, marker=marker, markersize=4, linewidth=1.3, label=f"blocks {blocksize}")
            ax.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            ax.plot(kept, middle, color="grey", linestyle=":", marker=PEERS[name], label=f"{name} {blocksize}")
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


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row per case, a column per blocksize, cells "forward / forward + backward", losses included."""
    blocks = list(dict.fromkeys(row["blocksize"] for row in rows))
    found = {(row["case"], row["blocksize"], row["product"]): float(row["speedup_p50"]) for row in rows}

    def cell(case: str, blocksize: str) -> str:
        pair = [found.get((case, blocksize, product)) for product in ("forward", "layer")]
        return " / ".join("-" if value is None else f"{value:.1f}x" for value in pair)

    lines = [
        f"| forward / forward + backward | {' | '.join(blocks)} | ideal |",
        f"|---|{'---|' * len(blocks)}---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        ideals = sorted(float(row["ideal"]) for row in rows if row["case"] == case)
        low, high = f"{ideals[0]:.1f}", f"{ideals[-1]:.1f}"
        ideal = f"{low}x" if low == high else f"{low}-{high}x"
        lines.append(f"| {case} | {' | '.join(cell(case, blocksize) for blocksize in blocks)} | {ideal} |")
    return "\n".join(lines)


def network_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per run, beside the narrower dense network of equal step time and the random mask."""
    columns = ("dense", "sparse", "small_dense", "random_mask")
    lines = [
        "| network, blocks, epochs | accuracy: dense | sparse | narrower dense, same step time "
        "| same densities at random | training step | inference | multiply-adds allow |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        settings, faster = result["settings"], result["speedup"]
        blocks = "x".join(str(n) for n in settings["blocksize"])
        cells = [f"{settings['model']}, {blocks}, {settings['epochs']}"]
        cells += [f"{100 * result[column]['test_accuracy']:.1f} %" for column in columns]
        cells += [f"{faster['train_step']:.2f}x", f"{faster['inference']:.2f}x", f"{1 / result['macs_kept']:.1f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    first = results[0]
    about = (
        f"{first['settings']['dataset']}, {100 * first['settings']['sparsity']:g} % sparse, batch "
        f"{first['settings']['batch_size']}, {first['threads']} threads; speed-ups over dense torch, "
        "optimizer and data included in the training step:"
    )
    return "\n".join([about, "", *lines])


def replace_marked(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the lines ``<!-- name:begin -->`` and ``<!-- name:end -->``, in place of what is there.

    Raises:
        ValueError: the file has not exactly one of each marker, in that order.
    """
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = path.read_text().partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end or first in rest or last in head + tail:
        raise ValueError(f"{path} must have one {first} and, after it, one {last}")
    path.write_text(f"{head}{first}\n\n{text}\n\n{last}{tail}")


def _title(header: dict[str, Any], threads: int, rows: Sequence[Row]) -> str:
    machine = header["machine"]
    remarks = "" if header["complete"] else " (incomplete run)"
    busy = sum(float(row["switches_per_second"]) > BUSY for row in rows) / len(rows)
    if busy > MOSTLY_QUIET:
        remarks += f" (machine busy during {busy:.0%} of it: not to be trusted)"
    return (
        f"{machine['cpu']['model']} ({machine['cpu']['isa']}), {threads} thread{'s' if threads > 1 else ''}, "
        f"float32, torch {machine['torch']}{remarks}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
