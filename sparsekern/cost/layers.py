"""From a layer to its :class:`Work`, from a model to the calls of its layers, and to calls that can be timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..eligible import call_with_example, convertible, evaluating
from ..functional import Backend
from ..nn import SparseConv2d, SparseLayer, SparseLinear
from ..pattern import BlockPattern
from ..weights import weight_matrix
from .model import PRODUCTS, Work
from .timer import Call


class LayerCall(NamedTuple):
    """One call of a layer in a training step: what it does, the products it takes, and the shape of its input.

    A layer whose input needs no gradient, such as the first, takes no dgrad.
    """

    work: Work
    products: tuple[str, ...]
    input: tuple[int, ...]


def unmodelled(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Why the cost model cannot predict a layer, or None."""
    weight = layer.weight
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "it has groups, which the cost model does not know"
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"it is {weight.dtype} on {weight.device}; the cost model knows float32 on the CPU"
    return None


def work_of(layer: nn.Linear | nn.Conv2d, input: Sequence[int], output: Sequence[int]) -> Work:
    """What ``layer``, without groups, does to an input of that shape."""
    if isinstance(layer, nn.Linear):
        return Work.linear(layer.out_features, layer.in_features, math.prod(input[:-1]))
    kernel, images = (layer.kernel_size[0], layer.kernel_size[1]), math.prod(input[:-3])
    in_size, out_size = (input[-2], input[-1]), (output[-2], output[-1])
    strided = max(layer.stride) > 1
    return Work.conv2d(layer.out_channels, layer.in_channels, kernel, images, in_size, out_size, strided)


def sparse_layer(
    dense: nn.Linear | nn.Conv2d,
    blocksize: tuple[int, int],
    density: float,
    generator: torch.Generator,
    backend: Backend = "cpu",
) -> SparseLinear | SparseConv2d:
    """A copy of ``dense`` with random blocks, at least one, kept."""
    rows, columns = weight_matrix(dense.weight).shape
    grid = -(-rows // blocksize[0]), -(-columns // blocksize[1])
    kept = max(1, round(density * grid[0] * grid[1]))
    scores = torch.rand(grid, generator=generator)
    pattern = BlockPattern.from_scores(scores, kept, blocksize, (rows, columns))
    if isinstance(dense, nn.Linear):
        return SparseLinear.from_dense(dense, pattern, backend=backend)
    return SparseConv2d.from_dense(dense, pattern, backend=backend)


def timed_calls(layer: nn.Linear | nn.Conv2d | SparseLayer, x: Tensor) -> dict[tuple[str, ...], Call]:
    """What a layer is called for, by the products that it takes: forward alone, and with one or both of the backward.

    Gradients come by autograd, from a gradient of the output that is no constant; results are dropped.
    """
    leaf, parameters = x.detach().requires_grad_(), tuple(layer.parameters())
    frozen = copy.deepcopy(layer).requires_grad_(False)
    with torch.no_grad():
        grad = torch.randn_like(layer(x))

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    forward_, dgrad, wgrad = PRODUCTS
    return {
        (forward_,): forward,
        (forward_, dgrad): lambda: torch.autograd.grad(frozen(leaf), leaf, grad),
        (forward_, wgrad): lambda: torch.autograd.grad(layer(x), parameters, grad),
        PRODUCTS: lambda: torch.autograd.grad(layer(leaf), (leaf, *parameters), grad),
    }


def recorded_calls(model: nn.Module, example: Any) -> dict[nn.Module, list[LayerCall]]:
    """The calls of each layer that can be sparse while the model runs on the example, in evaluation mode."""
    calls: dict[nn.Module, list[LayerCall]] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        (x,) = inputs
        products = ("forward", *["dgrad"] * x.requires_grad, *["wgrad"] * layer.weight.requires_grad)
        if x.numel():
            call = LayerCall(work_of(layer, x.shape, output.shape), products, tuple(x.shape))
            calls.setdefault(layer, []).append(call)

    handles = [layer.register_forward_hook(record) for layer in convertible(model)[0].values()]
    try:
        with evaluating(model), torch.enable_grad():
            call_with_example(model, *(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    return calls
