"""Measures the table: every sparse figure beside dense torch's, taken in turns in the same run, and only if correct.

One group is (case, blocksize, threads, product): dense torch, all sparsities and the peers take turns in it, so that a
slow spell of the machine meets all of them. What is compared is chosen against sparsekern: dense convolutions are timed
in both memory layouts and the faster one is the baseline.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import resource
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import BlockPattern, info
from sparsekern.timing import Timing, interleaved, speedup

from .cases import PRODUCTS, Calls, Case, Tensors, dense_calls, exact, sparse_calls
from .table import TOLERANCE, Results, Row

OURS, TORCH, SCIPY = "sparsekern", "torch CSR", "scipy CSR"


@dataclass(frozen=True)
class _Problem:
    """One sparse layer with its products in every layout, the true results, and its rivals by product."""

    sparsity: float
    pattern: BlockPattern
    calls: dict[str, Calls]  # by layout
    truth: dict[str, Tensors]
    peers: dict[str, Callable[[], Tensors]]  # the forward product alone


def measure(results: Results) -> Iterator[str]:
    """Measure all of it into ``results``; yields what comes next, once per group (:func:`count` of them)."""
    for case in results.cases:
        generator = torch.Generator().manual_seed(0)
        # Written, non-zero, different data everywhere: untouched pages and zeros are faster than real ones.
        x, grad = (torch.randn(shape, generator=generator) for shape in (case.input, case.output))
        dense = {
            layout: dense_calls(case, case.dense(layout), case.to_layout(x, layout), case.to_layout(grad, layout))
            for layout in case.layouts
        }
        for blocksize in results.settings.blocksizes:
            problems = [_problem(case, blocksize, s, x, grad, generator) for s in results.settings.sparsities]
            for threads in results.settings.threads:
                for product in PRODUCTS:
                    yield f"{case.name}, {blocksize[0]}x{blocksize[1]}, {product}, {threads} thread(s)"
                    _group(results, case, product, threads, dense, problems)
    results.complete = True


def count(results: Results) -> int:
    """How many groups :func:`measure` goes through."""
    settings = results.settings
    return len(results.cases) * len(settings.blocksizes) * len(settings.threads) * len(PRODUCTS)


def machine() -> dict[str, Any]:
    """``info.collect()``, and a line on memory. Call once before measuring: it sets what that line says.

    Large results are given back to the system and fetched again, page by page, on each call if the C library is left
    alone. This costs dense and sparse alike, varies, and hides the ratio; long-running programs reuse such memory.
    """
    malloc = "as the system sets it"
    if platform.libc_ver()[0] == "glibc":
        c = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h.
        if all(c.mallopt(option, size) for option, size in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 28))):
            malloc = "glibc told to keep freed memory"
    return info.collect() | {"malloc": malloc}


def _problem(
    case: Case, blocksize: tuple[int, int], sparsity: float, x: Tensor, grad: Tensor, generator: torch.Generator
) -> _Problem:
    grid = [-(-size // block) for size, block in zip(case.matrix, blocksize, strict=True)]
    blocks = grid[0] * grid[1]
    mask = torch.zeros(blocks, dtype=torch.bool)
    mask[torch.randperm(blocks, generator=generator)[: max(1, round((1 - sparsity) * blocks))]] = True
    pattern = BlockPattern.from_mask(mask.view(grid), blocksize, case.matrix)
    layer = case.sparse(pattern)
    calls = {
        layout: sparse_calls(case, layer, case.to_layout(x, layout), case.to_layout(grad, layout))
        for layout in case.layouts
    }
    rivals = not case.is_conv and blocksize == (1, 1)
    peers = _peers(pattern, layer, x) if rivals else {}
    return _Problem(sparsity, pattern, calls, exact(case, layer, x, grad), peers)


def _peers(pattern: BlockPattern, layer: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensors]]:
    """The forward product of a linear layer by other libraries, for blocks (1, 1)."""
    values, bias = (parameter.detach() for parameter in layer.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        weight = torch.sparse_csr_tensor(
            pattern.crow_indices, pattern.col_indices, values.flatten(), pattern.shape, check_invariants=True
        )
    peers: dict[str, Callable[[], Tensors]] = {TORCH: lambda: ((weight @ x.t()).t() + bias,)}
    if importlib.util.find_spec("scipy"):
        matrix, column, wide = pattern.to_scipy(values).tocsr(), bias.numpy()[:, None], x.numpy().T
        peers[SCIPY] = lambda: (torch.from_numpy((matrix @ wide + column).T),)
    return peers


def _group(
    results: Results, case: Case, product: str, threads: int, dense: dict[str, Calls], problems: Sequence[_Problem]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.set_grad_enabled(product == "layer"):
            _compare(results, case, product, threads, dense, problems)
    finally:
        torch.set_num_threads(before)


def _compare(
    results: Results, case: Case, product: str, threads: int, dense: dict[str, Calls], problems: Sequence[_Problem]
) -> None:
    candidates: dict[str, Callable[[], object]] = {f"dense/{name}": calls[product] for name, calls in dense.items()}
    versions: list[tuple[_Problem, str, list[str]]] = []  # problem, implementation, its layouts that are correct
    for problem in problems:
        calls = {OURS: {layout: calls[product] for layout, calls in problem.calls.items()}}
        if product == "forward":
            calls |= {peer: {"row-major": call} for peer, call in problem.peers.items()}
        for name, by_layout in calls.items():
            if name == SCIPY and threads > 1:
                continue  # it has one thread only
            good = []
            for layout, call in by_layout.items():
                error = _error(call(), problem.truth[product])
                key = f"{name}/{problem.sparsity}/{layout}"
                if error <= TOLERANCE:
                    good.append(layout)
                    candidates[key] = call
                else:
                    blocks = _times(problem.pattern.blocksize)
                    results.refused.append(f"{case.name}/{product}/{blocks}/{threads}/{key}: error {error:.2g}")
            if good:
                versions.append((problem, name, good))
    settings = results.settings
    start, before = time.perf_counter(), _switches()
    timings = interleaved(candidates, rounds=settings.rounds, limit_seconds=settings.limit_seconds)
    switches = (_switches() - before) / (time.perf_counter() - start)
    baseline = _fastest(timings, "dense", case.layouts)
    for problem, name, layouts in versions:
        prefix = f"{name}/{problem.sparsity}"
        layout = _fastest(timings, prefix, layouts)
        slow, fast = timings[f"dense/{baseline}"], timings[f"{prefix}/{layout}"]
        flops = case.flops(problem.pattern.nnz) * (3 if product == "layer" else 1)
        density = problem.pattern.density
        row = Row(
            case=case.name,
            product=product,
            implementation=name,
            blocksize=_times(problem.pattern.blocksize),
            sparsity=problem.sparsity,
            density=density,
            threads=threads,
            layout=layout,
            dense_layout=baseline,
            **_named("dense_us", slow.quantiles(), 1e6),
            **_named("sparse_us", fast.quantiles(), 1e6),
            **_named("speedup", speedup(slow, fast), 1),
            ideal=1 / density,
            gflops=flops / fast.median / 1e9,
            rounds=len(fast.samples),
            switches_per_second=switches,
        )
        results.rows.append(row)


def _switches() -> int:
    """How often the system has taken the processor from this process for another one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _error(got: Tensors, true: Tensors) -> float:
    """The largest error of any result relative to its largest true value; infinite if something is not finite."""
    errors = [float((g.detach().double() - t).abs().max() / t.abs().max()) for g, t in zip(got, true, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("inf")


def _fastest(timings: Mapping[str, Timing], prefix: str, layouts: Iterable[str]) -> str:
    return min(layouts, key=lambda layout: timings[f"{prefix}/{layout}"].median)


def _named(prefix: str, quantiles: Mapping[str, float], scale: float) -> dict[str, Any]:
    return {f"{prefix}_{name}": value * scale for name, value in quantiles.items()}


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"
