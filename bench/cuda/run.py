"""Measure, or model where there is no GPU; one table, one plot, one file of figures."""

from __future__ import annotations

import csv
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from sparsekern import triton
from sparsekern.backend import Backend
from sparsekern.triton import tuning
from sparsekern.triton.model import GPUS, itemsize
from sparsekern.triton.plan import Product
from sparsekern.triton.tuning import Kind

from . import candidates, model, timing, tune
from .candidates import BSR, COMPILED, DENSE, OURS, SEMI, TOLERANCE, Problem
from .cases import BLOCKS, CASES, DENSITIES, PRODUCTS, QUICK, Case

WIDTH = 140  # columns of the table, which is also read in files
Calls = dict[Product, candidates.Call]
MODEL = "model"  # in place of a GPU's name and of who computed


class Row(NamedTuple):
    """A figure. Seconds are medians where they were measured; shares are fractions of 1."""

    gpu: str
    case: str
    kind: str  # "tf32": float32 with TF32 allowed, for all candidates alike
    block: str
    density: float
    product: str
    implementation: str
    seconds: float
    speedup: float  # over the dense product of the same kind
    rate: float  # FLOP/s of stored weights
    of_peak: float  # measured peak of the library's dense product (model: the modelled dense kernel)
    of_floor: float  # roofline floor / seconds
    binding: str  # the resource that binds; of the model only


def main(out: Path, quick: bool, tune_table: bool, console: Console) -> int:
    """``python -m bench --device cuda``."""
    cases = QUICK if quick else CASES
    if not torch.cuda.is_available():
        if tune_table:
            console.print("--tune needs a GPU: torch sees none", style="red")
            return 1
        console.print(
            "No GPU here: these figures are a MODEL's (sparsekern/triton/model.py), nothing was measured. It knows the "
            "rates of data sheets and what the kernels would be asked to do; it knows no latency, launches or clocks.",
            style="bold",
        )
        # Below the floor of a launch, which it does not know, its figures mean nothing.
        rows = list(modelled(cases[:1] if quick else [case for case in cases if case.tokens >= 256], "bfloat16"))
        Console(width=max(console.width, WIDTH)).print(table(rows))
        return 0
    missing = triton.missing()
    if missing:
        console.print(f"the kernels cannot run here: {missing}", style="red")
        return 1
    name = torch.cuda.get_device_name()
    clock = timing.cuda_clock()
    if tune_table:
        console.print(
            f"tuning table: {tune.refresh(clock, log=console.print)} entries of {name} in {tuning.TABLE}",
            soft_wrap=True,
        )
    peaks = timing.measured_peaks(clock)
    console.print(f"{name}, torch {torch.__version__}; measured peaks: {_rates(peaks)}", soft_wrap=True)
    rows = []
    kinds: tuple[Kind, ...] = ("bfloat16", "tf32")
    complaints: list[str] = []

    def complain(text: str) -> None:
        complaints.append(text)
        console.print(text, style="red", soft_wrap=True)

    for kind in kinds:
        for case in cases if kind == "bfloat16" else cases[:1]:
            for row in measured(case, kind, clock, peaks, name, complain):
                rows.append(row)
                console.print(" ".join(map(str, row[1:8])), soft_wrap=True)
    Console(width=max(console.width, WIDTH)).print(table(rows))
    stem = out / re.sub(r"[^a-z0-9]+", "-", f"{name} {'quick' if quick else ''}".lower()).strip("-")
    save(rows, stem)
    console.print(f"{len(rows)} figures: {stem}.csv and .png ({platform.node()})", soft_wrap=True)
    # Others may refuse a case, ours may not.
    return 1 if any(f" {OURS}, " in text or f" {OURS}: " in text for text in complaints) else 0


def modelled(cases: Sequence[Case], kind: Kind) -> Iterator[Row]:
    """Rows of the model, for each GPU that it knows."""
    for gpu in GPUS:
        for case in cases:
            dense = max(model.dense(gpu, case, kind).values())
            peak = 2 * case.tokens * case.outputs * case.inputs / dense
            for block in BLOCKS:
                for density in DENSITIES:
                    pattern = case.pattern(block, density)
                    for product in PRODUCTS:
                        times = model.predict(gpu, case, pattern, product, kind)
                        seconds = max(times.values())
                        rate = _flops(case, pattern.density) / seconds
                        floor = model.floor(gpu, case, pattern.density, kind, pattern.nnz_blocks)
                        yield Row(
                            f"{gpu.name} ({MODEL})", case.name, kind, _name(block), density, product, MODEL, seconds,
                            dense / seconds, rate, rate / peak, floor / seconds, model.binding(times),
                        )  # fmt: skip


def measured(
    case: Case, kind: Kind, clock: timing.Clock, peaks: dict[str, float], gpu: str, complain: Callable[[str], None],
    device: str = "cuda", backend: Backend = "triton", blocks: Sequence[tuple[int, int]] = BLOCKS,
) -> Iterator[Row]:  # fmt: skip
    """Rows of one layer. A candidate whose result is wrong, or that raises, gets none and is named."""
    with timing.allow_tf32(kind == "tf32"):
        base: dict[Product, float] = {}
        whole = case.pattern(blocks[0], 1.0, device)
        for name, make in (
            (DENSE, candidates.dense),
            (COMPILED, candidates.compiled),
            (SEMI, candidates.semi_structured),
        ):
            density = 0.5 if name == SEMI else 1.0
            problem = Problem.draw(case, whole, kind)
            for product, seconds in _timed(name, make, problem, kind, clock, complain, check=name != SEMI):
                base.setdefault(product, seconds)
                yield _row(case, kind, "dense", density, product, name, seconds, base[product], peaks, gpu)
        for block in blocks:
            for density in DENSITIES:
                problem = Problem.draw(case, case.pattern(block, density, device), kind)
                for name, make in ((OURS, lambda p: candidates.ours(p, backend)), (BSR, candidates.bsr)):
                    for product, seconds in _timed(name, make, problem, kind, clock, complain):
                        kept = problem.pattern.density
                        yield _row(case, kind, _name(block), kept, product, name, seconds, base[product], peaks, gpu)


def _timed(
    name: str, make: Callable[[Problem], Calls], problem: Problem, kind: Kind, clock: timing.Clock,
    complain: Callable[[str], None], check: bool = True,
) -> Iterator[tuple[Product, float]]:  # fmt: skip
    try:
        calls = make(problem)
    except candidates.refusals() as reason:
        complain(f"left out: {name}: {reason}")
        return
    for product, call in calls.items():
        try:
            with timing.allow_tf32(kind == "tf32"):
                result = call()
            with timing.allow_tf32(False):
                off = candidates.error(product, problem, result, name) if check else 0.0
        except candidates.refusals() as reason:
            complain(f"left out: {name}, {product}: {reason}")
            continue
        if not off <= TOLERANCE[kind]:  # a NaN is wrong, too
            complain(f"no figure, the result is wrong by {off:.1e}: {name}, {product}, {problem.pattern}")
            continue
        with timing.allow_tf32(kind == "tf32"):
            yield product, clock(call).median


def _row(
    case: Case, kind: Kind, block: str, density: float, product: str, name: str, seconds: float, dense: float,
    peaks: dict[str, float], gpu: str,
) -> Row:  # fmt: skip
    rate, size = _flops(case, density) / seconds, itemsize(kind)
    t, n, k = case
    moved = size * (t * k + density * n * k + t * n)
    floor = max(_flops(case, density) / peaks[kind], moved / peaks["memory"])
    return Row(
        gpu, case.name, kind, block, round(density, 4), product, name, seconds, dense / seconds, rate,
        rate / peaks[kind], floor / seconds, "",
    )  # fmt: skip


def table(rows: Sequence[Row]) -> RenderableType:
    """A part per GPU and layer, a line per product, block and candidate, a column per density.

    In the cells microseconds, speed-up over dense, rate and floor as shares, and, of the model, what binds.
    """
    modelled = any(row.implementation == MODEL for row in rows)
    parts: list[RenderableType] = [
        f"{'MODEL, not measured: ' if modelled else ''}microseconds, speed-up over dense, rate as a share of the "
        f"{'modelled dense kernel' if modelled else 'measured dense peak'}'s, roofline floor as a share of the time"
        f"{', what binds' if modelled else ''}"
    ]
    for gpu, case, kind in dict.fromkeys(row[:3] for row in rows):
        grid = Table(title=f"{gpu}: {case}, {kind}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("product", "blocks", "by", *(f"density {density:g}" for density in DENSITIES)):
            grid.add_column(heading, no_wrap=True)
        lines: dict[tuple[str, str, str], dict[float, str]] = {}
        for row in rows:
            if row[:3] == (gpu, case, kind):
                text = f"{row.seconds * 1e6:.0f} {row.speedup:.2f}x {row.of_peak:.0%} {row.of_floor:.0%} {row.binding}"
                at = DENSITIES[0] if row.block == "dense" else _nearest(row.density)
                lines.setdefault((row.product, row.block, row.implementation), {})[at] = text.rstrip()
        for key, cells in lines.items():
            grid.add_row(*key, *(cells.get(density, "") for density in DENSITIES))
        parts.append(grid)
    return Group(*parts)


def save(rows: Sequence[Row], stem: Path) -> None:
    """Figures as STEM.csv, and STEM.png: speed-up against density of the first layer's products."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    figure = Figure(figsize=(4.5 * len(PRODUCTS), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, product in zip(figure.subplots(1, len(PRODUCTS), sharey=True), PRODUCTS, strict=True):
        drawn = [row for row in rows if (row.case, row.kind, row.product) == (rows[0].case, rows[0].kind, product)]
        for name, block in dict.fromkeys((row.implementation, row.block) for row in drawn if row.block != "dense"):
            line = [row for row in drawn if (row.implementation, row.block) == (name, block)]
            style = "o-" if name in (OURS, MODEL) else "x--"
            axes.plot([row.density for row in line], [row.speedup for row in line], style, label=f"{name} {block}")
        axes.plot(DENSITIES, [1 / density for density in DENSITIES], "k:", label="1 / density")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=product, xlabel="density", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    figure.suptitle(f"speed-up over dense torch, {rows[0].gpu}, {rows[0].case}, {rows[0].kind}")
    figure.savefig(stem.with_suffix(".png"), dpi=110)


def _flops(case: Case, density: float) -> float:
    return 2 * case.tokens * case.outputs * case.inputs * density


def _name(block: tuple[int, int]) -> str:
    return f"{block[0]}x{block[1]}"


def _nearest(density: float) -> float:
    return min(DENSITIES, key=lambda wanted: abs(wanted - density))


def _rates(peaks: dict[str, float]) -> str:
    texts = [f"{kind} {rate / 1e12:.0f} TFLOP/s" for kind, rate in peaks.items() if kind != "memory"]
    return ", ".join([*texts, f"copying {peaks['memory'] / 1e12:.2f} TB/s"])
