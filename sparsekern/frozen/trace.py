"""From a model to a :class:`~sparsekern.frozen.network.Network`: traced with torch.fx, and fused on the way.

Batch norm goes into the weights before it, biases, ReLU and residuals into the product that they follow, average pools
become products; what cannot go along raises an error that names it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..eligible import call_with_example
from ..models import Images
from ..nn import SparseConv2d, SparseLayer, SparseLinear
from .network import Floats, Network, Pair, Pool, Product, Value, layer_weights, per_channel, per_number

SUPPORTED = (
    "SparseLinear, SparseConv2d, Linear, Conv2d (zero padding), BatchNorm1d, BatchNorm2d, ReLU, MaxPool2d, AvgPool2d, "
    "AdaptiveAvgPool2d (to sizes that divide its input), Flatten, Dropout, Identity, Sequential, adding two results, "
    "their functional forms, and a final softmax or log_softmax"
)
_LEAVES = (nn.Linear, nn.Conv2d, SparseLinear, SparseConv2d)
_SOFTMAX: dict[object, Callable[..., Tensor]] = {
    nn.LogSoftmax: torch.log_softmax, nn.Softmax: torch.softmax, F.log_softmax: torch.log_softmax,
    torch.log_softmax: torch.log_softmax, "log_softmax": torch.log_softmax, F.softmax: torch.softmax,
    torch.softmax: torch.softmax, "softmax": torch.softmax,
}  # fmt: skip
# Functions as the modules that do the same, with the names of the arguments behind the input.
_MAX = (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"))
_AVERAGE = (nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"))
_MODULE_OF: dict[object, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.relu: (nn.ReLU, ("inplace",)), torch.relu: (nn.ReLU, ()), "relu": (nn.ReLU, ()),
    F.max_pool2d: _MAX, torch.max_pool2d: _MAX, F.avg_pool2d: _AVERAGE,
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)), F.dropout: (nn.Dropout, ("p", "training")),
}  # fmt: skip
_ADD = (operator.add, operator.iadd, torch.add, "add")
_RESHAPE = (torch.flatten, "flatten", "view", "reshape", torch.reshape, "unflatten")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = super().is_leaf_module(m, module_qualified_name)  # all of torch.nn but Sequential
        return leaf or isinstance(m, (SparseLayer, Images))


class _Shapes(fx.Interpreter):
    """Runs the graph on the example and keeps what every node gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["result"] = result.shape if isinstance(result, Tensor) else result
        return result


@torch.no_grad()
def trace(model: nn.Module, example: Tensor) -> tuple[Network, torch.Size, Callable[[Tensor], Tensor] | None]:
    """What ``model`` computes for inputs like ``example``, its output's shape, and what torch does to that at the end.

    Raises:
        ValueError, TypeError: something in the model is not supported; it is named.
    """
    root = nn.Sequential(model) if type(model) in _LEAVES else model
    for name, module in model.named_modules():
        _check_plain(name, module)
    expected = call_with_example(model, example.clone())  # first, for the errors that it has itself
    if not isinstance(expected, Tensor):
        raise ValueError(f"model must return one tensor, got {type(expected).__name__}")
    try:
        graph = _Tracer().trace(root)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ValueError(
            f"model cannot be traced: {error}. freeze follows models whose forward is a plain chain of layers, "
            f"without control flow that depends on the input"
        ) from error
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    if inputs != 1:
        raise ValueError(f"model must take one tensor, its forward takes {inputs}")
    result = _Shapes(fx.GraphModule(root, graph)).run(example.clone())
    network = _Lowering(root, graph, example).run()
    rounding = 1e-3 * float(expected.nan_to_num().abs().max())
    if not torch.allclose(result, expected, rtol=1e-3, atol=rounding, equal_nan=True):
        raise ValueError(
            "model cannot be traced: what was traced gives other results; does it change tensors in place?"
        )
    return network


def _check_plain(name: str, module: nn.Module) -> None:
    """Refuse what fx would silently leave out, and what differs in training, before it changes its statistics."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or "forward" in vars(module):
        raise ValueError(f"{_named(name, module)} has forward hooks or a replaced forward, which freeze cannot follow")
    if module.training and isinstance(module, _BatchNorm | _DropoutNd):
        raise ValueError(
            f"model must be in evaluation mode: call model.eval() first; "
            f"{_named(name, module)} computes something else while it trains"
        )


def _named(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


class _Lowering:
    """Turns the nodes of a graph into steps, one by one."""

    def __init__(self, root: nn.Module, graph: fx.Graph, example: Tensor) -> None:
        self.root, self.graph, self.batch = root, graph, example.shape[0]
        first = _value(example.shape)
        self.network = Network(first, first)
        self.values: dict[fx.Node, Value] = {}
        self.tail: Callable[[Tensor], Tensor] | None = None  # what torch does in the end

    def run(self) -> tuple[Network, torch.Size, Callable[[Tensor], Tensor] | None]:
        result: Any = None
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.network.input
            elif node.op == "output":
                result = node.args[0]
            elif node.op in ("call_module", "call_function", "call_method"):
                self.lower(node)
            else:
                raise self.unsupported(node, "it uses a parameter or buffer directly")
        if not isinstance(result, fx.Node) or result not in self.values:
            raise ValueError("model must return one tensor that depends on its input")
        value = self.values[result]
        if value.step is None:
            value = self.diagonal("identity", value, result)
        self.network.output = value
        return self.network, result.meta["result"], self.tail

    # ---- which node is what -----------------------------------------------------------------------------------------

    def lower(self, node: fx.Node) -> None:
        shape = node.meta["result"]
        if not isinstance(shape, torch.Size):
            return  # sizes and the like; those who use them are looked at
        if self.tail is not None:
            raise self.unsupported(node, "nothing can come after softmax or log_softmax")
        if node.target in _ADD:
            self.values[node] = self.add(node)
            return
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source not in self.values:
            raise self.unsupported(node)
        name, module = self.module_of(node)
        value, before = self.values[source], source.meta["result"]
        kind = _SOFTMAX.get(node.target if module is None else type(module))
        if kind is not None:
            self.tail = self.softmax(node, kind, module)
        elif node.target in _RESHAPE or isinstance(module, nn.Flatten | nn.Unflatten | Images):
            value = self.reshape(node, source, value, shape)
        elif isinstance(module, _DropoutNd) and module.training:
            raise self.unsupported(node, "it drops at random: call model.eval()")
        elif isinstance(module, nn.Identity | _DropoutNd):
            pass
        elif isinstance(module, nn.Linear | SparseLinear) and type(module) in _LEAVES and len(before) == 2:
            value = self.linear(name, module, value, shape)
        elif isinstance(module, nn.Conv2d | SparseConv2d) and type(module) in _LEAVES and len(before) == 4:
            value = self.convolution(node, name, module, value, shape)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and len(before) in (2, 4):
            value = self.norm(node, name, module, value, source)
        elif type(module) is nn.ReLU:
            value = self.relu(node, name, module, value, source)
        elif type(module) is nn.MaxPool2d and len(before) == 4:
            sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
            kernel, stride, padding, dilation = map(_pair, sizes)
            value = self.network.add(Pool(name, value, Value(*shape[1:]), kernel, stride, padding, dilation))
        elif type(module) is nn.AvgPool2d and len(before) == 4:
            value = self.average_pool(node, name, module, value, shape)
        elif type(module) is nn.AdaptiveAvgPool2d and len(before) == 4:
            value = self.adaptive_pool(node, name, value, shape)
        else:
            known = type(module) in (*_LEAVES, nn.BatchNorm1d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
            raise self.unsupported(node, f"its input has shape {tuple(before)}" if known else "")
        if value.numbers == 0:
            raise self.unsupported(node, "its result is empty")
        self.values[node] = value

    def module_of(self, node: fx.Node) -> tuple[str, nn.Module | None]:
        """The node's name for people, and the module that it calls or that does what its function does."""
        if node.op == "call_module":
            return str(node.target), self.root.get_submodule(str(node.target))
        if node.target not in _MODULE_OF:
            return node.name, None
        kind, names = _MODULE_OF[node.target]
        arguments = dict(zip(names, node.args[1:], strict=False))
        arguments |= {name: value for name, value in node.kwargs.items() if name in names}
        training = arguments.pop("training", True)
        return node.name, kind(**arguments).train(bool(training))

    def unsupported(self, node: fx.Node, why: str = "") -> ValueError:
        if node.op == "call_module":
            what = _named(str(node.target), self.root.get_submodule(str(node.target)))
        else:
            what = f"{node.name!r} ({getattr(node.target, '__name__', node.target)})"
        return ValueError(f"freeze cannot take {what}{': ' + why if why else ''}. Supported are {SUPPORTED}")

    # ---- one kind each ----------------------------------------------------------------------------------------------

    def softmax(
        self, node: fx.Node, kind: Callable[..., Tensor], module: nn.Module | None
    ) -> Callable[[Tensor], Tensor]:
        dim = getattr(module, "dim", None) if module else node.kwargs.get("dim", (*node.args, None)[1])
        if not isinstance(dim, int) or node.kwargs.get("dtype") is not None or len(node.args) > 2:
            raise self.unsupported(node, "it needs a dim, and cannot have a dtype")
        return partial(kind, dim=dim)

    def reshape(self, node: fx.Node, source: fx.Node, value: Value, shape: torch.Size) -> Value:
        before: torch.Size = source.meta["result"]
        if len(shape) and shape[0] == self.batch:
            if shape == before:
                return value
            if value.step is None and self.alone(source) and len(shape) in (2, 4):
                self.network.input = _value(shape)  # the input is read in any shape
                return self.network.input
            if len(before) == 4 and len(shape) == 2:
                return value
        raise self.unsupported(node, "it must flatten all but the first dimension, or shape the model's input")

    def linear(self, name: str, module: nn.Linear | SparseLinear, value: Value, shape: torch.Size) -> Value:
        weights, bias = layer_weights(module, value), _bias(module.bias, shape[1])
        kernel = (value.height, value.width)
        return self.network.add(Product(name, value, Value(shape[1], 1, 1), weights, bias, True, kernel=kernel))

    def convolution(
        self, node: fx.Node, name: str, module: nn.Conv2d | SparseConv2d, value: Value, shape: torch.Size
    ) -> Value:
        if module.padding_mode != "zeros":
            raise self.unsupported(node, f"its padding_mode is {module.padding_mode!r}, not 'zeros'")
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        padding = _pair(module.padding) if not isinstance(module.padding, str) else (0, 0)
        if module.padding == "same":  # where that is odd, the larger part goes below and to the right
            padding = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
        window = (kernel, _pair(module.stride), padding, dilation)
        weights, bias = layer_weights(module, value), _bias(module.bias, shape[1])
        return self.network.add(Product(name, value, Value(*shape[1:]), weights, bias, False, *window))

    def norm(
        self, node: fx.Node, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d, value: Value, source: fx.Node
    ) -> Value:
        mean, var = module.running_mean, module.running_var
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d) or mean is None or var is None:
            raise self.unsupported(node, "it keeps no running statistics (track_running_stats)")
        scale = (var.double() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.detach().double()
        shift = -mean.double() * scale
        if module.bias is not None:
            shift = shift + module.bias.detach().double()
        factor, addend = scale.numpy(), shift.numpy()
        step = value.step
        foldable = isinstance(step, Product) and not step.relu and step.residual is None
        if foldable and self.alone(source) and value.channels == len(factor):
            assert isinstance(step, Product)
            step.weights.value = step.weights.value * factor[step.weights.row]
            step.bias = step.bias * factor + addend
            return value
        return self.diagonal(name, value, source, factor, addend)

    def relu(self, node: fx.Node, name: str, module: nn.ReLU, value: Value, source: fx.Node) -> Value:
        if module.inplace and len(source.users) > 1:
            raise self.unsupported(node, "it changes in place what others read too")
        if value.step is not None and self.alone(source):
            value.step.relu = True
            return value
        return self.diagonal(name, value, source, relu=True)

    def add(self, node: fx.Node) -> Value:
        operands = [*node.args, *node.kwargs.values()]
        first, second = [*operands, None, None][:2]
        if len(operands) != 2 or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            raise self.unsupported(node, "it must add two results, without a factor")
        if first not in self.values or second not in self.values:
            raise self.unsupported(node)
        if first.meta["result"] != second.meta["result"]:
            shapes = [tuple(n.meta["result"]) for n in (first, second)]
            raise self.unsupported(node, f"it must add two results of one shape, got {shapes[0]} and {shapes[1]}")
        if node.target is operator.iadd and len(first.users) > 1:
            raise self.unsupported(node, "it changes in place what others read too")
        order = {step: index for index, step in enumerate(self.network.steps)}
        for host, other in ((first, second), (second, first)):
            value, residual = self.values[host], self.values[other]
            step, ready = value.step, -1 if residual.step is None else order[residual.step]
            if not isinstance(step, Product) or step.relu or step.residual is not None or not self.alone(host):
                continue
            if host is not other and value.size == residual.size and ready < order[step]:
                step.residual = residual
                return value
        residual = self.values[second]
        if len(second.meta["result"]) == 2 and residual.height * residual.width > 1:
            residual = self.diagonal(node.name, residual, second)  # as features, side by side
        return self.diagonal(node.name, self.values[first], first, residual=residual)

    def average_pool(self, node: fx.Node, name: str, module: nn.AvgPool2d, value: Value, shape: torch.Size) -> Value:
        kernel, padding = _pair(module.kernel_size), _pair(module.padding)
        if module.ceil_mode or (not module.count_include_pad and padding != (0, 0)):
            raise self.unsupported(node, "ceil_mode, and padding that does not count, are not supported")
        window = (kernel, _pair(module.stride), padding)
        return self.average(name, value, shape, module.divisor_override or kernel[0] * kernel[1], *window)

    def adaptive_pool(self, node: fx.Node, name: str, value: Value, shape: torch.Size) -> Value:
        size, out = (value.height, value.width), (shape[2], shape[3])
        if size[0] % out[0] or size[1] % out[1]:
            raise self.unsupported(node, f"its output size {out} must divide its input's, {size}")
        kernel = (size[0] // out[0], size[1] // out[1])
        return self.average(name, value, shape, kernel[0] * kernel[1], kernel, kernel)

    def average(
        self, name: str, value: Value, shape: torch.Size, divisor: int, kernel: Pair, stride: Pair,
        padding: Pair = (0, 0),
    ) -> Value:  # fmt: skip
        weights = per_channel(value.channels, kernel, np.full(value.channels, 1 / divisor))
        bias = np.zeros(value.channels)
        return self.network.add(Product(name, value, Value(*shape[1:]), weights, bias, False, kernel, stride, padding))

    def diagonal(
        self, name: str, value: Value, source: fx.Node, scale: Floats | None = None, shift: Floats | None = None,
        relu: bool = False, residual: Value | None = None,
    ) -> Value:  # fmt: skip
        """relu(scale * value + shift + residual), per channel, or per number of what has been flattened."""
        flat = len(source.meta["result"]) == 2
        numbers = value.numbers if flat else value.channels
        scale = np.ones(numbers) if scale is None else scale
        shift = np.zeros(numbers) if shift is None else shift
        if flat:
            output, kernel, weights = Value(numbers, 1, 1), (value.height, value.width), per_number(value, scale)
        else:
            output, kernel, weights = Value(*value.size), (1, 1), per_channel(numbers, (1, 1), scale)
        return self.network.add(
            Product(name, value, output, weights, shift, flat, kernel, relu=relu, residual=residual)
        )

    def alone(self, node: fx.Node) -> bool:
        """Whether nothing but one node reads what ``node`` gave, nor what it only gave another shape to."""
        while len(node.users) == 1:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or self.values.get(source) is not self.values.get(node):
                return True
            node = source
        return False


def _value(shape: torch.Size) -> Value:
    """A place for a tensor of that shape; only reshapes look at those with neither 2 nor 4 dimensions."""
    return Value(*shape[1:]) if len(shape) == 4 else Value(math.prod(shape[1:]), 1, 1)


def _bias(bias: Tensor | None, outputs: int) -> Floats:
    return np.zeros(outputs) if bias is None else bias.detach().double().numpy().copy()


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
