"""The tables that a person reads at the end of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from . import plots

# A row of the table: label, keys into the figures of one network, and its unit, and how it is written.
_ROWS: tuple[tuple[str, tuple[str, ...], float, str], ...] = (
    ("test accuracy", ("test_accuracy",), 1, "{:.2%}"),
    ("parameters", ("parameters",), 1, "{:,.0f}"),
    ("bytes: weights", ("bytes", "weights"), 1, "{:,.0f}"),
    ("bytes: indices, plans", ("bytes", "indices"), 1, "{:,.0f}"),
    ("bytes: gradients", ("bytes", "gradients"), 1, "{:,.0f}"),
    ("bytes: optimizer", ("bytes", "optimizer"), 1, "{:,.0f}"),
    ("multiply-adds kept", ("macs_kept",), 1, "{:.1%}"),
    ("training step (ms)", ("step_seconds", "p50"), 1e3, "{:.3f}"),
    ("  forward (ms)", ("step_seconds", "forward"), 1e3, "{:.3f}"),
    ("  backward (ms)", ("step_seconds", "backward"), 1e3, "{:.3f}"),
    ("  optimizer (ms)", ("step_seconds", "optimizer"), 1e3, "{:.3f}"),
    ("  data (ms)", ("step_seconds", "data"), 1e3, "{:.3f}"),
    ("training steps", ("train_steps",), 1, "{:,.0f}"),
    ("training, total (s)", ("train_seconds",), 1, "{:.2f}"),
    ("inference, 1 image (ms)", ("inference", "latency_seconds"), 1e3, "{:.3f}"),
    ("inference (images/s)", ("inference", "images_per_second"), 1, "{:,.0f}"),
    ("speed-up, training step", ("speedup", "train_step"), 1, "{:.2f}x"),
    ("speed-up, whole training", ("speedup", "train_total"), 1, "{:.2f}x"),
    ("speed-up, inference", ("speedup", "inference"), 1, "{:.2f}x"),
)


def run_table(result: Mapping[str, Any]) -> RenderableType:
    """The figures of one run, dense beside sparse, and what they have to be read with."""
    columns = [name for name in plots.NETWORKS if result[name] is not None]
    table = Table()
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label, keys, unit, form in _ROWS:
        values = [_get(result[name], keys) for name in columns]
        if any(value is not None for value in values):
            table.add_row(label, *_texts([None if value is None else value * unit for value in values], form))
    return Group(plots.title(result), table, *_notes(result))


def summary_table(folders: Sequence[Path]) -> RenderableType:
    """One column per run, from the result.json of each folder, and where the plots are.

    Args:
        folders: of runs, or folders whose sub-folders are, each standing for all of them.

    Raises:
        FileNotFoundError: a folder without result.json, in it or in a sub-folder.
        ValueError: a result.json that is not one of ours.
    """
    folders = [run for folder in folders for run in _runs_in(folder)]
    results = [read_result(folder) for folder in folders]
    settings = [result["settings"] for result in results]
    table = Table(title="Speed-ups are against dense torch, measured in the same run.", title_justify="left")
    table.add_column("")
    for folder, result in zip(folders, results, strict=True):
        remark = "" if result["complete"] else "\n(incomplete)"
        remark += "\n(busy machine)" if result.get("trustworthy") is False else ""
        table.add_column(folder.name + remark, justify="right")
    table.add_row("model", *(s["model"] for s in settings))
    table.add_row("data", *(s["dataset"] for s in settings))
    table.add_row("blocks", *("x".join(map(str, s["blocksize"])) for s in settings))
    table.add_row("sparsity", *(f"{s['sparsity']:.4g}" for s in settings), end_section=True)
    for name in plots.NETWORKS:
        accuracies = [_get(result[name] or {}, ("test_accuracy",)) for result in results]
        table.add_row(f"accuracy, {name}", *_texts(accuracies, "{:.2%}"), end_section=name == plots.NETWORKS[-1])
    for kind in ("train_step", "train_total", "inference"):
        ratios = [_get(result["speedup"] or {}, (kind,)) for result in results]
        table.add_row(f"speed-up, {kind}", *_texts(ratios, "{:.2f}x"))
    table.add_row("multiply-adds kept", *_texts([result["macs_kept"] for result in results], "{:.1%}"))
    table.add_row("allow at best", *_texts([result.get("ceiling") for result in results], "{:.2f}x"))
    files = [f"{folder}: {'  '.join(_plots_in(folder))}" for folder in folders]
    return Group(table, "plots:", *files)


def _texts(values: Sequence[float | None], form: str) -> list[str]:
    return ["-" if value is None else form.format(value) for value in values]


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a run's folder."""
    path = folder / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of a run, nor of runs: no result.json in it or one level below")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    needed = {"complete", "settings", "macs_kept", "speedup", *plots.NETWORKS}
    if not isinstance(result, dict) or not result.keys() >= needed:
        raise ValueError(f"{path} is not the result of a training run: it needs the keys {', '.join(sorted(needed))}")
    return result


def _runs_in(folder: Path) -> list[Path]:
    if (folder / "result.json").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/result.json")) or [folder]


def _plots_in(folder: Path) -> list[str]:
    return [name for name in plots.NAMES if (folder / name).is_file()]


def _get(figures: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    value: Any = figures
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    if result.get("trustworthy") is False:
        notes.append(
            "WARNING: the machine was busy: figures are not to be trusted. (Samples of the training step disagree, "
            "or a speed-up is above what its multiply-adds allow.)"
        )
    if not result["complete"]:
        notes.append("INCOMPLETE: the run was stopped; these are the figures measured until then.")
    layers = result.get("layers", ())
    if any(layer["blocksize"] != result["settings"]["blocksize"] for layer in layers):
        blocks = ", ".join(f"{layer['name']} {'x'.join(map(str, layer['blocksize']))}" for layer in layers)
        notes.append(
            f"blocks: {blocks} (the classifier and layers of fewer than 4 block rows or columns get 1x1; a "
            "convolution's block stays in one tap)."
        )
    if result["settings"]["dataset"] == "synthetic":
        notes.append("Synthetic data: the accuracies say nothing about real images.")
    if result.get("kernels") == "reference":
        notes.append("The plain-torch reference ran, not the compiled kernels: the times say nothing about those.")
    if result["macs_kept"] is not None:
        kept = result["macs_kept"]
        notes.append(f"sparse keeps {kept:.1%} of the multiply-adds: {1 / kept:.2f}x is the best speed-up that allows.")
        if result["speedup"] is not None:
            share = result["speedup"]["train_step"] * kept
            notes[-1] += f" Its training step reaches {share:.0%} of it."
    if "step_ratio" in (result["small_dense"] or {}):
        small = result["small_dense"]
        notes.append(
            f"small_dense has {small['width']:.3f} times the hidden width of dense and {small['step_ratio']:.2f} times "
            "the step time of sparse."
        )
    if result["speedup"] is not None:
        notes.append(
            f"Speed-ups: median of ratios to dense torch, timed in turn in this run, {result['threads']} threads, "
            f"batch {result['settings']['batch_size']}; 'whole training' is the ratio of the total seconds above, "
            "of networks trained one after the other."
        )
    return notes
