"""Layers on Triton's kernels, used as users do: on emulated GPUs or (``make test-gpu``) a real one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import needs_triton  # noqa: F401 -- first: skips where there is no Triton
import pytest
import torch
from linear_cases import MACHINES, REAL, on
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import backend, ops, triton
from sparsekern.nn import SparseLayer
from sparsekern.pattern import BlockPattern

DEVICE = "cuda" if REAL else "cpu"


every_gpu = pytest.mark.parametrize("gpu", MACHINES, indirect=True)


@pytest.fixture(params=MACHINES[:1])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU; where it is emulated, its tensors are on the CPU and "auto" chooses for them as for a GPU's."""
    if not REAL:
        choose = backend.automatic
        for module in (backend, sk.cost):
            monkeypatch.setattr(module, "automatic", lambda device, *args: choose("cuda", *args))
        monkeypatch.setattr(triton, "missing", lambda: None)
    ops.triton_kernels.cache_clear()
    with on(request.param):
        yield
    ops.triton_kernels.cache_clear()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Blocks of several sizes, one that overhangs the edge, and one that no GPU kernel takes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype)
    patterns = {}
    for name, blocksize in (("0", (16, 32)), ("2", (32, 16)), ("4", (4, 4))):
        weight = model.get_submodule(name).weight
        grid = tuple(-(-n // b) for n, b in zip(weight.shape, blocksize, strict=True))
        patterns[name] = BlockPattern.from_mask(torch.rand(grid) < 0.6, blocksize, tuple(weight.shape))
    sk.sparsify_(model, patterns)
    return model


def batch(rows: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(rows, 72, generator=generator), torch.randint(8, (rows,), generator=generator)
    return x.to(DEVICE, dtype), target.to(DEVICE)


def runs(model: nn.Module) -> list[str]:
    return [layer.runs for layer in model.modules() if isinstance(layer, SparseLayer)]


def train(model: nn.Module, steps: int = 2, **autocast: Any) -> list[Tensor]:
    """Parameters after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, target = batch()
    for _ in range(steps):
        with torch.autocast(DEVICE, enabled=bool(autocast), **autocast):
            loss = nn.functional.cross_entropy(model(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def dense_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, SparseLayer):
            layer.backend = "dense"
    return twin


@every_gpu
def test_a_model_trains_after_nothing_but_a_move(gpu: None) -> None:
    model = network().to(DEVICE)
    assert runs(model) == ["triton", "triton", "dense"]
    twin = dense_twin(model)
    for a, b in zip(train(model), train(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(gpu: None, dtype: torch.dtype) -> None:
    model = network().to(DEVICE)
    twin = dense_twin(model)
    for a, b in zip(train(model, 1, dtype=dtype), train(twin, 1, dtype=dtype), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=5e-3)


# torch 2.13's own tracing instantiates autograd Functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(gpu: None) -> None:
    model = network().to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 7):
        x, target = batch(rows)
        results = []
        for call in (compiled, model):
            y = call(x)
            results.append([y, *torch.autograd.grad(nn.functional.cross_entropy(y, target), tuple(model.parameters()))])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_second_derivatives(gpu: None) -> None:
    """The penalty of a gradient, as in WGAN-GP."""
    results = []
    model = network().to(DEVICE)
    for net in (model, dense_twin(model)):
        x = batch(6)[0].requires_grad_()
        (grad,) = torch.autograd.grad(net(x).pow(2).sum(), x, create_graph=True)
        penalty = (grad.norm(dim=1) - 1).pow(2).sum()
        results.append(torch.autograd.grad(penalty, tuple(net.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_leading_dimensions_and_no_rows(gpu: None) -> None:
    layer = network().to(DEVICE)[0]
    x = batch(12)[0]
    assert torch.equal(layer(x.view(3, 4, 72)).view(12, 48), layer(x))
    assert torch.equal(layer(x[5]), layer(x[5:6])[0])
    nothing = x[:0].requires_grad_()
    y = layer(nothing)
    assert y.shape == (0, 48)
    y.sum().backward()
    assert nothing.grad.shape == (0, 72) and not layer.values.grad.any()


def test_opcheck(gpu: None) -> None:
    """What the fakes promise, of the real kernels: shapes, strides, nothing written that is an input."""
    layer = network().to(DEVICE)[0]
    plans = sk.functional.prepare_triton(layer.pattern)
    index, (outputs, inputs) = plans[:2], layer.pattern.shape
    x, values = batch(5)[0], layer.values.detach()
    grad = torch.ones(5, outputs, device=DEVICE)
    calls = {
        "bsr_linear_triton": (x, values, layer.bias.detach(), *index, plans.forward, outputs, False),
        "bsr_linear_dgrad_triton": (grad, values, *index, plans.dgrad, inputs, False),
        "bsr_linear_wgrad_triton": (grad, x, *index, plans.wgrad, layer.pattern.blocksize, True, False),
    }
    for name, args in calls.items():
        op = getattr(torch.ops.sparsekern, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
