"""Every op declared once: schema, fake, FLOP rule, and the reference that answers where no kernel is registered.

The six ops are three products times two ways to read the activations. W is block sparse, X and Y are dense::

    bsr_linear         Y  = X W^T + b                     bsr_conv2d
    bsr_linear_dgrad   dX = dY W                          bsr_conv2d_dgrad
    bsr_linear_wgrad   dW = dY^T X at stored blocks       bsr_conv2d_wgrad

wgrad gives the gradient of the bias, dY summed up, as its second result when ``bias`` is true (empty otherwise): it
has dY at hand already.
``plan`` is what the CPU kernel of that op needs (``plan.py``); the indices are for the others. The ops trust their
indices and plans, which is why they are private: ``functional.py`` is the way in. They carry no autograd rule: each
product's gradient is made of the other two, in ``autograd.py``.

``bsr_linear_triton``, ``bsr_linear_dgrad_triton`` and ``bsr_linear_wgrad_triton`` are the linear ones on GPUs, with
plans of their own (``triton/plan.py``).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference, triton

log = logging.getLogger("sparsekern")

_INDICES = "Tensor crow_indices, Tensor col_indices, Tensor plan"
_CONV = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"
_LIBRARY = Path(__file__).with_name("_C_cpu.so")

SCHEMAS = {
    "bsr_linear": f"(Tensor input, Tensor values, Tensor? bias, {_INDICES}, int out_features) -> Tensor",
    "bsr_linear_dgrad": f"(Tensor grad_output, Tensor values, {_INDICES}, int in_features) -> Tensor",
    "bsr_linear_wgrad": f"(Tensor grad_output, Tensor input, {_INDICES}, int[2] blocksize, bool bias) "
    "-> (Tensor, Tensor)",
    "bsr_conv2d": f"(Tensor input, Tensor values, Tensor? bias, {_INDICES}, int out_channels, {_CONV}, "
    "bool channels_last) -> Tensor",
    "bsr_conv2d_dgrad": f"(Tensor grad_output, Tensor values, {_INDICES}, int in_channels, SymInt[2] input_size, "
    f"{_CONV}, bool channels_last) -> Tensor",
    "bsr_conv2d_wgrad": f"(Tensor grad_output, Tensor input, {_INDICES}, int[2] blocksize, {_CONV}, bool bias) "
    "-> (Tensor, Tensor)",
}

# The same products by the kernels of `triton/`, with a plan of their own: the schema of the op and one argument more.
TRITON = {f"{name}_triton": name for name in SCHEMAS if name.startswith("bsr_linear")}


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of a convolution's output."""
    parts = zip(size, kernel_size, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts]


def _new_image(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _fake_linear(input: Tensor, values: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, plan: Tensor,
                 out_features: int) -> Tensor:  # fmt: skip
    return input.new_empty((*input.shape[:-1], out_features))


def _fake_linear_dgrad(grad_output: Tensor, values: Tensor, crow: Tensor, col: Tensor, plan: Tensor,
                       in_features: int) -> Tensor:  # fmt: skip
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


def _fake_linear_wgrad(grad_output: Tensor, input: Tensor, crow: Tensor, col: Tensor, plan: Tensor,
                       blocksize: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = grad_output.shape[-1] if bias else 0
    return input.new_empty((col.shape[0], *blocksize)), input.new_empty(outputs)


def _fake_conv2d_wgrad(grad_output: Tensor, input: Tensor, crow: Tensor, col: Tensor, plan: Tensor,
                       blocksize: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                       padding: Sequence[int], dilation: Sequence[int], groups: int,
                       bias: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = grad_output.shape[1] if bias else 0
    return input.new_empty((col.shape[0], *blocksize)), input.new_empty(outputs)


def _fake_conv2d(input: Tensor, values: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, plan: Tensor,
                 out_channels: int, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], groups: int, channels_last: bool) -> Tensor:  # fmt: skip
    size = output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    return _new_image(input, (input.shape[0], out_channels, *size), channels_last)


def _fake_conv2d_dgrad(grad_output: Tensor, values: Tensor, crow: Tensor, col: Tensor, plan: Tensor, in_channels: int,
                       input_size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                       padding: Sequence[int], dilation: Sequence[int], groups: int,
                       channels_last: bool) -> Tensor:  # fmt: skip
    return _new_image(grad_output, (grad_output.shape[0], in_channels, *input_size), channels_last)


# Multiply-adds of stored weights times rows (or pixels) of the output, two FLOPs each, as torch counts them.
def _rows(shape: Sequence[int]) -> int:
    return torch.Size(shape[:-1]).numel()


def _pixels(shape: Sequence[int]) -> int:
    return shape[0] * torch.Size(shape[2:]).numel()


def _flops_linear(x: Sequence[int], values: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _rows(x) * torch.Size(values).numel()


def _flops_linear_wgrad(x: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _rows(x) * torch.Size(out_shape[0]).numel()


def _flops_conv2d(x: Sequence[int], values: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _pixels(out_shape) * torch.Size(values).numel()


def _flops_conv2d_dgrad(g: Sequence[int], values: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * _pixels(g) * torch.Size(values).numel()


def _flops_conv2d_wgrad(g: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _pixels(g) * torch.Size(out_shape[0]).numel()


_FAKES: dict[str, tuple[Callable[..., Any], Callable[..., int]]] = {
    "bsr_linear": (_fake_linear, _flops_linear),
    "bsr_linear_dgrad": (_fake_linear_dgrad, _flops_linear),
    "bsr_linear_wgrad": (_fake_linear_wgrad, _flops_linear_wgrad),
    "bsr_conv2d": (_fake_conv2d, _flops_conv2d),
    "bsr_conv2d_dgrad": (_fake_conv2d_dgrad, _flops_conv2d_dgrad),
    "bsr_conv2d_wgrad": (_fake_conv2d_wgrad, _flops_conv2d_wgrad),
}


def _load_cpu_kernels() -> str | None:
    """Load the compiled kernels; the reason they are not there, or None."""
    if not _LIBRARY.exists():
        return f"{_LIBRARY.name} is not built (run `pip install -e .` in the source tree)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error}"
    return None


@functools.cache
def triton_kernels() -> ModuleType:
    """The module of the GPU kernels, imported here and only here: with it comes Triton.

    Raises:
        RuntimeError: why they cannot run.
    """
    reason = triton.missing()
    if reason:
        raise RuntimeError(f'backend="triton" cannot run here: {reason}')
    return importlib.import_module(".triton.linear", __package__)


def triton_device() -> str:
    """Type of the device that Triton computes on; "cpu" where an emulator stands for its driver."""
    from triton.runtime import driver

    return str(driver.active.get_active_torch_device().type)


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], op: str) -> None:
    torch.library.define(f"sparsekern::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"sparsekern::{name}", "CompositeExplicitAutograd", torch.no_grad()(kernel))
    torch.library.register_fake(f"sparsekern::{name}", fake)
    register_flop_formula(getattr(torch.ops.sparsekern, name))(_FAKES[op][1])


def _define_triton(name: str, op: str) -> None:
    product = op.removeprefix("bsr_")

    def kernel(*args: Any) -> Any:
        return getattr(triton_kernels(), product)(*args)

    def fake(*args: Any) -> Any:
        return _FAKES[op][0](*args[:-1])

    _define(name, SCHEMAS[op].replace(") -> ", ", bool allow_tf32) -> ", 1), kernel, fake, op)


for _name, _schema in SCHEMAS.items():
    _define(_name, _schema, getattr(reference, _name), _FAKES[_name][0], _name)
for _name, _op in TRITON.items():
    _define_triton(_name, _op)

CPU_KERNELS_MISSING = _load_cpu_kernels()
if CPU_KERNELS_MISSING:
    log.warning("no CPU kernels, layers run as dense torch: %s", CPU_KERNELS_MISSING)
