"""``python -m bench [--quick] [--only CASE ...] [--name NAME]``: writes bench/results/NAME.csv and NAME.json.

``python -m bench --device cuda [--quick] [--tune]`` is another table, of linear layers on a GPU (``bench/cuda``).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsekern import info

from .cases import CASES
from .ceilings import measure_ceilings
from .cover import FULL, QUICK, on_cores, only
from .cuda.run import main as run_cuda
from .networks import NETWORKS
from .peers import versions
from .run import count, machine, measure
from .table import BUSY, Results

FOLDER = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time sparse layers against dense torch.")
    parser.add_argument("--quick", action="store_true", help="a small part of the table; cpu: in under 2 minutes")
    names = (*CASES, *NETWORKS)
    parser.add_argument("--only", nargs="+", choices=names, metavar="CASE", help=f"cpu: of {', '.join(names)}")
    parser.add_argument("--name", help="cpu: of the result files; by default the CPU, threads and what was chosen")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result files (%(default)s)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: another table, of linear layers on a GPU, or a model's figures without one (%(default)s)",
    )
    parser.add_argument("--tune", action="store_true", help="cuda: first measure sparsekern/triton/tuning.json anew")
    args = parser.parse_args(argv)
    if args.tune and args.device != "cuda":
        parser.error("--tune is for --device cuda")
    if args.device == "cuda":
        if args.only or args.name:
            parser.error("--only and --name are for --device cpu")
        return run_cuda(args.out, args.quick, args.tune, Console())

    cover = QUICK if args.quick else FULL
    if args.only:
        cover = only(cover, [name for name in args.only if name in CASES], [n for n in args.only if n in NETWORKS])
    cover = on_cores(cover, info.usable_cores())
    threads = sorted({n for part in cover.parts for n in part.threads} | set(cover.threads))
    parts = [info.cpu_model(), f"{max(threads)}t", *(["quick"] if args.quick else []), *(args.only or [])]
    name = args.name or re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")
    console = Console()
    here = machine()
    results = Results(cover, measure_ceilings(threads), versions())
    for peer, version in results.peers.items():
        if version.startswith("missing"):
            console.print(f"left out: {peer}, {version}", soft_wrap=True)
    # Written after every group, so that a run that is stopped leaves what it has, marked as incomplete.
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=count(cover))
        try:
            for i, description in enumerate(measure(results)):
                progress.update(task, completed=i, description=description)
                results.write(args.out, name, here)
            progress.update(task, completed=count(cover), description="done")
        except KeyboardInterrupt:
            console.print("interrupted: the figures so far are kept, marked as incomplete")
    results.write(args.out, name, here)
    console.print(f"{len(results.rows)} figures: {args.out / name}.csv and .json", soft_wrap=True)
    for line in results.refused:
        console.print(f"no figure, the result is wrong: {line}", style="red", soft_wrap=True)
    busy = sum(row.switches_per_second > BUSY * row.threads for row in results.rows)
    if busy:
        console.print(f"{busy} figures were measured while others used the processor: repeat this on a quiet machine")
    if not results.complete:
        return 130
    return 1 if results.refused else 0


if __name__ == "__main__":
    sys.exit(main())
