"""The six ops in plain torch: the truth in tests, and the answer on any device that has no kernel.

Each takes exactly what its op takes (``ops.py``) and is differentiable in the ordinary way. They scatter the values
into the dense matrix and call torch, so they cost what dense costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import BlockPattern
from .weights import weight_from_matrix, weight_matrix


def bsr_linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    out_features: int,
) -> Tensor:
    """Y = X W^T + b: [*, in] -> [*, out]."""
    shape = (out_features, input.shape[-1])
    return F.linear(input, _dense(values, crow_indices, col_indices, shape), bias)


def bsr_linear_dgrad(
    grad_output: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, plan: Tensor, in_features: int
) -> Tensor:
    """dX = dY W: [*, out] -> [*, in]."""
    shape = (grad_output.shape[-1], in_features)
    return grad_output @ _dense(values, crow_indices, col_indices, shape)


def bsr_linear_wgrad(
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    blocksize: Sequence[int],
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """dW = dY^T X at the stored blocks: -> [nnz_blocks, bh, bw], and the bias' gradient [out] or [0]."""
    outputs, inputs = grad_output.shape[-1], input.shape[-1]
    batch = input.shape[:-1].numel()
    grads = grad_output.reshape(batch, outputs)
    weight_grad = grads.t() @ input.reshape(batch, inputs)
    values_grad = _pattern(crow_indices, col_indices, (outputs, inputs), blocksize).gather(weight_grad)
    return values_grad, grads.sum(0) if bias else input.new_empty(0)


def bsr_conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Convolution: [n, c_in, h, w] -> [n, c_out, h', w']."""
    weight = _kernel(values, crow_indices, col_indices, out_channels, input.shape[1], kernel_size, groups)
    output = F.conv2d(input, weight, bias, list(stride), list(padding), list(dilation), groups)
    return output.contiguous(memory_format=_format(channels_last))


def bsr_conv2d_dgrad(
    grad_output: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    in_channels: int,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of the convolution's input: [n, c_out, h', w'] -> [n, c_in, h, w]."""
    weight = _kernel(values, crow_indices, col_indices, grad_output.shape[1], in_channels, kernel_size, groups)
    # What the strides leave over at the bottom and right edge of the input gets no gradient.
    sizes = zip(input_size, grad_output.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    over = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in sizes]
    output = F.conv_transpose2d(grad_output, weight, None, list(stride), list(padding), over, groups, list(dilation))
    return output.contiguous(memory_format=_format(channels_last))


def bsr_conv2d_wgrad(
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    plan: Tensor,
    blocksize: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the convolution's values: -> [nnz_blocks, bh, bw], and the bias' gradient [c_out] or [0]."""
    weight_shape = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    with torch.enable_grad():
        weight = input.new_zeros(weight_shape, requires_grad=True)
        output = F.conv2d(input, weight, None, list(stride), list(padding), list(dilation), groups)
        create_graph = grad_output.requires_grad or input.requires_grad
        (grad,) = torch.autograd.grad(output, weight, grad_output, create_graph=create_graph)
    matrix = weight_matrix(grad)
    values_grad = _pattern(crow_indices, col_indices, tuple(matrix.shape), blocksize).gather(matrix)
    return values_grad, grad_output.sum((0, 2, 3)) if bias else input.new_empty(0)


def _pattern(
    crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, ...], blocksize: Sequence[int]
) -> BlockPattern:
    return BlockPattern(crow_indices, col_indices, (shape[0], shape[1]), (blocksize[0], blocksize[1]))


def _dense(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> Tensor:
    return _pattern(crow_indices, col_indices, shape, values.shape[1:]).scatter(values)


def _kernel(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_channels: int,
    in_channels: int,
    kernel_size: Sequence[int],
    groups: int,
) -> Tensor:
    weight_shape = (out_channels, in_channels // groups, kernel_size[0], kernel_size[1])
    columns = weight_shape[1] * weight_shape[2] * weight_shape[3]
    matrix = _dense(values, crow_indices, col_indices, (out_channels, columns))
    return weight_from_matrix(matrix, weight_shape)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
