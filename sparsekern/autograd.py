"""The autograd Functions of the products.

The three products are closed under differentiation, so the backward of each Function is made of the other two::

    forward F(x, w)      d x = D(g, w)      d w = G(g, x)
    dgrad   D(g, w)      d g = F(u, w)      d w = G(g, u)      (u: gradient of D's result)
    wgrad   G(g, x)      d g = F(x, v)      d x = D(g, v)      (v: gradient of G's result)

A bias adds to F, and its gradient, the sum of g, comes with G; then d g of G is F with the bias' v added.

``tf32`` says which kernels compute a linear layer, with the plans that they read: None those of the CPU (or of plain
torch), a bool those of Triton, which may or may not round the factors of float32 products to TF32. A backward takes
what its forward took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import ops as _  # noqa: F401 -- declares the ops
from .pattern import BlockPattern
from .plan import Plans

linear_op = torch.ops.sparsekern.bsr_linear.default
linear_dgrad_op = torch.ops.sparsekern.bsr_linear_dgrad.default
linear_wgrad_op = torch.ops.sparsekern.bsr_linear_wgrad.default
linear_triton_op = torch.ops.sparsekern.bsr_linear_triton.default
linear_dgrad_triton_op = torch.ops.sparsekern.bsr_linear_dgrad_triton.default
linear_wgrad_triton_op = torch.ops.sparsekern.bsr_linear_wgrad_triton.default
conv2d_op = torch.ops.sparsekern.bsr_conv2d.default
conv2d_dgrad_op = torch.ops.sparsekern.bsr_conv2d_dgrad.default
conv2d_wgrad_op = torch.ops.sparsekern.bsr_conv2d_wgrad.default


class Conv(NamedTuple):
    """The geometry of a convolution, in the order of the ops' arguments."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, plans: Plans, tf32: bool | None
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer = (pattern, plans, tf32)
        if tf32 is None:
            return linear_op(x, values, bias, plans[0], plans[1], plans[2], pattern.shape[0])
        return linear_triton_op(x, values, bias, *plans[:3], pattern.shape[0], tf32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        grad_x = _dgrad(grad, values, *ctx.layer) if need_x else None
        grad_values, grad_bias = None, None
        if need_values:
            grad_values, grad_bias = _wgrad(grad, x, need_bias, *ctx.layer)
        elif need_bias:
            grad_bias = grad.sum_to_size(grad.shape[-1:])
        return grad_x, grad_values, grad_bias, None, None, None


class _LinearDgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, values: Tensor, pattern: BlockPattern, plans: Plans, tf32: bool | None
    ) -> Tensor:
        ctx.save_for_backward(grad, values)
        ctx.layer = (pattern, plans, tf32)
        return _run_dgrad(grad, values, pattern, plans, tf32)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, values = ctx.saved_tensors
        need_grad, need_values = ctx.needs_input_grad[:2]
        grad_grad = Linear.apply(u, values, None, *ctx.layer) if need_grad else None
        grad_values = _wgrad(grad, u, False, *ctx.layer)[0] if need_values else None
        return grad_grad, grad_values, None, None, None


class _LinearWgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, bias: bool, pattern: BlockPattern, plans: Plans, tf32: bool | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, x)
        ctx.layer, ctx.bias = (pattern, plans, tf32), bias
        return _run_wgrad(grad, x, bias, pattern, plans, tf32)

    @staticmethod
    def backward(ctx: Any, v: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad[:2]
        grad_grad = Linear.apply(x, v, vb if ctx.bias else None, *ctx.layer) if need_grad else None
        grad_x = _dgrad(grad, v, *ctx.layer) if need_x else None
        return grad_grad, grad_x, None, None, None, None


def _run_dgrad(grad: Tensor, values: Tensor, pattern: BlockPattern, plans: Plans, tf32: bool | None) -> Tensor:
    args = (grad, values, plans[0], plans[1], plans.dgrad, pattern.shape[1])
    return linear_dgrad_op(*args) if tf32 is None else linear_dgrad_triton_op(*args, tf32)


def _run_wgrad(
    grad: Tensor, x: Tensor, bias: bool, pattern: BlockPattern, plans: Plans, tf32: bool | None
) -> tuple[Tensor, Tensor]:
    args = (grad, x, plans[0], plans[1], plans.wgrad, pattern.blocksize, bias)
    return linear_wgrad_op(*args) if tf32 is None else linear_wgrad_triton_op(*args, tf32)


def _dgrad(grad: Tensor, values: Tensor, *layer: Any) -> Tensor:
    run = _LinearDgrad.apply if torch.is_grad_enabled() else _run_dgrad
    return run(grad, values, *layer)


def _wgrad(grad: Tensor, x: Tensor, bias: bool, *layer: Any) -> tuple[Tensor, Tensor | None]:
    run = _LinearWgrad.apply if torch.is_grad_enabled() else _run_wgrad
    grad_values, grad_bias = run(grad, x, bias, *layer)
    return grad_values, grad_bias if bias else None


class Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern, plans: Plans, conv: Conv,
        channels_last: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, values)
        ctx.layer = (pattern, plans, conv, channels_last)
        return conv2d_op(x, values, bias, plans[0], plans[1], plans[2], pattern.shape[0], *conv, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        size = (x.shape[1], tuple(x.shape[2:]))
        grad_x = _conv_dgrad(grad, values, size, *ctx.layer) if need_x else None
        grad_values, grad_bias = None, None
        if need_values:
            grad_values, grad_bias = _conv_wgrad(grad, x, need_bias, *ctx.layer)
        elif need_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_values, grad_bias, None, None, None, None


class _Conv2dDgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, values: Tensor, pattern: BlockPattern, plans: Plans, conv: Conv, channels_last: bool,
        size: tuple[int, tuple[int, int]],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(grad, values)
        ctx.layer = (pattern, plans, conv, channels_last)
        return conv2d_dgrad_op(grad, values, *plans[:2], plans.dgrad, *size, *conv, channels_last)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, values = ctx.saved_tensors
        need_grad, need_values = ctx.needs_input_grad[:2]
        grad_grad = Conv2d.apply(u, values, None, *ctx.layer) if need_grad else None
        grad_values = _conv_wgrad(grad, u, False, *ctx.layer)[0] if need_values else None
        return grad_grad, grad_values, None, None, None, None, None


class _Conv2dWgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, pattern: BlockPattern, plans: Plans, conv: Conv, channels_last: bool,
        bias: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(grad, x)
        ctx.layer, ctx.bias = (pattern, plans, conv, channels_last), bias
        return conv2d_wgrad_op(grad, x, *plans[:2], plans.wgrad, pattern.blocksize, *conv, bias)

    @staticmethod
    def backward(ctx: Any, v: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad[:2]
        size = (x.shape[1], tuple(x.shape[2:]))
        grad_grad = Conv2d.apply(x, v, vb if ctx.bias else None, *ctx.layer) if need_grad else None
        grad_x = _conv_dgrad(grad, v, size, *ctx.layer) if need_x else None
        return grad_grad, grad_x, None, None, None, None, None


def _conv_dgrad(
    grad: Tensor, values: Tensor, size: tuple[int, tuple[int, int]], pattern: BlockPattern, plans: Plans, conv: Conv,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        return _Conv2dDgrad.apply(grad, values, pattern, plans, conv, channels_last, size)
    return conv2d_dgrad_op(grad, values, *plans[:2], plans.dgrad, *size, *conv, channels_last)


def _conv_wgrad(
    grad: Tensor, x: Tensor, bias: bool, pattern: BlockPattern, plans: Plans, conv: Conv, channels_last: bool
) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled():
        grad_values, grad_bias = _Conv2dWgrad.apply(grad, x, pattern, plans, conv, channels_last, bias)
    else:
        grad_values, grad_bias = conv2d_wgrad_op(grad, x, *plans[:2], plans.wgrad, pattern.blocksize, *conv, bias)
    return grad_values, grad_bias if bias else None


def direct_apply(function: type[torch.autograd.Function], functorch_is_active: object) -> Callable[..., Tensor]:
    """``function.apply`` without torch's Python method around it, which takes 5 us to find out that functorch rests.

    With no functorch transform active, as the caller has to make sure, that method ends in this very call. Where torch
    does not say whether one is, the method itself.
    """
    return cast("Any", super(torch.autograd.Function, function)).apply if functorch_is_active else function.apply


# Private to torch (2.10 to 2.13); Function.apply asks the same.
functorch_is_active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
apply_linear = direct_apply(Linear, functorch_is_active)
apply_conv2d = direct_apply(Conv2d, functorch_is_active)
