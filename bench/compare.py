"""One group of the table: dense torch and everything that rivals it, taken in turns, become rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sparsekern.timing import Timing, interleaved, speedup, switches

from .table import Results, Row

Way = tuple[str, str]  # memory layout, mode (eager, compiled)
Ways = Mapping[Way, Callable[[], object]]


@dataclass(frozen=True)
class Version:
    """What gets a row: one implementation of one sparse layer or network, by all ways that gave the right result."""

    implementation: str
    blocksize: str
    sparsity: float
    density: float
    ideal: float
    flops: float
    traffic: float | None  # bytes, where they are known
    working_set: float | None  # bytes
    ways: Ways


@dataclass(frozen=True)
class Job:
    """What all candidates of a group compute."""

    case: str
    batch: int
    product: str
    threads: int


def compare(results: Results, job: Job, dense: Ways, versions: Sequence[Version]) -> None:
    """Time all of them in turns and add a row for each version, its fastest way against dense torch's fastest."""
    candidates: dict[tuple[str, ...], Callable[[], object]] = {("dense", *way): call for way, call in dense.items()}
    for i, version in enumerate(versions):
        candidates |= {(str(i), *way): call for way, call in version.ways.items()}
    cover = results.cover
    start, before = time.perf_counter(), switches()
    timings = _timed(candidates, cover.rounds, cover.limit_seconds)
    per_second = (switches() - before) / (time.perf_counter() - start)
    baseline = _fastest(timings, "dense")
    slow = timings["dense", *baseline]
    for i, version in enumerate(versions):
        if not version.ways:
            continue
        way = _fastest(timings, str(i))
        fast = timings[str(i), *way]
        gflops = version.flops / fast.median / 1e9
        gb_s = None if version.traffic is None else version.traffic / fast.median / 1e9
        ceilings = results.ceilings
        row = Row(
            case=job.case,
            batch=job.batch,
            product=job.product,
            implementation=version.implementation,
            blocksize=version.blocksize,
            sparsity=version.sparsity,
            density=version.density,
            threads=job.threads,
            layout=way[0],
            mode=way[1],
            dense_layout=baseline[0],
            dense_mode=baseline[1],
            **_named("dense_us", slow.quantiles(), 1e6),
            **_named("sparse_us", fast.quantiles(), 1e6),
            **_named("speedup", speedup(slow, fast), 1),
            ideal=version.ideal,
            gflops=gflops,
            gb_s=gb_s,
            peak_percent=ceilings.peak_percent(gflops, job.threads),
            bandwidth_percent=ceilings.bandwidth_percent(gb_s, version.working_set, job.threads),
            rounds=len(fast.samples),
            switches_per_second=per_second,
        )
        results.rows.append(row)


@contextmanager
def use_threads(n: int) -> Iterator[None]:
    """Let torch use ``n`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def times(pair: Sequence[int]) -> str:
    return "x".join(map(str, pair))


def _timed(
    candidates: Mapping[tuple[str, ...], Callable[[], object]], rounds: int, limit_seconds: float
) -> dict[tuple[str, ...], Timing]:
    named = {"/".join(key): call for key, call in candidates.items()}
    timings = interleaved(named, rounds=rounds, limit_seconds=limit_seconds)
    return {key: timings["/".join(key)] for key in candidates}


def _fastest(timings: Mapping[tuple[str, ...], Timing], name: str) -> Way:
    """Layout and mode of the fastest way of that name."""
    _, layout, mode = min((key for key in timings if key[0] == name), key=lambda key: timings[key].median)
    return layout, mode


def _named(prefix: str, quantiles: Mapping[str, float], scale: float) -> dict[str, Any]:
    return {f"{prefix}_{name}": value * scale for name, value in quantiles.items()}
