"""Block-sparse linear and convolution as functions, with gradients of any order.

The three products are closed under differentiation, so the backward of each Function is made of the other two::

    forward F(x, w)      d x = D(g, w)      d w = G(g, x)
    dgrad   D(g, w)      d g = F(u, w)      d w = G(g, u)      (u: gradient of D's result)
    wgrad   G(g, x)      d g = F(x, v)      d x = D(g, v)      (v: gradient of G's result)

A bias adds to F, and its gradient, the sum of g, comes with G; then d g of G is F with the bias' v added.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .pattern import INT32_MAX, BlockPattern
from .plan import Kernel, Plans, make_plans

Backend = Literal["auto", "cpu", "reference"]
Size2 = int | tuple[int, int]

_linear = torch.ops.sparsekern.bsr_linear.default
_linear_dgrad = torch.ops.sparsekern.bsr_linear_dgrad.default
_linear_wgrad = torch.ops.sparsekern.bsr_linear_wgrad.default
_conv2d = torch.ops.sparsekern.bsr_conv2d.default
_conv2d_dgrad = torch.ops.sparsekern.bsr_conv2d_dgrad.default
_conv2d_wgrad = torch.ops.sparsekern.bsr_conv2d_wgrad.default


def prepare(pattern: BlockPattern, kernel: Kernel | None = None) -> Plans:
    """The plans of ``pattern`` for a linear layer, or for a convolution of ``kernel`` = (kh, kw, groups).

    Built once and kept on the pattern. Layers call this when they get their pattern, so that neither a training step
    nor ``torch.compile`` ever does.
    """
    plans = pattern._plans.get(kernel)
    if plans is None:
        plans = pattern._plans[kernel] = make_plans(pattern, kernel)
    return plans


def bsr_linear(
    x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """``F.linear(x, W, bias)`` for the block-sparse W that ``pattern`` and ``values`` describe.

    Args:
        x: [*, in_features], any strides.
        values: [nnz_blocks, bh, bw]; entries that overhang the edge of W are never read.
        pattern: of shape (out_features, in_features).
        bias: [out_features] or None.
        backend: "cpu" for the compiled kernels (float32, float64; 16-bit types compute in float32), "reference" for
            plain torch, "auto" for the kernels where they exist and plain torch elsewhere.

    Returns:
        [*, out_features].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        RuntimeError: ``backend="cpu"`` and no kernels are built.
    """
    if _plain(x, values, pattern, bias, backend):
        plans = prepare(pattern)
        try:
            if _differentiates():
                return _Linear.apply(x, values, bias, pattern, plans)
            return _linear(x, values, bias, plans[0], plans[1], plans[2], pattern.shape[0])
        except RuntimeError:
            _linear_arguments(x, values, pattern, bias)  # has better words for what the op found wrong
            raise
    x, values, bias, result = _linear_arguments(x, values, pattern, bias)
    plans, outputs = prepare(pattern), pattern.shape[0]
    if resolve(backend, x.device.type) == "reference":
        with torch.autocast(x.device.type, enabled=False):
            y = reference.bsr_linear(x, values, bias, plans.crow_indices, plans.col_indices, plans.forward, outputs)
    elif _differentiates():
        y = _Linear.apply(x, values, bias, pattern, plans)
    else:
        y = _linear(x, values, bias, plans.crow_indices, plans.col_indices, plans.forward, outputs)
    return y if result is None else y.to(result)


def bsr_conv2d(
    x: Tensor,
    values: Tensor,
    pattern: BlockPattern,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | Literal["same", "valid"] = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    kernel_size: Size2,
    backend: Backend = "auto",
) -> Tensor:
    """``F.conv2d`` for the block-sparse weight that ``pattern`` and ``values`` describe.

    The weight [c_out, c_in / groups, kh, kw] is the matrix [c_out, kh * kw * c_in / groups], tap-major: entry
    (o, t * c_in / groups + c) is ``weight[o, c, t // kw, t % kw]``.

    Args:
        x: [n, c_in, h, w] or [c_in, h, w], any strides. The output follows x's memory format (channels_last or not).
        values: [nnz_blocks, bh, bw]; entries that overhang the edge of the matrix are never read.
        pattern: of shape (c_out, kh * kw * c_in / groups).
        bias: [c_out] or None.
        stride, padding, dilation, groups: as in ``F.conv2d``.
        kernel_size: kh and kw, which the matrix alone does not tell.
        backend: as in :func:`bsr_linear`.

    Returns:
        [n, c_out, h', w'] or [c_out, h', w'].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        RuntimeError: ``backend="cpu"`` and no kernels are built.
    """
    _check_types(x, values, pattern, bias)
    conv = _convolution(pattern, kernel_size, stride, padding, dilation, groups)
    c_in = pattern.shape[1] // (conv.kernel_size[0] * conv.kernel_size[1]) * groups
    if x.dim() not in (3, 4) or x.shape[-3] != c_in:
        raise ValueError(f"x must have shape [n, {c_in}, h, w] or [{c_in}, h, w], got {tuple(x.shape)}")
    if not (x.shape[-2] and x.shape[-1]):
        raise ValueError(f"x must have pixels, got shape {tuple(x.shape)}")
    x, values, bias, result = _arguments(x, values, pattern, bias)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    if isinstance(padding, str) and padding == "same":
        # The odd one of an even kernel goes to the right and the bottom, as in torch.
        odd = [d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(odd):
            images = F.pad(images, (0, odd[1], 0, odd[0]))
    size = ops.output_size(images.shape[2:], *conv[:4])
    if min(size) < 1:
        raise ValueError(
            f"x is too small: a kernel of {conv.kernel_size} with padding {conv.padding} and dilation {conv.dilation} "
            f"does not fit into {tuple(images.shape[2:])}"
        )
    channels_last = torch._prims_common.suggest_memory_format(images) == torch.channels_last
    plans = prepare(pattern, (*conv.kernel_size, groups))
    if resolve(backend, x.device.type) == "reference":
        crow, col, plan = plans[:3]
        with torch.autocast(x.device.type, enabled=False):
            y = reference.bsr_conv2d(images, values, bias, crow, col, plan, pattern.shape[0], *conv, channels_last)
    elif _differentiates():
        y = _Conv2d.apply(images, values, bias, pattern, plans, conv, channels_last)
    else:
        y = _conv2d(images, values, bias, *plans[:3], pattern.shape[0], *conv, channels_last)
    y = y if x.dim() == 4 else y.squeeze(0)
    return y if result is None else y.to(result)


class _Conv(NamedTuple):
    """The geometry of a convolution, in the order of the ops' arguments."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, plans: Plans
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.plans = pattern, plans
        return _linear(x, values, bias, *plans[:3], pattern.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        grad_x = _dgrad(grad, values, ctx.pattern, ctx.plans) if need_x else None
        grad_values, grad_bias = None, None
        if need_values:
            grad_values, grad_bias = _wgrad(grad, x, ctx.pattern, ctx.plans, need_bias)
        elif need_bias:
            grad_bias = grad.sum_to_size(grad.shape[-1:])
        return grad_x, grad_values, grad_bias, None, None


class _LinearDgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, values: Tensor, pattern: BlockPattern, plans: Plans) -> Tensor:
        ctx.save_for_backward(grad, values)
        ctx.pattern, ctx.plans = pattern, plans
        return _linear_dgrad(grad, values, plans.crow_indices, plans.col_indices, plans.dgrad, pattern.shape[1])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, values = ctx.saved_tensors
        need_grad, need_values = ctx.needs_input_grad[:2]
        grad_grad = _Linear.apply(u, values, None, ctx.pattern, ctx.plans) if need_grad else None
        grad_values = _wgrad(grad, u, ctx.pattern, ctx.plans, False)[0] if need_values else None
        return grad_grad, grad_values, None, None


class _LinearWgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, pattern: BlockPattern, plans: Plans, bias: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, x)
        ctx.pattern, ctx.plans, ctx.bias = pattern, plans, bias
        return _linear_wgrad(grad, x, plans.crow_indices, plans.col_indices, plans.wgrad, pattern.blocksize, bias)

    @staticmethod
    def backward(ctx: Any, v: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad[:2]
        vb_or_none = vb if ctx.bias else None
        grad_grad = _Linear.apply(x, v, vb_or_none, ctx.pattern, ctx.plans) if need_grad else None
        grad_x = _dgrad(grad, v, ctx.pattern, ctx.plans) if need_x else None
        return grad_grad, grad_x, None, None, None


def _dgrad(grad: Tensor, values: Tensor, pattern: BlockPattern, plans: Plans) -> Tensor:
    if torch.is_grad_enabled():
        return _LinearDgrad.apply(grad, values, pattern, plans)
    return _linear_dgrad(grad, values, plans.crow_indices, plans.col_indices, plans.dgrad, pattern.shape[1])


def _wgrad(grad: Tensor, x: Tensor, pattern: BlockPattern, plans: Plans, bias: bool) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled():
        grad_values, grad_bias = _LinearWgrad.apply(grad, x, pattern, plans, bias)
    else:
        grad_values, grad_bias = _linear_wgrad(grad, x, *plans[:2], plans.wgrad, pattern.blocksize, bias)
    return grad_values, grad_bias if bias else None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, plans: Plans, conv: _Conv,
        channels_last: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.plans, ctx.conv, ctx.channels_last = pattern, plans, conv, channels_last
        return _conv2d(x, values, bias, *plans[:3], pattern.shape[0], *conv, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        size = (x.shape[1], tuple(x.shape[2:]))
        same = (ctx.pattern, ctx.plans, ctx.conv, ctx.channels_last)
        grad_x = _conv_dgrad(grad, values, *same, size) if need_x else None
        grad_values, grad_bias = None, None
        if need_values:
            grad_values, grad_bias = _conv_wgrad(grad, x, *same, need_bias)
        elif need_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_values, grad_bias, None, None, None, None


class _Conv2dDgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, values: Tensor, pattern: BlockPattern, plans: Plans, conv: _Conv, channels_last: bool,
        size: tuple[int, tuple[int, int]],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(grad, values)
        ctx.pattern, ctx.plans, ctx.conv, ctx.channels_last = pattern, plans, conv, channels_last
        return _conv2d_dgrad(grad, values, *plans[:2], plans.dgrad, *size, *conv, channels_last)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, values = ctx.saved_tensors
        need_grad, need_values = ctx.needs_input_grad[:2]
        same = (ctx.pattern, ctx.plans, ctx.conv, ctx.channels_last)
        grad_grad = _Conv2d.apply(u, values, None, *same) if need_grad else None
        grad_values = _conv_wgrad(grad, u, *same, False)[0] if need_values else None
        return grad_grad, grad_values, None, None, None, None, None


class _Conv2dWgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, pattern: BlockPattern, plans: Plans, conv: _Conv, channels_last: bool,
        bias: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(grad, x)
        ctx.pattern, ctx.plans, ctx.conv, ctx.channels_last, ctx.bias = pattern, plans, conv, channels_last, bias
        return _conv2d_wgrad(grad, x, *plans[:2], plans.wgrad, pattern.blocksize, *conv, bias)

    @staticmethod
    def backward(ctx: Any, v: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad[:2]
        size = (x.shape[1], tuple(x.shape[2:]))
        same = (ctx.pattern, ctx.plans, ctx.conv, ctx.channels_last)
        grad_grad = _Conv2d.apply(x, v, vb if ctx.bias else None, *same) if need_grad else None
        grad_x = _conv_dgrad(grad, v, *same, size) if need_x else None
        return grad_grad, grad_x, None, None, None, None, None


def _conv_dgrad(
    grad: Tensor, values: Tensor, pattern: BlockPattern, plans: Plans, conv: _Conv, channels_last: bool,
    size: tuple[int, tuple[int, int]],
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        return _Conv2dDgrad.apply(grad, values, pattern, plans, conv, channels_last, size)
    return _conv2d_dgrad(grad, values, *plans[:2], plans.dgrad, *size, *conv, channels_last)


def _conv_wgrad(
    grad: Tensor, x: Tensor, pattern: BlockPattern, plans: Plans, conv: _Conv, channels_last: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled():
        grad_values, grad_bias = _Conv2dWgrad.apply(grad, x, pattern, plans, conv, channels_last, bias)
    else:
        grad_values, grad_bias = _conv2d_wgrad(grad, x, *plans[:2], plans.wgrad, pattern.blocksize, *conv, bias)
    return grad_values, grad_bias if bias else None


def resolve(backend: Backend, device_type: str) -> Literal["cpu", "reference"]:
    """What ``backend`` means for tensors on a device of that type; only "auto" leaves a choice.

    Raises:
        ValueError: an unknown backend, or "cpu" for another device.
        RuntimeError: "cpu" and no kernels are built.
    """
    if backend == "reference":
        return "reference"
    if backend == "auto":
        return "cpu" if device_type == "cpu" and not ops.CPU_KERNELS_MISSING else "reference"
    if backend != "cpu":
        raise ValueError(f'backend must be "auto", "cpu" or "reference", got {backend!r}')
    if ops.CPU_KERNELS_MISSING:
        raise RuntimeError(f'backend="cpu" needs the compiled kernels: {ops.CPU_KERNELS_MISSING}')
    if device_type != "cpu":
        raise ValueError(f'backend="cpu" needs tensors on the CPU, got x on {device_type}')
    return "cpu"


def _arguments(
    x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    """Check what is common to both products; the tensors to compute with and, if it differs, the result's dtype."""
    pattern.check_values(values)
    device, dtype = x.device, x.dtype
    if device != pattern.device:
        raise ValueError(f"x must be on {pattern.device}, where the pattern is, got {device}")
    if bias is not None and (bias.shape != pattern.shape[:1] or bias.device != device):
        raise ValueError(
            f"bias must have shape {pattern.shape[:1]} on {device}, got {tuple(bias.shape)} on {bias.device}"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"x must be of a floating-point dtype, got {dtype}")
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        # Cast here, outside the Functions: a rule on the op would save float32 and break the backward.
        x, values, bias = x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
    if values.dtype != dtype:
        raise TypeError(f"values must have the dtype of x, {dtype}, got {values.dtype}")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias must have the dtype of x, {dtype}, got {bias.dtype}")
    if dtype == torch.float32 or dtype == torch.float64:
        return x, values, bias, None
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # No 16-bit arithmetic on this path: products and sums in float32, one rounding at the end.
        return x.float(), values.float(), None if bias is None else bias.float(), dtype
    if device.type == "cpu":
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {dtype}")
    return x, values, bias, None


def _differentiates() -> bool:
    """Whether autograd has to see the call: forward mode, which the Functions refuse, can be on without gradients."""
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def _plain(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None, backend: Backend) -> bool:
    """Whether this is the common case, whose shapes the op itself checks: a small layer's call should cost little.

    float32 or float64 on the CPU, no autocast, not being traced (where ops are not run, and so check nothing).
    """
    if not isinstance(x, Tensor) or not isinstance(values, Tensor) or type(pattern) is not BlockPattern:
        return False
    dtype = x.dtype
    return (
        (dtype is torch.float32 or dtype is torch.float64)
        and values.dtype is dtype
        and x.is_cpu
        and values.is_cpu
        and x.layout is values.layout is torch.strided
        and (bias is None or (isinstance(bias, Tensor) and bias.dtype is dtype and bias.is_cpu))
        and not ops.CPU_KERNELS_MISSING
        and (backend == "auto" or backend == "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _linear_arguments(
    x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    _check_types(x, values, pattern, bias)
    inputs = pattern.shape[1]
    if not x.dim() or x.shape[-1] != inputs:
        raise ValueError(
            f"x must have shape [*, {inputs}] for a pattern of shape {pattern.shape}, got {tuple(x.shape)}"
        )
    return _arguments(x, values, pattern, bias)


def _check_types(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None) -> None:
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern must be a BlockPattern, got {type(pattern).__name__}")
    for name, tensor in (("x", x), ("values", values), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            if tensor is not None or name != "bias":
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        elif tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got {tensor.layout}")


def _convolution(
    pattern: BlockPattern,
    kernel_size: Size2,
    stride: Size2,
    padding: Size2 | Literal["same", "valid"],
    dilation: Size2,
    groups: int,
) -> _Conv:
    kernel, step, spread = (
        _pair("kernel_size", kernel_size, 1),
        _pair("stride", stride, 1),
        _pair("dilation", dilation, 1),
    )
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'padding must be "same", "valid", an int or two ints, got {padding!r}')
        if padding == "same" and step != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got {step}')
        same = (spread[0] * (kernel[0] - 1) // 2, spread[1] * (kernel[1] - 1) // 2)
        pad = same if padding == "same" else (0, 0)
    else:
        pad = _pair("padding", padding, 0)
    c_out, columns = pattern.shape
    if type(groups) is not int or groups < 1 or c_out % groups:
        raise ValueError(f"groups must be an int of at least 1 that divides the {c_out} output channels, got {groups}")
    if columns % (kernel[0] * kernel[1]):
        raise ValueError(f"the pattern's {columns} columns are no multiple of kernel_size {kernel[0]} * {kernel[1]}")
    return _Conv(kernel, step, pad, spread, groups)


def _pair(name: str, value: Size2, minimum: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(type(n) is int and minimum <= n <= INT32_MAX for n in pair):
        raise ValueError(f"{name} must be an int or two ints of at least {minimum} that fit int32, got {value!r}")
    return pair
