"""What is timed: named real layers (:data:`CASES`), and each product of a layer in dense torch and in sparsekern.

A product is a callable without arguments that returns its results as a tuple, which the correctness gate compares::

    forward   (y,)                             y = x Wᵀ + b, or the convolution
    dgrad     (gradient of x,)
    wgrad     (gradient of W,)                 at stored blocks only where W is sparse
    layer     (y, and all three gradients)     through the module and autograd, as a training step does
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern import BlockPattern, SparseConv2d, SparseLinear, functional
from sparsekern.weights import weight_from_matrix, weight_matrix

PRODUCTS = ("forward", "dgrad", "wgrad", "layer")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

Tensors = tuple[Tensor, ...]
Calls = dict[str, Callable[[], Tensors]]  # by product


@dataclass(frozen=True)
class Case:
    """One layer and the batch it sees: weight [out, in] and input [n, in], or [c_out, c_in, k, k] and [n, c_in, h, w].

    Convolutions have stride 1.
    """

    name: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    padding: int = 0

    @property
    def is_conv(self) -> bool:
        return len(self.weight) == 4

    @property
    def layouts(self) -> tuple[str, ...]:
        """How activations may lie in memory."""
        return tuple(FORMATS) if self.is_conv else ("row-major",)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the weight as a matrix."""
        return self.weight[0], math.prod(self.weight[1:])

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of a convolution's kernel."""
        return self.weight[2], self.weight[3]

    @property
    def output(self) -> tuple[int, ...]:
        if not self.is_conv:
            return self.input[0], self.weight[0]
        height, width = (n + 2 * self.padding - k + 1 for n, k in zip(self.input[2:], self.kernel, strict=True))
        return self.input[0], self.weight[0], height, width

    def flops(self, weights: int) -> int:
        """Of one product with that many weights: two per weight and output position, padding counted in."""
        return 2 * weights * math.prod(self.output) // self.weight[0]

    def dense(self, layout: str) -> nn.Linear | nn.Conv2d:
        """The layer with torch's own initial weights, which lie as the activations do."""
        if not self.is_conv:
            return nn.Linear(self.weight[1], self.weight[0])
        conv = nn.Conv2d(self.weight[1], self.weight[0], self.kernel, padding=self.padding)
        return nn.utils.convert_conv2d_weight_memory_format(conv, FORMATS[layout])

    def to_layout(self, tensor: Tensor, layout: str) -> Tensor:
        return tensor.contiguous(memory_format=FORMATS[layout]) if self.is_conv else tensor.contiguous()

    def sparse(self, pattern: BlockPattern) -> SparseLinear | SparseConv2d:
        """The layer with random values in the blocks of ``pattern``."""
        if not self.is_conv:
            return SparseLinear(self.weight[1], self.weight[0], pattern=pattern)
        return SparseConv2d(self.weight[1], self.weight[0], self.kernel, padding=self.padding, pattern=pattern)


CASES = {
    case.name: case
    for case in (
        Case("lenet-300-100-fc1", (300, 784), (100, 784)),
        Case("lenet-300-100-fc2", (100, 300), (100, 300)),
        Case("linear-256x1024x1024", (1024, 1024), (256, 1024)),
        Case("transformer-mlp-up", (3072, 768), (256, 768)),
        Case("lenet-5-conv2", (50, 20, 5, 5), (100, 20, 12, 12)),
        Case("conv3x3-64@32", (64, 64, 3, 3), (32, 64, 32, 32), padding=1),
        Case("conv3x3-128@16", (128, 128, 3, 3), (32, 128, 16, 16), padding=1),
        Case("conv3x3-256@8", (256, 256, 3, 3), (32, 256, 8, 8), padding=1),
        Case("conv1x1-256-1024@14", (1024, 256, 1, 1), (1, 256, 14, 14)),
    )
}


def dense_calls(case: Case, layer: nn.Module, x: Tensor, grad: Tensor) -> Calls:
    """The products of ``layer``, the ``nn.Linear`` or ``nn.Conv2d`` of ``case``, by torch's own functions."""
    weight, bias = (parameter.detach() for parameter in layer.parameters())
    if not case.is_conv:
        return {
            "forward": lambda: (F.linear(x, weight, bias),),
            "dgrad": lambda: (grad @ weight,),
            "wgrad": lambda: (grad.t() @ x,),
            "layer": _step(layer, x, grad),
        }
    padding = [case.padding, case.padding]

    def backward(mask: list[bool]) -> Tensors:
        result: Tensors = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, mask
        )
        return result

    return {
        "forward": lambda: (F.conv2d(x, weight, bias, padding=padding),),
        "dgrad": lambda: backward([True, False, False])[:1],
        "wgrad": lambda: backward([False, True, False])[1:2],
        "layer": _step(layer, x, grad),
    }


def sparse_calls(case: Case, layer: SparseLinear | SparseConv2d, x: Tensor, grad: Tensor) -> Calls:
    """The same products of the sparse ``layer``: the public functions forward, the ops backward."""
    ops, pattern = torch.ops.sparsekern, layer.pattern
    values, bias = (parameter.detach() for parameter in layer.parameters())
    if not case.is_conv:
        crow, col, _, dgrad, wgrad = functional.prepare(pattern)
        return {
            "forward": lambda: (functional.bsr_linear(x, values, pattern, bias),),
            "dgrad": lambda: (ops.bsr_linear_dgrad(grad, values, crow, col, dgrad, pattern.shape[1]),),
            "wgrad": lambda: ops.bsr_linear_wgrad(grad, x, crow, col, wgrad, pattern.blocksize, False)[:1],
            "layer": _step(layer, x, grad),
        }
    kernel, padding = case.kernel, (case.padding, case.padding)
    crow, col, _, dgrad, wgrad = functional.prepare(pattern, (*kernel, 1))
    conv = (kernel, (1, 1), padding, (1, 1), 1)
    size, last = (x.shape[1], x.shape[2:]), x.is_contiguous(memory_format=torch.channels_last)
    return {
        "forward": lambda: (functional.bsr_conv2d(x, values, pattern, bias, padding=padding, kernel_size=kernel),),
        "dgrad": lambda: (ops.bsr_conv2d_dgrad(grad, values, crow, col, dgrad, *size, *conv, last),),
        "wgrad": lambda: ops.bsr_conv2d_wgrad(grad, x, crow, col, wgrad, pattern.blocksize, *conv, False)[:1],
        "layer": _step(layer, x, grad),
    }


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensors]:
    leaf, parameters = x.detach().requires_grad_(), tuple(layer.parameters())

    def step() -> Tensors:
        y = layer(leaf)
        return (y, *torch.autograd.grad(y, (leaf, *parameters), grad))

    return step


def exact(case: Case, layer: SparseLinear | SparseConv2d, x: Tensor, grad: Tensor) -> dict[str, Tensors]:
    """What :func:`sparse_calls` must return, by dense torch in float64."""
    dense, pattern = case.dense(case.layouts[0]).double(), layer.pattern
    values, bias = (parameter.detach().double() for parameter in layer.parameters())
    matrix = pattern.scatter(values)
    dense.load_state_dict({"weight": weight_from_matrix(matrix, case.weight), "bias": bias})
    y, grad_x, grad_weight, grad_bias = _step(dense, x.double(), grad.double())()
    grad_values = pattern.gather(weight_matrix(grad_weight))
    return {
        "forward": (y,),
        "dgrad": (grad_x,),
        "wgrad": (grad_values,),
        "layer": (y.detach(), grad_x, grad_values, grad_bias),
    }
