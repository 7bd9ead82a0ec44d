"""The command line: ``sparsekern train``, ``summary``, ``experiment``, ``info``, ``calibrate`` and ``advise``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

INTERRUPTED = 130
# Drawing progress costs about a millisecond.
REDRAW_SECONDS = 0.2
WIDEST = 10_000  # characters: wider than any table
ELLIPSIS = "…"  # what stands in a cell that was cut


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (could not do it), 2 (bad arguments, by argparse) or 130 (stopped)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(words)
    console, errors = Console(), Console(stderr=True)
    try:
        with _stoppable():
            if options.command == "train":
                return _train(parser, options, words, console)
            run = {
                "summary": _summary,
                "experiment": _experiment,
                "info": _info,
                "calibrate": _calibrate,
                "advise": _advise,
            }[options.command]
            return run(options, console)
    except (OSError, ValueError, FloatingPointError) as error:
        errors.print(f"sparsekern: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        lost = "what was done is kept" if options.command == "experiment" else "nothing was written"
        errors.print(f"sparsekern: stopped before the end; {lost}", markup=False)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .experiments import EXPERIMENTS
    from .train.settings import BACKENDS, DATASETS, MODELS, PRUNERS, Settings

    parser = argparse.ArgumentParser("sparsekern", description="Sparse neural-network training, measured.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="prune a network before training, train it sparse, and compare it with dense torch"
    )
    default = "default: %(default)s"
    model = f"one of {', '.join(MODELS)}; {default}"
    train.add_argument("--model", choices=MODELS, metavar="NAME", default=Settings.model, help=model)
    train.add_argument("--dataset", choices=DATASETS, default=Settings.dataset, help=default)
    train.add_argument(
        "--sparsity", type=float, default=Settings.sparsity, help=f"fraction removed, in [0, 1); {default}"
    )
    train.add_argument(
        "--blocksize", type=_blocksize, default="8x8", metavar="HxW", help=f"1x1: unstructured; {default}"
    )
    train.add_argument("--pruner", choices=PRUNERS, default=Settings.pruner, help=default)
    train.add_argument("--isometry", action="store_true", help="restore approximate isometry before training")
    train.add_argument("--epochs", type=int, default=Settings.epochs, metavar="N", help=default)
    train.add_argument(
        "--compare-dense",
        action="store_true",
        help="also train the dense network, a narrower one of equal step time, and a random mask",
    )
    train.add_argument("--seed", type=int, default=Settings.seed, metavar="S", help=default)
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    train.add_argument("--overwrite", action="store_true", help="replace the earlier run that --out holds")
    train.add_argument("--batch-size", type=int, default=Settings.batch_size, metavar="N", help=default)
    train.add_argument(
        "--lr", type=float, help="peak of the one-cycle schedule; default: 0.1, lenet-5-caffe, MLPs and VGGs 0.05"
    )
    train.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data set's files; default: find or fetch them"
    )
    train.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    train.add_argument("--backend", choices=BACKENDS, default=Settings.backend, help=f"of the sparse layers; {default}")
    summary = commands.add_parser("summary", help="one table of several runs, and where their plots are")
    summary.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="--out of a run, or a folder of such")
    experiment = commands.add_parser(
        "experiment", help="run an experiment of the papers, or one of ours, on sparse networks: table, plot and JSON"
    )
    experiment.add_argument("name", choices=EXPERIMENTS, metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)}")
    experiment.add_argument(
        "--out", type=Path, default=Path("experiments"), metavar="DIR",
        help="results; what it holds of this experiment is not computed again; default: %(default)s",
    )  # fmt: skip
    experiment.add_argument("--seeds", type=_positive, default=5, metavar="N", help="runs of every cell; default: 5")
    experiment.add_argument(
        "--jobs", type=int, default=1, metavar="N", help=f"processes; 0 shows what there is already; {default}"
    )
    experiment.add_argument("--quick", action="store_true", help="one epoch on synthetic data, to see that it works")
    info = commands.add_parser("info", help="versions, processor and which kernels are at hand")
    info.add_argument("--json", action="store_true")
    calibrate = commands.add_parser("calibrate", help="measure this machine for `advise` and backend=auto (under 30 s)")
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="default: where backend=auto looks for it")
    advise = commands.add_parser("advise", help="predict what sparsity brings to each layer of a network")
    advise.add_argument("--model", choices=MODELS, metavar="NAME", default=Settings.model, help=model)
    advise.add_argument("--batch", type=_positive, default=Settings.batch_size, metavar="N", help=default)
    advise.add_argument(
        "--blocksizes", type=_blocksize, nargs="+", default=[(1, 1), (4, 1), (8, 8), (16, 16)], metavar="HxW",
        help="to compare; default: 1x1 4x1 8x8 16x16",
    )  # fmt: skip
    advise.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95], metavar="S",
        help="fractions removed, in [0, 1); default: 0.5 0.8 0.9 0.95",
    )  # fmt: skip
    advise.add_argument("--check", action="store_true", help="time a sample of it, and show how far off it was")
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _blocksize(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be two whole numbers such as 8x8, got {text!r}")
    return int(height), int(width)


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str], console: Console) -> int:
    from . import report
    from .train import Interrupted, Settings, run

    fields = {key: value for key, value in vars(options).items() if key != "command"}
    try:
        settings = Settings(**fields)
    except ValueError as error:
        parser.error(str(error))
    try:
        with _Live(console) as live:
            result, code = run(settings, ["sparsekern", *words], live.show), 0
    except Interrupted as stopped:
        result, code = stopped.result, INTERRUPTED
    _print_whole(console, report.run_table(result))
    lines = [f"results and plots: {settings.out}"]
    if result["model_file"]:
        name, epoch = result["model_file"]["name"], result["model_file"]["epoch"]
        lines.append(f"sparse network after epoch {epoch} of {settings.epochs}: {settings.out / name}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return code


def _summary(options: argparse.Namespace, console: Console) -> int:
    from . import report

    _print_whole(console, report.summary_table(options.folders))
    return 0


def _experiment(options: argparse.Namespace, console: Console) -> int:
    from .experiments import EXPERIMENTS

    if options.jobs < 0:
        raise ValueError(f"--jobs must not be negative, got {options.jobs}")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, but {options.out} is a file")
    options.out.mkdir(parents=True, exist_ok=True)
    run = EXPERIMENTS[options.name]
    with _Live(console) as live:
        table = run(options.name, options.out, options.seeds, options.jobs, options.quick, live.show)
    console.print(table.read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    return 0


def _info(options: argparse.Namespace, console: Console) -> int:
    from . import info

    facts = info.collect()
    if options.json:
        console.print_json(data=facts)
    else:
        for key, value in facts.items():
            # One line for each fact about the processor.
            lines = [f"{key} {name}: {fact}" for name, fact in value.items()] if key == "cpu" else [f"{key}: {value}"]
            console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return 0


def _calibrate(options: argparse.Namespace, console: Console) -> int:
    from .cost import table
    from .cost.calibrate import calibrate
    from .timing import keep_freed_memory

    keep_freed_memory()
    file = options.out or table.path()
    with console.status("") as status:
        measured = calibrate(lambda note: status.update(note))
    table.save(measured, file)
    console.print(
        f"{file}: measured in {measured.seconds:.0f} s; median error of the fit {measured.error:.1%}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if measured.busy:
        console.print(
            f"WARNING: the machine was busy ({measured.busy}): repeat this when it is quiet",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    return 0


def _advise(options: argparse.Namespace, console: Console) -> int:
    import torch

    from . import models
    from .cost import advise, check, show, table
    from .timing import keep_freed_memory

    model, holds = models.build(options.model), table.current()
    image = models.image_shape(options.model)
    example = torch.zeros(options.batch, *image)
    rows = advise.advise(model, example, blocksizes=options.blocksizes, sparsities=options.sparsities)
    console.print(
        f"{options.model}, batch size {options.batch}, images of {'x'.join(map(str, image))}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    _print_whole(console, show.advice_table(rows, holds))
    if options.check:
        keep_freed_memory()
        _print_whole(console, show.check_table(list(check.check(model, rows, holds))))
    return 0


def _print_whole(console: Console, shown: RenderableType) -> None:
    """Print tables uncut: where a terminal is too narrow for that, and everywhere else, at their full width."""
    with console.capture() as captured:
        console.print(shown)
    if not console.is_terminal or ELLIPSIS in captured.get():
        full = Measurement.get(console, console.options.update_width(WIDEST), shown).maximum
        console.size = ConsoleDimensions(max(console.width, full), console.height)
    console.print(shown)


class _Live:
    """Live progress: one line per stage of the run."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
        # No refreshing thread: it would take time from the training steps that are being measured.
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}
        self._drawn = 0.0

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._finish_stages()
        self._progress.stop()

    def show(self, what: str, done: int, total: int, note: str) -> None:
        new = what not in self._tasks
        if new:
            self._finish_stages()
            self._tasks[what] = self._progress.add_task(what, total=total or None, note=note)
        self._progress.update(self._tasks[what], completed=done, note=note)
        if new or done == total or time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def _finish_stages(self) -> None:
        for task in self._progress.tasks:
            # A stage of unknown length counts as one thing, done.
            self._progress.update(task.id, total=task.total or 1, completed=task.completed or 1)
            self._progress.stop_task(task.id)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, once: after the first, results are written undisturbed."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
