"""Refresh ``sparsekern/triton/tuning.json``: the fastest tiles and pipelines of this GPU, each with its source."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sparsekern import ops
from sparsekern.triton import tuning
from sparsekern.triton.plan import Product
from sparsekern.triton.tuning import TABLE, Config, Kind

from . import candidates, timing
from .cases import BLOCKS, PRODUCTS, Case

COMMAND = "python -m bench --device cuda --tune"
KINDS: tuple[Kind, ...] = ("bfloat16", "float16", "tf32")
SIZE, DENSITY = 4096, 0.25
# Tokens up to which an entry holds, and those that it is measured at.
TOKENS = ((16, 16), (32, 32), (64, 64), (256, 256), (2**31 - 1, 8192))
GAIN = 0.97  # an entry must take at most this share of the rule's time: less is noise


def configs(rule: Config, product: Product) -> Iterator[Config]:
    """What is tried around what the rule chooses, which comes first."""
    yield rule
    tiles = (32, 64, 128) if product == "wgrad" else (16, 32, 64, 128, 256)
    near = [tile for tile in tiles if rule.tile_t / 4 <= tile <= rule.tile_t * 2]
    for tile_t, warps, stages in itertools.product(near, (4, 8), (2, 3, 4, 5, 6)):
        config = rule._replace(tile_t=tile_t, warps=warps, stages=stages)
        if config != rule:
            yield config


def refresh(
    clock: timing.Clock,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    log: Callable[[str], None] = print,
    device: str = "cuda",
) -> int:
    """Measure, and replace the entries of this GPU's architecture; returns how many there are now."""
    kernels = ops.triton_kernels()
    arch = kernels._arch()
    data: dict[str, Any] = json.loads(TABLE.read_text())
    kept = [entry for entry in data["entries"] if entry["arch"] != arch]
    found = []
    for kind, block, (last, tokens) in itertools.product(KINDS, blocks, TOKENS):
        first = 1 + max((bound for bound, _ in TOKENS if bound < last), default=0)
        case = Case(tokens, SIZE, SIZE)
        problem = candidates.Problem.draw(case, case.pattern(block, DENSITY, device), kind)
        calls = candidates.ours(problem)
        for product in PRODUCTS:
            rule, group = _asked(kernels, calls[product], kind)
            times = {
                config: _time(kernels, config, calls[product], problem, product, kind, clock, log)
                for config in configs(rule, product)
            }
            best = min(times, key=lambda config: times[config])
            gain = f"{times[best] * 1e6:.1f} us, by rule {times[rule] * 1e6:.1f} us"
            log(f"{product} {block} {kind}, {tokens} tokens: {best} {gain}")
            if times[best] <= GAIN * times[rule]:
                entry = {"product": product, "blocksize": list(block), "group": group, "kind": kind, "arch": arch}
                rest = {"tokens": [first, last], "config": best._asdict(), "source": source(times[best], times[rule])}
                found.append(entry | rest)
    write(kept + found)
    return len(found)


def source(seconds: float, by_rule: float) -> str:
    """Where an entry is from."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "sparsekern"))
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"{torch.cuda.get_device_name()}, {today}, {versions}, `{COMMAND}`: {SIZE} x {SIZE} at density {DENSITY}, "
        f"{seconds * 1e6:.1f} us, by rule {by_rule * 1e6:.1f} us"
    )


def write(entries: list[dict[str, Any]]) -> None:
    """Replace the table's entries, one a line."""
    provenance = "Measured, each entry as its source says; where none fits, the rule in tuning.py chooses."
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
    body = f"[\n{lines}\n  ]" if entries else "[]"
    TABLE.write_text(f'{{\n  "provenance": {json.dumps(provenance)},\n  "entries": {body}\n}}\n', encoding="utf-8")
    tuning._table.cache_clear()
    tuning.choose_config.cache_clear()


def _asked(kernels: Any, call: candidates.Call, kind: Kind) -> tuple[Config, int]:
    """The configuration that a call gets by rule, whatever the table has now, and the group that it is for."""
    asked: list[tuple[Config, int]] = []

    def choose(*args: Any) -> Config:
        config = tuning.rule(*args)
        asked.append((config, args[5]))
        return config

    with _choosing(kernels, choose), timing.allow_tf32(kind == "tf32"):
        call()
    return asked[-1]


def _time(
    kernels: Any, config: Config, call: candidates.Call, problem: candidates.Problem, product: Product, kind: Kind,
    clock: timing.Clock, log: Callable[[str], None],
) -> float:  # fmt: skip
    """Seconds with that configuration; infinite, and logged, where it does not run, or not right."""
    with _choosing(kernels, lambda *_: config), timing.allow_tf32(kind == "tf32"):
        try:
            result = call()
        except candidates.refusals() as reason:  # too much shared memory, tiles that the compiler cannot do
            log(f"left out: {product} {config}: {reason}")
            return float("inf")
        seconds = clock(call).median
    with timing.allow_tf32(False):
        off = candidates.error(product, problem, result, candidates.OURS)
    if not off <= candidates.TOLERANCE[kind]:  # a NaN is wrong, too
        log(f"left out: {product} {config}: wrong by {off:.1e}")
        return float("inf")
    return seconds


class _choosing:
    """Within, launches ask ``choose`` for their configuration."""

    def __init__(self, kernels: Any, choose: Callable[..., Config]) -> None:
        self.kernels, self.choose, self.before = kernels, choose, kernels.choose_config

    def __enter__(self) -> None:
        self.kernels.choose_config = self.choose

    def __exit__(self, *_: object) -> None:
        self.kernels.choose_config = self.before
