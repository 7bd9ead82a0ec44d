"""Advice and its check as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as Grid

from ..prune.blocksizes import Blocksize
from .advise import LayerAdvice
from .check import Checked, errors
from .table import Table


def advice_table(rows: Sequence[LayerAdvice], table: Table) -> RenderableType:
    """A line per layer and block that pruning would give it, and the sums of all layers."""
    known = [row for row in rows if row.reason is None]
    notes = [f"{row.name}: no prediction: {row.reason}" for row in rows if row.reason is not None]
    if not known:
        return Group(*notes, "no layer that the cost model knows")
    sparsities = list(next(iter(known[0].sparse_ms.values())))
    # Narrow enough for 80 columns, where speed-ups go below the times.
    grid = Grid(
        title="A training step, predicted: milliseconds on one thread (speed-up)", title_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name in ("layer", "weight", "blocks"):
        grid.add_column(name, no_wrap=True)
    for name in ("dense", *(f"{sparsity:.4g} sparse" for sparsity in sparsities), "break-even"):
        grid.add_column(name, justify="right", no_wrap=not name.endswith("sparse"))
    for row in known:
        shown: dict[Blocksize, Blocksize] = {}
        for asked, own in row.blocksizes.items():
            shown.setdefault(own, asked)
        for number, (own, asked) in enumerate(shown.items()):
            head = (row.name, _times(row.shape)) if number == 0 else ("", "")
            even = row.break_even[asked]
            grid.add_row(
                *head, _times(own), *_milliseconds(row.dense_ms or 0.0, list(row.sparse_ms[asked].values())),
                "never" if even is None else f"{even:.1%}", end_section=number == len(shown) - 1,
            )  # fmt: skip
    dense = sum(row.dense_ms or 0.0 for row in known)
    for asked in known[0].sparse_ms:
        sums = [sum(row.sparse_ms[asked][sparsity] for row in known) for sparsity in sparsities]
        grid.add_row("all", "", _times(asked), *_milliseconds(dense, sums), "")
    notes += [
        "Each layer is taken by itself, with its own call of autograd; activations, loss and optimizer come on top.",
        f"Predicted by {table.source()}.",
    ]
    return Group(grid, *notes)


def check_table(checked: Sequence[Checked]) -> RenderableType:
    """Predictions beside measurements, and their errors."""
    grid = Grid(title="Checked: predicted and measured milliseconds", title_justify="left")
    for name in ("layer", "blocks"):
        grid.add_column(name)
    for name in ("sparsity", "dense: predicted", "measured", "sparse: predicted", "measured"):
        grid.add_column(name, justify="right")
    for c in checked:
        times = (c.dense_predicted, c.dense_measured, c.sparse_predicted, c.sparse_measured)
        grid.add_row(c.name, _times(c.blocksize), f"{c.sparsity:.4g}", *(f"{time:.3f}" for time in times))
    lines = [
        f"error of prediction, {what}: median {median:.1%}, 90th percentile {p90:.1%}"
        for what, (median, p90) in errors(checked).items()
    ]
    return Group(grid, *lines)


def _milliseconds(dense: float, sparse: Sequence[float]) -> list[str]:
    return [f"{dense:.3f}", *(f"{time:.3f} ({dense / time:.1f}x)" for time in sparse)]


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"
