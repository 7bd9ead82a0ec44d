"""Tables and pictures of finished runs.

    python -m bench.plot bench/results/X.csv [--again bench/results/Y.csv] [--runs demo/*] [--readme README.md]

The pictures are X.png (speed-up over dense torch against sparsity, one panel per layer, beside the ideal 1 / density),
X-roofline.png and X-break-even.png. The tables go to the terminal, or, with the pictures, into a file between
``<!-- bench:begin -->`` and ``<!-- bench:end -->``; that of trained networks, from the folders that ``sparsekern train
--compare-dense`` wrote, between ``<!-- demo:begin -->`` and ``<!-- demo:end -->``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from sparsekern.report import read_result

from .compare import times
from .cover import MAIN, PRODUCTS
from .pictures import Row, break_even, roofline, speedups
from .run import OURS
from .table import BUSY

MOSTLY_QUIET = 0.05  # share of busy rows that a picture may have without saying so


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Tables and pictures of a run.")
    parser.add_argument("csv", type=Path, help="written by python -m bench; the .json beside it is read too")
    parser.add_argument(
        "--again", type=Path, help="a later run on the same machine, of some cases: its figures replace theirs"
    )
    parser.add_argument("--product", choices=PRODUCTS, default="layer", help="in the pictures (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="in the pictures (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the table of layers (%(default)s)")
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], help="folders of sparsekern train, for a second table"
    )
    parser.add_argument("--readme", type=Path, help="put the tables into this file instead of printing them")
    args = parser.parse_args(argv)

    rows, later = _read(args.csv), _read(args.again) if args.again else []
    measured_again = list(dict.fromkeys(row["case"] for row in later))
    rows = [row for row in rows if row["case"] not in measured_again] + later
    header = json.loads(args.csv.with_suffix(".json").read_text())
    drawn = [row for row in rows if int(row["threads"]) == args.threads and row["product"] == args.product]
    if not drawn:
        parser.error(f"{args.csv} has no figures of {args.product} for --threads {args.threads}")
    if not any(float(row["sparsity"]) == args.sparsity for row in rows):
        parser.error(f"{args.csv} has no figures for --sparsity {args.sparsity:g}")
    pictures = draw(args.csv, drawn, header, args.product, args.threads)
    text = tables(rows, header, args.sparsity)
    if later:
        text += f"\n\nOf a later run than the rest: {', '.join(measured_again)}."
    texts = {"bench": text}
    if args.readme is not None:
        texts["bench"] += "\n\n" + "\n\n".join(
            f"![{name}]({Path(os.path.relpath(path, args.readme.parent)).as_posix()})"
            for name, path in pictures.items()
        )
    if args.runs:
        texts["demo"] = training_table([read_result(folder) for folder in args.runs])
    for name, text in texts.items():
        if args.readme is None:
            print(text)
        else:
            replace_marked(args.readme, name, text)
    return 0


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(path: Path, rows: Sequence[Row], header: dict[str, Any], product: str, threads: int) -> dict[str, Path]:
    """Write the pictures beside ``path``: {what it shows: file}."""
    title, ceilings = _title(header, threads, rows), header["ceilings"]
    pictures = {
        "Speed-up against sparsity": (speedups(rows, product, title), ""),
        "Sparsity from which sparse is faster": (break_even(rows, product, title), "-break-even"),
    }
    if str(threads) in ceilings["gflops"]:
        rates = {int(size): rate for size, rate in ceilings["gb_s"][str(threads)].items()}
        figure = roofline(rows, product, title, ceilings["gflops"][str(threads)], rates)
        pictures["Roofline"] = (figure, "-roofline")
    files = {}
    for name, (figure, suffix) in pictures.items():
        FigureCanvasAgg(figure)
        files[name] = path.with_name(f"{path.stem}{suffix}.png")
        figure.savefig(files[name], dpi=110)
    return files


def tables(rows: Sequence[Row], header: dict[str, Any], sparsity: float) -> str:
    """Everything that is shown in words: layers, other libraries, networks, by number of threads, and the losses."""
    texts = []
    for threads in sorted({int(row["threads"]) for row in rows}):
        mine = [row for row in rows if int(row["threads"]) == threads]
        at = [row for row in mine if float(row["sparsity"]) in (sparsity, 0) and row["product"] in PRODUCTS]
        layers = [row for row in at if row["implementation"] == OURS]
        if layers:
            texts += [f"Layers at {sparsity:.4g} sparsity, {_title(header, threads, mine)}:", table(layers)]
        if any(row["implementation"] != OURS for row in at):
            about = "The same by other libraries, against the same dense torch (forward / forward + backward):"
            texts += [about, peer_table(at)]
        networks = [row for row in mine if row["product"] == "step"]
        if networks:
            about = f"Training steps of whole networks, {threads} thread{'s' if threads > 1 else ''}"
            about += '; layers choose their kernels (`backend="auto"`)'
            texts += [f"{about}; speed-up, what the kept multiply-adds allow, share of it:", network_table(networks)]
    return "\n\n".join([*texts, losses(rows)])


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row per case, a column per blocksize, cells "forward / forward + backward", losses included."""
    found = list(dict.fromkeys(row["blocksize"] for row in rows))
    blocks = [block for block in map(times, MAIN) if block in found] or found
    lines = [
        f"| forward / forward + backward | {' | '.join(blocks)} | ideal |",
        f"|---|{'---|' * len(blocks)}---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case and row["blocksize"] in blocks]
        if not mine:
            continue
        ideals = sorted(float(row["ideal"]) for row in mine)
        low, high = f"{ideals[0]:.1f}", f"{ideals[-1]:.1f}"
        ideal = f"{low}x" if low == high else f"{low}-{high}x"
        cells = [_cell([row for row in mine if row["blocksize"] == block]) for block in blocks]
        lines.append(f"| {case} | {' | '.join(cells)} | {ideal} |")
    return "\n".join(lines)


def peer_table(rows: Sequence[Row]) -> str:
    """Markdown: a row per case and blocksize that any peer has, a column per library, cells as in :func:`table`."""

    def library(row: Row) -> str:
        return row["implementation"].removesuffix(" CSR").removesuffix(" BSR")

    peers = [row for row in rows if row["implementation"] != OURS and row["blocksize"] != "dense"]
    names = [OURS, *dict.fromkeys(library(row) for row in rows if row["implementation"] != OURS)]
    lines = [f"| layer, blocks | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for case, block in dict.fromkeys((row["case"], row["blocksize"]) for row in peers):
        cells = []
        for name in names:
            # A dense peer has one figure for all blocksizes; it stands with single weights.
            wanted = (block, "dense") if block == "1x1" else (block,)
            cells.append(
                _cell([r for r in rows if r["case"] == case and library(r) == name and r["blocksize"] in wanted])
            )
        lines.append(f"| {case}, {block} | {' | '.join(cells)} |")
    return "\n".join(lines)


def network_table(rows: Sequence[Row]) -> str:
    """Markdown: a row per network and blocksize, a column per sparsity, cells "speed-up of what is allowed (share)"."""
    sparsities = sorted({row["sparsity"] for row in rows}, key=float)
    lines = [
        f"| network, batch, blocks | {' | '.join(f'{100 * float(s):g} % sparse' for s in sparsities)} |",
        f"|---|{'---|' * len(sparsities)}",
    ]
    for case, batch, block in dict.fromkeys((row["case"], row["batch"], row["blocksize"]) for row in rows):
        cells = []
        for sparsity in sparsities:
            found = [
                r for r in rows if (r["case"], r["blocksize"], r["sparsity"]) == (case, block, sparsity)
            ]  # none where the result was wrong
            speedup, ideal = (float(found[0][key]) if found else 0.0 for key in ("speedup_p50", "ideal"))
            cells.append(f"{speedup:.2f}x of {ideal:.1f}x ({speedup / ideal:.0%})" if found else "-")
        lines.append(f"| {case.removeprefix('net-')}, {batch}, {block} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses(rows: Sequence[Row]) -> str:
    """A sentence: how many of sparsekern's figures are below dense torch, of all products and threads, by sparsity."""
    mine = [row for row in rows if row["implementation"] == OURS]
    parts = []
    for sparsity in sorted({float(row["sparsity"]) for row in mine}):
        at = [float(row["speedup_p50"]) for row in mine if float(row["sparsity"]) == sparsity]
        lost = [value for value in at if value < 1]
        if lost:
            parts.append(f"{len(lost)} of {len(at)} at {100 * sparsity:g} % (the worst {min(lost):.2f}x)")
    what = ", ".join(parts) if parts else "none"
    return f"Slower than dense torch, of all {len(mine)} figures of sparsekern in this run: {what}."


def training_table(results: Sequence[dict[str, Any]]) -> str:
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


def _cell(rows: Sequence[Row]) -> str:
    found = {row["product"]: float(row["speedup_p50"]) for row in rows}
    pair = [found.get(product) for product in ("forward", "layer")]
    if pair == [None, None]:
        return "-"
    return " / ".join("-" if value is None else f"{value:.1f}x" for value in pair)


def _title(header: dict[str, Any], threads: int, rows: Sequence[Row]) -> str:
    machine = header["machine"]
    remarks = "" if header["complete"] else " (incomplete run)"
    busy = sum(float(row["switches_per_second"]) > BUSY * int(row["threads"]) for row in rows) / len(rows)
    if busy > MOSTLY_QUIET:
        remarks += f" (machine busy during {busy:.0%} of it: not to be trusted)"
    return (
        f"{machine['cpu']['model']} ({machine['cpu']['isa']}), {threads} thread{'s' if threads > 1 else ''}, "
        f"float32, torch {machine['torch']}{remarks}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
