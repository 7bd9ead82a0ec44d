"""Cases of the linear products for the Triton kernels, how to run one on a machine, and what has to come out.

A machine is an emulated GPU, or the real one if SPARSEKERN_TEST_DEVICE is cuda (``make test-gpu``).
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import draw, lay_out, make_pattern
from torch import Tensor
from triton_driver import emulated, missing

from sparsekern.pattern import BlockPattern
from sparsekern.triton import linear
from sparsekern.triton.plan import TILE, Product, make_plan
from sparsekern.triton.tuning import Kind

REAL = os.environ.get("SPARSEKERN_TEST_DEVICE") == "cuda"
if not REAL and (reason := missing()):
    pytest.skip(reason, allow_module_level=True)
MACHINES = ("cuda",) if REAL else (80, 90)
PRODUCTS: tuple[Product, ...] = ("forward", "dgrad", "wgrad")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One product. ``group``: block rows in a tile or blocks in a strip; None: what the plan chooses, 0: the most."""

    product: Product
    epilogue: str = "bias"  # of forward; wgrad: "none" is without the bias' gradient
    blocksize: tuple[int, int] = (32, 32)
    shape: tuple[int, int] = (128, 192)  # (outputs, inputs)
    density: str = "third"
    tokens: int = 64
    kind: Kind = "float16"
    layout: str = "contiguous"
    group: int | None = None
    integers: bool = True
    seed: int = 0

    def __str__(self) -> str:
        size = f"{self.tokens}x{self.shape[1]}->{self.shape[0]}"
        block = f"{self.blocksize[0]}x{self.blocksize[1]}"
        data = "integers" if self.integers else "normal"
        group = "" if self.group is None else f"-group{self.group}"
        return f"{self.product}-{block}-{size}-{self.density}-{self.kind}-{self.layout}-{self.epilogue}{group}-{data}"


@dataclass(frozen=True)
class Problem:
    case: Case
    pattern: BlockPattern
    x: Tensor
    values: Tensor  # NaN where they overhang the edge
    bias: Tensor | None
    grad: Tensor
    residual: Tensor | None
    plan: Tensor


def make_problem(case: Case, pattern: BlockPattern | None = None) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    device, dtype = ("cuda" if REAL else "cpu"), DTYPES[case.kind]
    if pattern is None:
        pattern = make_pattern(case.shape, case.blocksize, case.density, generator)
    pattern = pattern.to(device)
    outputs, inputs = pattern.shape

    def tensor(*shape: int, layout: str = "contiguous") -> Tensor:
        return lay_out(draw(shape, generator, dtype, case.integers).to(device), layout)

    values = tensor(*pattern.values_shape)
    values[~pattern.edge_mask()] = torch.nan
    group = case.group
    if group == 0:
        group = TILE // case.blocksize[0 if case.product == "forward" else 1]
    return Problem(
        case,
        pattern,
        tensor(case.tokens, inputs, layout=case.layout),
        lay_out(values, "sliced" if case.layout == "sliced" else "contiguous"),
        None if case.epilogue == "none" else tensor(outputs),
        tensor(case.tokens, outputs, layout=case.layout),
        tensor(case.tokens, outputs, layout=case.layout) if case.epilogue in ("residual", "all") else None,
        make_plan(pattern, case.product, group=group),
    )


def run(problem: Problem) -> tuple[Tensor, ...]:
    case, pattern = problem.case, problem.pattern
    index = pattern.crow_indices, pattern.col_indices, problem.plan
    tf32, (outputs, inputs) = case.kind == "tf32", pattern.shape
    if case.product == "dgrad":
        return (linear.linear_dgrad(problem.grad, problem.values, *index, inputs, tf32),)
    if case.product == "wgrad":
        return linear.linear_wgrad(problem.grad, problem.x, *index, pattern.blocksize, case.epilogue != "none", tf32)
    return (
        linear.linear(
            problem.x, problem.values, problem.bias, *index, outputs, tf32,
            activation=activation(case), residual=problem.residual,
        ),
    )  # fmt: skip


def activation(case: Case) -> str:
    return {"relu": "relu", "gelu": "gelu", "all": "relu"}.get(case.epilogue, "none")


def expected(problem: Problem, magnitude: bool = False) -> tuple[Tensor, ...]:
    """The results in float64; with ``magnitude``, of absolute values: what errors are relative to."""
    case, pattern = problem.case, problem.pattern
    parts = (problem.x, problem.grad, problem.bias, problem.residual)
    x, grad, bias, residual = (None if part is None else part.double() for part in parts)
    weight = pattern.scatter(problem.values.double())
    assert x is not None and grad is not None
    if magnitude:
        x, grad, weight = x.abs(), grad.abs(), weight.abs()
    if case.product == "dgrad":
        return (grad @ weight,)
    if case.product == "wgrad":
        return pattern.gather(grad.T @ x), grad.sum(0) if case.epilogue != "none" else grad.new_empty(0)
    y = x @ weight.T
    for part in (bias, residual):
        if part is not None:
            y = y + (part.abs() if magnitude else part)
    if magnitude or activation(case) == "none":
        return (y,)
    return (torch.relu(y) if activation(case) == "relu" else torch.nn.functional.gelu(y),)


def check(problem: Problem, results: tuple[Tensor, ...]) -> None:
    """Small integers are exact in every type and order of summation; for other data, bounds of the rounding errors."""
    case, dtype = problem.case, DTYPES[problem.case.kind]
    for got, want, scale in zip(results, expected(problem), expected(problem, magnitude=True), strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        if case.integers and activation(case) != "gelu":
            differ = ~torch.isclose(got, want.to(dtype), rtol=0, atol=0, equal_nan=True)
            assert not differ.any(), f"{differ.sum()} of {want.numel()} differ"
        else:
            # TF32 keeps 10 bits of each factor; sums are rounded as fp32, results as their type.
            tolerance = (2**-9 if case.kind == "tf32" else 2**-20) * scale + torch.finfo(dtype).eps * want.abs()
            error = (got.double() - want).abs()
            assert bool((error <= tolerance).all()), f"{(error / tolerance).max()} times the tolerance"


def on(machine: int | str) -> AbstractContextManager[Any]:
    """Inside, launches run on that machine; of an emulated one, the result lists them with their counters."""
    if machine == "cuda":
        return contextlib.nullcontext(SimpleNamespace(launches=[]))
    return emulated(machine)
