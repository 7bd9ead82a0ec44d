"""``python -m bench [--quick] [--only CASE ...] [--name NAME]``: writes bench/results/NAME.csv and NAME.json."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsekern import info

from .cases import CASES
from .run import count, machine, measure
from .table import BUSY, FULL, QUICK, QUICK_CASES, Results

FOLDER = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time sparse layers against dense torch.")
    parser.add_argument("--quick", action="store_true", help="a small part of the table, in under 2 minutes")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--name", help="of the result files; by default the CPU model, threads and what was chosen")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result files (%(default)s)")
    args = parser.parse_args(argv)

    settings = QUICK if args.quick else FULL
    usable = tuple(n for n in settings.threads if n <= info.usable_cores())
    names = args.only or (QUICK_CASES if args.quick else tuple(CASES))
    results = Results(replace(settings, threads=usable), [CASES[name] for name in names])
    parts = [info.cpu_model(), f"{max(usable)}t", *(["quick"] if args.quick else []), *(args.only or [])]
    name = args.name or re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")
    console = Console()
    here = machine()
    # Written after every group, so that a run that is stopped leaves what it has, marked as incomplete.
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=count(results))
        try:
            for i, description in enumerate(measure(results)):
                progress.update(task, completed=i, description=description)
                results.write(args.out, name, here)
            progress.update(task, completed=count(results), description="done")
        except KeyboardInterrupt:
            console.print("interrupted: the figures so far are kept, marked as incomplete")
    results.write(args.out, name, here)
    console.print(f"{len(results.rows)} figures: {args.out / name}.csv and .json", soft_wrap=True)
    for line in results.refused:
        console.print(f"no figure, the result is wrong: {line}", style="red", soft_wrap=True)
    busy = sum(row.switches_per_second > BUSY for row in results.rows)
    if busy:
        console.print(f"{busy} figures were measured while others used the processor: repeat this on a quiet machine")
    if not results.complete:
        return 130
    return 1 if results.refused else 0


if __name__ == "__main__":
    sys.exit(main())
