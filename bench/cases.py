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

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

Tensors = tuple[Tensor, ...]
Calls = dict[str, Callable[[], Tensors]]  # by product


@dataclass(frozen=True)
class Case:
    """One layer and the batch it sees: weight [out, in] and input [n, in], or [c_out, c_in / groups, k, k] and
    [n, c_in, h, w]."""

    name: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    padding: int = 0
    stride: int = 1
    groups: int = 1

    @property
    def is_conv(self) -> bool:
        return len(self.weight) == 4

    @property
    def layouts(self) -> tuple[str, ...]:
        """How activations may lie in memory."""
        return tuple(FORMATS) if self.is_conv else ("row-major",)

    @property
    def batch(self) -> int:
        """Samples; for transformers, tokens."""
        return self.input[0]

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
        height, width = (
            (n + 2 * self.padding - k) // self.stride + 1 for n, k in zip(self.input[2:], self.kernel, strict=True)
        )
        return self.input[0], self.weight[0], height, width

    def flops(self, weights: int, product: str) -> int:
        """Of a product with that many weights: two per weight and output position, padding counted in."""
        return 2 * weights * math.prod(self.output) // self.weight[0] * (3 if product == "layer" else 1)

    def traffic(self, pattern: BlockPattern, product: str) -> int:
        """Bytes that a product must move at least: what it reads and writes, once each, float32 and int32 indices."""
        values = math.prod(pattern.values_shape)
        indices = pattern.nnz_blocks + pattern.grid[0] + 1
        once = 4 * (math.prod(self.input) + math.prod(self.output) + values + indices)
        return once * (3 if product == "layer" else 1)

    def dense(self, layout: str) -> nn.Linear | nn.Conv2d:
        """The layer with torch's own initial weights, which lie as the activations do."""
        if not self.is_conv:
            return nn.Linear(self.weight[1], self.weight[0])
        conv = nn.Conv2d(self.input[1], self.weight[0], self.kernel, self.stride, self.padding, groups=self.groups)
        return nn.utils.convert_conv2d_weight_memory_format(conv, FORMATS[layout])

    def to_layout(self, tensor: Tensor, layout: str) -> Tensor:
        return tensor.contiguous(memory_format=FORMATS[layout]) if self.is_conv else tensor.contiguous()

    def sparse(self, pattern: BlockPattern) -> SparseLinear | SparseConv2d:
        """The layer with random values in the blocks of ``pattern``."""
        if not self.is_conv:
            return SparseLinear(self.weight[1], self.weight[0], pattern=pattern, backend="cpu")
        return SparseConv2d(
            self.input[1],
            self.weight[0],
            self.kernel,
            self.stride,
            self.padding,
            groups=self.groups,
            pattern=pattern,
            backend="cpu",
        )


CASES = {
    case.name: case
    for case in (
        # LeNets, 28x28
        Case("lenet-300-100-fc1", (300, 784), (100, 784)),
        Case("lenet-300-100-fc2", (100, 300), (100, 300)),
        Case("lenet-5-conv2", (50, 20, 5, 5), (100, 20, 12, 12)),
        Case("lenet-5-fc1", (500, 800), (100, 800)),
        # linear layers: batch x inputs x outputs
        Case("linear-1x1024x1024", (1024, 1024), (1, 1024)),
        Case("linear-32x1024x1024", (1024, 1024), (32, 1024)),
        Case("linear-256x1024x1024", (1024, 1024), (256, 1024)),
        Case("linear-1024x4096x4096", (4096, 4096), (1024, 4096)),
        # transformers of width 768; ViT-B has 197 tokens an image
        Case("transformer-mlp-up", (3072, 768), (256, 768)),
        Case("transformer-mlp-down", (768, 3072), (256, 3072)),
        Case("vit-b-qkv", (2304, 768), (197, 768)),
        Case("vit-b-mlp-up", (3072, 768), (197, 768)),
        Case("vit-b-mlp-up-batch32", (3072, 768), (32 * 197, 768)),
        # VGG-D on 32x32 (channels@pixels), batch 32
        Case("conv3x3-64@32", (64, 64, 3, 3), (32, 64, 32, 32), padding=1),
        Case("conv3x3-128@16", (128, 128, 3, 3), (32, 128, 16, 16), padding=1),
        Case("conv3x3-128@16-batch1", (128, 128, 3, 3), (1, 128, 16, 16), padding=1),
        Case("conv3x3-128@16-batch256", (128, 128, 3, 3), (256, 128, 16, 16), padding=1),
        Case("conv3x3-256@8", (256, 256, 3, 3), (32, 256, 8, 8), padding=1),
        Case("conv3x3-512@4", (512, 512, 3, 3), (32, 512, 4, 4), padding=1),
        # WRN-22-8 on 32x32, batch 32
        Case("wrn-22-8-128@32", (128, 128, 3, 3), (32, 128, 32, 32), padding=1),
        Case("wrn-22-8-256@16", (256, 256, 3, 3), (32, 256, 16, 16), padding=1),
        Case("wrn-22-8-512@8", (512, 512, 3, 3), (32, 512, 8, 8), padding=1),
        # ResNet-50 on 224x224, batch 1
        Case("resnet-50-stem7x7s2", (64, 3, 7, 7), (1, 3, 224, 224), padding=3, stride=2),
        Case("conv3x3s2-128@56", (128, 128, 3, 3), (1, 128, 56, 56), padding=1, stride=2),
        Case("conv1x1s2-256-512@56", (512, 256, 1, 1), (1, 256, 56, 56), stride=2),
        Case("conv3x3-256@14", (256, 256, 3, 3), (1, 256, 14, 14), padding=1),
        Case("conv1x1-256-1024@14", (1024, 256, 1, 1), (1, 256, 14, 14)),
        # grouped as in ResNeXt-50, depthwise as in MobileNets
        Case("conv3x3g32-128@28", (128, 4, 3, 3), (1, 128, 28, 28), padding=1, groups=32),
        Case("depthwise3x3-256@14", (256, 1, 3, 3), (32, 256, 14, 14), padding=1, groups=256),
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
            "layer": step(layer, layer, x, grad),
        }
    stride, padding, groups = [case.stride] * 2, [case.padding] * 2, case.groups

    def backward(mask: list[bool]) -> Tensors:
        result: Tensors = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], groups, mask
        )
        return result

    return {
        "forward": lambda: (F.conv2d(x, weight, bias, stride, padding, groups=groups),),
        "dgrad": lambda: backward([True, False, False])[:1],
        "wgrad": lambda: backward([False, True, False])[1:2],
        "layer": step(layer, layer, x, grad),
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
            "layer": step(layer, layer, x, grad),
        }
    kernel, groups = case.kernel, case.groups
    crow, col, _, dgrad, wgrad = functional.prepare(pattern, (*kernel, groups))
    geometry = ((case.stride, case.stride), (case.padding, case.padding), (1, 1), groups)
    conv = (kernel, *geometry)
    size, last = (x.shape[1], x.shape[2:]), x.is_contiguous(memory_format=torch.channels_last)
    return {
        "forward": lambda: (functional.bsr_conv2d(x, values, pattern, bias, *geometry, kernel_size=kernel),),
        "dgrad": lambda: (ops.bsr_conv2d_dgrad(grad, values, crow, col, dgrad, *size, *conv, last),),
        "wgrad": lambda: ops.bsr_conv2d_wgrad(grad, x, crow, col, wgrad, pattern.blocksize, *conv, False)[:1],
        "layer": step(layer, layer, x, grad),
    }


def compiled_calls(layer: nn.Module, x: Tensor, grad: Tensor) -> Calls:
    """Of dense torch by ``torch.compile``, where there is more to compile than one call of a library."""
    compiled = torch.compile(layer, dynamic=False)
    return {"forward": lambda: (compiled(x),), "layer": step(compiled, layer, x, grad)}


def step(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensors]:
    """Forward by ``call`` and the gradients of x and the parameters of ``layer``, by autograd."""
    leaf, parameters = x.detach().requires_grad_(), tuple(layer.parameters())

    def run() -> Tensors:
        y = call(leaf)
        return (y, *torch.autograd.grad(y, (leaf, *parameters), grad))

    return run


def exact(case: Case, layer: SparseLinear | SparseConv2d, x: Tensor, grad: Tensor) -> dict[str, Tensors]:
    """What :func:`sparse_calls` must return, by dense torch in float64."""
    dense, pattern = case.dense(case.layouts[0]).double(), layer.pattern
    values, bias = (parameter.detach().double() for parameter in layer.parameters())
    matrix = pattern.scatter(values)
    dense.load_state_dict({"weight": weight_from_matrix(matrix, case.weight), "bias": bias})
    y, grad_x, grad_weight, grad_bias = step(dense, dense, x.double(), grad.double())()
    y = y.detach()
    grad_values = pattern.gather(weight_matrix(grad_weight))
    return {
        "forward": (y,),
        "dgrad": (grad_x,),
        "wgrad": (grad_values,),
        "layer": (y, grad_x, grad_values, grad_bias),
    }
