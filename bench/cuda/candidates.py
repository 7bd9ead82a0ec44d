"""The same products by sparsekern, by dense torch, and by what else torch has for sparse weights.

A call gives one tensor. ``exact`` says what it has to be; who has no such product is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekern import functional
from sparsekern.backend import Backend
from sparsekern.pattern import BlockPattern
from sparsekern.triton.plan import Product
from sparsekern.triton.tuning import Kind

from .cases import Case

Call = Callable[[], Tensor]
OURS, DENSE, COMPILED, BSR, SEMI = "sparsekern", "dense torch", "compiled dense torch", "torch BSR", "torch 2:4"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """A layer with normal random numbers. ``values`` are those of the pattern's blocks in ``weight``."""

    pattern: BlockPattern
    x: Tensor
    grad: Tensor
    values: Tensor
    weight: Tensor

    @classmethod
    def draw(cls, case: Case, pattern: BlockPattern, kind: Kind) -> Problem:
        device, dtype = pattern.device, DTYPES[kind]
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        values = normal(*pattern.values_shape) / case.inputs**0.5
        x, grad = normal(case.tokens, case.inputs), normal(case.tokens, case.outputs)
        return cls(pattern, x, grad, values, pattern.scatter(values))


def ours(problem: Problem, backend: Backend = "triton") -> dict[Product, Call]:
    """The public function forward, and the ops of its backward."""
    p, pattern = problem, problem.pattern
    leaf, values = p.x.detach().requires_grad_(), p.values.detach().requires_grad_()
    # The backward runs by itself: the graphs are made outside the timing, and keep what they have saved.
    of_x = functional.bsr_linear(leaf, p.values, pattern, backend=backend)
    of_values = functional.bsr_linear(p.x, values, pattern, backend=backend)

    def forward() -> Tensor:
        with torch.no_grad():
            return functional.bsr_linear(p.x, p.values, pattern, backend=backend)

    return {
        "forward": forward,
        "dgrad": lambda: torch.autograd.grad(of_x, leaf, p.grad, retain_graph=True)[0],
        "wgrad": lambda: torch.autograd.grad(of_values, values, p.grad, retain_graph=True)[0],
    }


def dense(problem: Problem) -> dict[Product, Call]:
    """By the vendor's library; wgrad is that of every weight."""
    p = problem
    return {
        "forward": lambda: F.linear(p.x, p.weight),
        "dgrad": lambda: p.grad @ p.weight,
        "wgrad": lambda: p.grad.t() @ p.x,
    }


def compiled(problem: Problem) -> dict[Product, Call]:
    """The same, by ``torch.compile`` with its search for the fastest kernel."""
    return {product: torch.compile(call, mode="max-autotune-no-cudagraphs") for product, call in dense(problem).items()}


def bsr(problem: Problem) -> dict[Product, Call]:
    """torch's own kernels for blocks, of a matrix of sparse layout: forward only."""
    matrix = problem.pattern.to_torch(problem.values)
    return {"forward": lambda: F.linear(problem.x, matrix)}


def semi_structured(problem: Problem) -> dict[Product, Call]:
    """Two of four neighbouring weights kept, another pattern than ours at density 0.5: forward only."""
    mask = torch.tensor([True, True, False, False], device=problem.weight.device).tile(problem.weight.shape[1] // 4)
    weight = torch.sparse.to_sparse_semi_structured(torch.randn_like(problem.weight) * mask)
    return {"forward": lambda: F.linear(problem.x, weight)}


def error(product: Product, problem: Problem, result: Tensor, name: str) -> float:
    """Largest error of a result against float32 without TF32, as a share of the largest number of the exact result."""
    p = problem
    x, grad, weight = p.x.float(), p.grad.float(), p.weight.float()
    if product == "forward":
        exact = x @ weight.t()
    elif product == "dgrad":
        exact = grad @ weight
    else:
        exact = grad.t() @ x
        exact = p.pattern.gather(exact) if name == OURS else exact
    if exact.numel() == 0:
        return 0.0
    return float((result.float() - exact).abs().max() / exact.abs().max())


# Of bfloat16, whose results have 8 bits; the sums before the rounding are much closer.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2, "tf32": 2e-3, "float32": 1e-5}


def refusals() -> tuple[type[Exception], ...]:
    """What torch, its compiler and Triton raise where they have no such product, or cannot compile or launch it."""
    known: tuple[type[Exception], ...] = (RuntimeError, ValueError)  # NotImplementedError is the former
    if importlib.util.find_spec("triton"):
        known += (importlib.import_module("triton.errors").TritonError,)
    return known
