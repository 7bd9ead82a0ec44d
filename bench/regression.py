"""Timings to compare with earlier ones of the same machine: ``make bench-regression`` (pytest-benchmark).

Each row is one product of one layer, after the correctness gate of the table. Dense torch is a row beside it, which
tells a slower kernel from a slower machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .cases import CASES, dense_calls
from .compare import times, use_threads
from .cover import BOTH
from .run import make_problem, relative_error
from .table import TOLERANCE

LAYERS = ("lenet-300-100-fc1", "linear-256x1024x1024", "conv3x3-128@16", "conv3x3-256@14", "conv1x1-256-1024@14")
BLOCKSIZES = (1, 1), (4, 1), (8, 8)
SPARSITY = 0.9


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with use_threads(1):
        yield


@pytest.mark.parametrize("product", BOTH)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("blocksize", (None, *BLOCKSIZES), ids=lambda pair: times(pair) if pair else "dense")
def test_product(benchmark: Any, name: str, blocksize: tuple[int, int] | None, product: str) -> None:
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for shape in (case.input, case.output))
    layout = case.layouts[-1]
    inputs = (case.to_layout(x, layout), case.to_layout(grad, layout))
    benchmark.group = f"{name}, {product}"
    if blocksize is None:
        call = dense_calls(case, case.dense(layout), *inputs)[product]
    else:
        problem = make_problem(case, blocksize, SPARSITY, x, grad, generator)
        call = problem.calls[layout][product]
        assert relative_error(call(), problem.truth[product]) <= TOLERANCE
    with torch.set_grad_enabled(product == "layer"):
        benchmark(call)
