"""Measures the table: every sparse figure beside dense torch's, taken in turns in the same run, and only if correct.

One group is (case, blocksize, threads, product): dense torch, all sparsities and the peers take turns in it, so that a
slow spell of the machine meets all of them. What is compared is chosen against sparsekern: dense torch is timed in both
memory layouts, eager and compiled, and the fastest is the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import BlockPattern, info
from sparsekern.timing import keep_freed_memory

from .cases import CASES, Calls, Case, Tensors, compiled_calls, dense_calls, exact, sparse_calls
from .compare import Job, Version, Way, compare, times, use_threads
from .cover import Cover, Part
from .networks import NETWORKS, Network, measure_network
from .peers import COMPILE, dense_peer, peer_calls
from .table import TOLERANCE, Results

OURS = "sparsekern"
PEERS_FROM = 0.8  # sparsity; below it most of them take many times as long as dense torch does


@dataclass(frozen=True)
class Problem:
    """One sparse layer with its products in every layout and the true results."""

    sparsity: float
    pattern: BlockPattern
    layer: nn.Module
    calls: dict[str, Calls]  # by layout
    truth: dict[str, Tensors]


@dataclass(frozen=True)
class _Dense:
    """The dense layer in every layout, and its products by layout and mode."""

    layers: dict[str, nn.Module]
    calls: dict[Way, Calls]


def measure(results: Results) -> Iterator[str]:
    """Measure all of it into ``results``; yields what comes next, once per group (:func:`count` of them)."""
    for part in results.cover.parts:
        for name in part.cases:
            yield from _measure_case(results, part, CASES[name])
    for network in networks(results.cover):
        yield from measure_network(results, network, network.threads)
    results.complete = True


def count(cover: Cover) -> int:
    """How many groups :func:`measure` goes through."""
    layers = sum(len(p.cases) * len(p.blocksizes) * len(p.threads) * len(p.products) for p in cover.parts)
    return layers + sum(len(network.threads) for network in networks(cover))


def networks(cover: Cover) -> list[Network]:
    """Those of ``cover``, with the numbers of threads that it has."""
    found = (NETWORKS[name] for name in cover.networks)
    return [replace(n, threads=tuple(t for t in n.threads if t in cover.threads)) for n in found]


def machine() -> dict[str, Any]:
    """``info.collect()``, and a line on memory. Call once before measuring: it sets what that line says."""
    malloc = "glibc told to keep freed memory" if keep_freed_memory() else "as the system sets it"
    return info.collect() | {"malloc": malloc}


def _measure_case(results: Results, part: Part, case: Case) -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)
    # Written, non-zero, different data everywhere: untouched pages and zeros are faster than real ones.
    x, grad = (torch.randn(shape, generator=generator) for shape in (case.input, case.output))
    dense = _dense(case, x, grad, part.compiled)
    for blocksize in part.blocksizes:
        problems = [make_problem(case, blocksize, s, x, grad, generator) for s in part.sparsities]
        for threads in part.threads:
            for product in part.products:
                yield f"{case.name}, {times(blocksize)}, {product}, {threads} thread(s)"
                job = Job(case.name, case.batch, product, threads)
                with use_threads(threads), torch.set_grad_enabled(product == "layer"):
                    ways = _baselines(results, job, dense)
                    versions = [_ours(results, job, case, problem) for problem in problems]
                    if part.peers and threads == 1:
                        versions += _theirs(results, job, case, problems, dense, x, grad)
                    compare(results, job, ways, versions)


def _dense(case: Case, x: Tensor, grad: Tensor, compiled: bool) -> _Dense:
    torch.compiler.reset()  # what was compiled for other cases is one more thing to check in every call
    layers: dict[str, nn.Module] = {}
    calls: dict[Way, Calls] = {}
    for layout in case.layouts:
        layer = layers[layout] = case.dense(layout)
        arguments = (case.to_layout(x, layout), case.to_layout(grad, layout))
        calls[layout, "eager"] = dense_calls(case, layer, *arguments)
        if compiled:
            calls[layout, "compiled"] = compiled_calls(layer, *arguments)
    return _Dense(layers, calls)


def _baselines(results: Results, job: Job, dense: _Dense) -> dict[Way, Callable[[], Tensors]]:
    """The dense product by all ways; the compiled ones only if they work and agree with the eager ones."""
    ways = {}
    for (layout, mode), calls in dense.calls.items():
        if job.product not in calls:
            continue
        call = calls[job.product]
        if mode == "compiled":
            eager = dense.calls[layout, "eager"][job.product]()
            try:
                error = relative_error(call(), tuple(tensor.detach() for tensor in eager))
            except RuntimeError as failure:  # no C++ compiler, for one
                results.peers[COMPILE] = f"missing: {str(failure).splitlines()[0]}"
                continue
            if error > TOLERANCE:
                results.refused.append(
                    f"{job.case}/{job.product}/{job.threads}/dense/{layout}/{mode}: error {error:.2g}"
                )
                continue
        ways[layout, mode] = call
    return ways


def make_problem(
    case: Case, blocksize: tuple[int, int], sparsity: float, x: Tensor, grad: Tensor, generator: torch.Generator
) -> Problem:
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
    return Problem(sparsity, pattern, layer, calls, exact(case, layer, x, grad))


def _ours(results: Results, job: Job, case: Case, problem: Problem) -> Version:
    calls = {layout: calls[job.product] for layout, calls in problem.calls.items()}
    return _version(results, job, case, problem, OURS, calls, problem.truth[job.product])


def _theirs(
    results: Results, job: Job, case: Case, problems: Sequence[Problem], dense: _Dense, x: Tensor, grad: Tensor
) -> list[Version]:
    versions = []
    for problem in (problem for problem in problems if problem.sparsity >= PEERS_FROM):
        truth = problem.truth[job.product]
        for peer in peer_calls(case, job.product, problem.pattern, problem.layer, x, grad, truth):
            versions.append(_version(results, job, case, problem, peer.name, peer.calls, peer.truth))
    if job.product == "forward" and problems[0].pattern.blocksize == (1, 1):
        layout = case.layouts[0]
        rival = dense_peer(case, dense.layers[layout], case.to_layout(x, layout))
        if rival is not None:
            everything = BlockPattern.from_mask(torch.ones(1, 1, dtype=torch.bool), case.matrix)
            problem = Problem(0.0, everything, dense.layers[layout], {}, {})
            versions.append(_version(results, job, case, problem, rival.name, rival.calls, rival.truth))
    return versions


def _version(
    results: Results,
    job: Job,
    case: Case,
    problem: Problem,
    name: str,
    calls: Mapping[str, Callable[[], Tensors]],
    truth: Tensors,
) -> Version:
    pattern = problem.pattern
    blocks = "dense" if pattern.blocksize == case.matrix else times(pattern.blocksize)
    ways = {}
    for layout, call in calls.items():
        error = relative_error(call(), truth)
        if error <= TOLERANCE:
            ways[layout, "eager"] = call
        else:
            key = f"{job.case}/{job.product}/{blocks}/{job.threads}/{name}/{problem.sparsity}/{layout}"
            results.refused.append(f"{key}: error {error:.2g}")
    return Version(
        name,
        blocks,
        problem.sparsity,
        pattern.density,
        1 / pattern.density,
        case.flops(pattern.nnz, job.product),
        case.traffic(pattern, job.product),
        case.traffic(pattern, "forward"),
        ways,
    )


def relative_error(got: Tensors, true: Tensors) -> float:
    """The largest error of any result relative to its largest true value; infinite if something is not finite."""
    errors = [float((g.detach().double() - t).abs().max() / t.abs().max()) for g, t in zip(got, true, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("inf")
