"""Block-sparse linear and convolution as functions, with gradients of any order (``autograd.py``)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dense, ops, reference
from .autograd import (
    Conv,
    Conv2d,
    Linear,
    apply_conv2d,
    apply_linear,
    conv2d_op,
    functorch_is_active,
    linear_op,
    linear_triton_op,
)
from .backend import Backend as Backend
from .backend import constant_in_graphs, resolve
from .pattern import INT32_MAX, BlockPattern
from .plan import Kernel, Plans, make_plans
from .triton.plan import make_plan as make_triton_plan

Size2 = int | tuple[int, int]


def prepare(pattern: BlockPattern, kernel: Kernel | None = None) -> Plans:
    """The plans of ``pattern`` for a linear layer, or for a convolution of ``kernel`` = (kh, kw, groups).

    Built once and kept on the pattern. Layers call this when they get their pattern, so that neither a training step
    nor ``torch.compile`` ever does.
    """
    plans = pattern._plans.get(kernel)
    if plans is None:
        plans = pattern._plans[kernel] = make_plans(pattern, kernel)
    return plans


def prepare_triton(pattern: BlockPattern) -> Plans:
    """As :func:`prepare`, for a linear layer and the kernels of Triton, whose blocksizes it must be of.

    Neither Triton nor a GPU is needed.
    """
    plans: Plans | None = pattern._plans.get("triton")
    if plans is None:
        products = (make_triton_plan(pattern, product) for product in ("forward", "dgrad", "wgrad"))
        plans = pattern._plans["triton"] = Plans(pattern._crow, pattern._col, *products)
    return plans


def bsr_linear(
    x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """``F.linear(x, W, bias)`` for the block-sparse W that ``pattern`` and ``values`` describe.

    Args:
        x: [*, in_features], any strides; float32, float64, bfloat16 or float16.
        values: [nnz_blocks, bh, bw], of the dtype of x; entries that overhang the edge of W are never read.
        pattern: of shape (out_features, in_features).
        bias: [out_features], of the dtype of x, or None.
        backend: "cpu" for the compiled kernels (float32, float64; 16-bit types compute in float32), "triton" for GPUs'
            (blocks with sides of 16, 32, 64 or 128; float32, bfloat16, float16; sums in float32; TF32 where
            ``torch.backends.cuda.matmul.allow_tf32``),
            "dense" for torch's own product with a dense weight that the values are written into, "reference" for plain
            torch, the truth in tests, "auto" for the kernels where they exist, otherwise "dense" on GPUs and
            "reference" elsewhere. (A layer's "auto" also weighs dense against the kernels of the CPU:
            :func:`sparsekern.cost.choose`.)

    Returns:
        [*, out_features].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; an unknown backend, or one without a
            kernel for these blocks or numbers.
        RuntimeError: ``backend="cpu"`` and no kernels are built, or ``"triton"`` and Triton cannot run here.
    """
    if _plain(x, values, pattern, bias, backend):
        plans = prepare(pattern)
        try:
            if _differentiates():
                return apply_linear(x, values, bias, pattern, plans, None)
            return linear_op(x, values, bias, plans[0], plans[1], plans[2], pattern.shape[0])
        except RuntimeError:
            _linear_arguments(x, values, pattern, bias)  # has better words for what the op found wrong
            raise
    x, values, bias, result = _linear_arguments(x, values, pattern, bias, backend)
    runs, outputs = resolve(backend, x.device.type, x.dtype, pattern.blocksize), pattern.shape[0]
    if runs == "dense":
        y = dense.linear(x, values, bias, pattern)
        return y if result is None else y.to(result)
    if runs == "triton":
        plans, tf32 = prepare_triton(pattern), _allow_tf32()
        if _differentiates():
            return Linear.apply(x, values, bias, pattern, plans, tf32)
        return linear_triton_op(x, values, bias, *plans[:3], outputs, tf32)
    plans = prepare(pattern)
    if runs == "reference":
        with torch.autocast(x.device.type, enabled=False):
            y = reference.bsr_linear(x, values, bias, plans.crow_indices, plans.col_indices, plans.forward, outputs)
    elif _differentiates():
        y = Linear.apply(x, values, bias, pattern, plans, None)
    else:
        y = linear_op(x, values, bias, plans.crow_indices, plans.col_indices, plans.forward, outputs)
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
    channels_last: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``F.conv2d`` for the block-sparse weight that ``pattern`` and ``values`` describe.

    The weight [c_out, c_in / groups, kh, kw] is the matrix [c_out, kh * kw * c_in / groups], tap-major: entry
    (o, t * c_in / groups + c) is ``weight[o, c, t // kw, t % kw]``.

    Args:
        x: [n, c_in, h, w] or [c_in, h, w], any strides. The output is channels_last where x is.
        values: [nnz_blocks, bh, bw]; entries that overhang the edge of the matrix are never read.
        pattern: of shape (c_out, kh * kw * c_in / groups).
        bias: [c_out] or None.
        stride, padding, dilation, groups: as in ``F.conv2d``.
        kernel_size: kh and kw, which the matrix alone does not tell.
        channels_last: the output is channels_last in any case, as torch's is for such a weight.
        backend: as in :func:`bsr_linear`, but for "triton": convolutions have no GPU kernels, "auto" is "dense" there.

    Returns:
        [n, c_out, h', w'] or [c_out, h', w'].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        RuntimeError: ``backend="cpu"`` and no kernels are built.
    """
    if type(padding) is not str and _plain(x, values, pattern, bias, backend) and x.dim() == 4:
        conv = _convolution_again(pattern, kernel_size, stride, padding, dilation, groups)
        plans = prepare(pattern, (*conv.kernel_size, groups))
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            channels_last = is_channels_last(x)
        try:
            if _differentiates():
                return apply_conv2d(x, values, bias, pattern, plans, conv, channels_last)
            return conv2d_op(x, values, bias, plans[0], plans[1], plans[2], pattern.shape[0], *conv, channels_last)
        except RuntimeError:
            _conv2d_arguments(x, values, pattern, bias, conv)
            raise
    _check_types(x, values, pattern, bias)
    conv = _convolution(pattern, kernel_size, stride, padding, dilation, groups)
    # The odd one of an even kernel goes to the right and the bottom, as in torch.
    odd = [d * (k - 1) % 2 if padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    x, values, bias, result = _conv2d_arguments(x, values, pattern, bias, conv, odd)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    if any(odd):
        images = F.pad(images, (0, odd[1], 0, odd[0]))
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        channels_last = torch._prims_common.suggest_memory_format(images) == torch.channels_last
    runs = resolve(backend, x.device.type, x.dtype, pattern.blocksize, convolution=True)
    if runs == "dense":
        y = dense.conv2d(images, values, bias, pattern, *conv, channels_last)
        y = y if x.dim() == 4 else y.squeeze(0)
        return y if result is None else y.to(result)
    plans = prepare(pattern, (*conv.kernel_size, groups))
    if runs == "reference":
        crow, col, plan = plans[:3]
        with torch.autocast(x.device.type, enabled=False):
            y = reference.bsr_conv2d(images, values, bias, crow, col, plan, pattern.shape[0], *conv, channels_last)
    elif _differentiates():
        y = Conv2d.apply(images, values, bias, pattern, plans, conv, channels_last)
    else:
        y = conv2d_op(images, values, bias, *plans[:3], pattern.shape[0], *conv, channels_last)
    y = y if x.dim() == 4 else y.squeeze(0)
    return y if result is None else y.to(result)


@constant_in_graphs
def _allow_tf32() -> bool:
    """Torch's setting for products of float32 matrices, whichever of its two interfaces was used."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _arguments(
    x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None, backend: Backend = "auto"
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
    if device.type == "cpu" and backend != "triton" and dtype in (torch.bfloat16, torch.float16):
        # No 16-bit arithmetic on this path: products and sums in float32, one rounding at the end.
        return x.float(), values.float(), None if bias is None else bias.float(), dtype
    if device.type == "cpu" and backend != "triton":
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {dtype}")
    return x, values, bias, None


def _differentiates() -> bool:
    """Whether autograd has to see the call: forward mode, which the Functions refuse, can be on without gradients."""
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def _plain(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None, backend: Backend) -> bool:
    """Whether this is the common case, whose shapes the op itself checks: a small layer's call should cost little.

    float32 or float64 on the CPU, no autocast, not being traced (where ops are not run, and so check nothing).
    """
    try:
        dtype = x.dtype
        return (
            type(pattern) is BlockPattern
            and (dtype is torch.float32 or dtype is torch.float64)
            and values.dtype is dtype
            and x.is_cpu
            and values.is_cpu
            and x.layout is values.layout is torch.strided
            and (bias is None or (bias.dtype is dtype and bias.is_cpu and bias.layout is torch.strided))
            and not ops.CPU_KERNELS_MISSING
            and (backend == "auto" or backend == "cpu")
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not (functorch_is_active and functorch_is_active())
        )
    except AttributeError:  # no tensors: quicker than asking whether they are
        return False


def _linear_arguments(
    x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    _check_types(x, values, pattern, bias)
    inputs = pattern.shape[1]
    if not x.dim() or x.shape[-1] != inputs:
        raise ValueError(
            f"x must have shape [*, {inputs}] for a pattern of shape {pattern.shape}, got {tuple(x.shape)}"
        )
    return _arguments(x, values, pattern, bias, backend)


def _conv2d_arguments(
    x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None, conv: Conv, odd: Sequence[int] = (0, 0)
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    _check_types(x, values, pattern, bias)
    c_in = pattern.shape[1] // (conv.kernel_size[0] * conv.kernel_size[1]) * conv.groups
    if x.dim() not in (3, 4) or x.shape[-3] != c_in:
        raise ValueError(f"x must have shape [n, {c_in}, h, w] or [{c_in}, h, w], got {tuple(x.shape)}")
    height, width = x.shape[-2:]
    if not (height and width):
        raise ValueError(f"x must have pixels, got shape {tuple(x.shape)}")
    size = (height + odd[0], width + odd[1])
    if min(ops.output_size(size, *conv[:4])) < 1:
        raise ValueError(
            f"x is too small: a kernel of {conv.kernel_size} with padding {conv.padding} and dilation {conv.dilation} "
            f"does not fit into {size}"
        )
    return _arguments(x, values, pattern, bias)


def is_channels_last(x: Tensor) -> bool:
    """Whether x, images or a weight, is channels_last: torch's own rule, whose Python form takes 10 us."""
    stride = x.stride()
    if stride[1] * x.shape[1] > stride[3]:  # a pixel's channels reach beyond the next pixel: the rule's first question
        return False
    return torch._prims_common.suggest_memory_format(x) == torch.channels_last


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
) -> Conv:
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
    return Conv(kernel, step, pad, spread, groups)


def _convolution_again(pattern: BlockPattern, *given: Any) -> Conv:
    """``_convolution(pattern, *given)``, looked up where the last call with this pattern gave the very same objects.

    Those of a layer come with every call, and tuples and ints cannot have changed since.
    """
    known: tuple[tuple[Any, ...], Conv] | None = pattern._plans.get("convolution")
    if known is not None and all(map(operator.is_, known[0], given)):
        return known[1]
    conv = _convolution(pattern, *given)
    if all(type(argument) in (tuple, int) for argument in given):
        pattern._plans["convolution"] = (given, conv)
    return conv


def _pair(name: str, value: Size2, minimum: int) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2:  # the usual case first: a call should cost little
        a, b = value
        if type(a) is int and type(b) is int and minimum <= a <= INT32_MAX and minimum <= b <= INT32_MAX:
            return value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(type(n) is int and minimum <= n <= INT32_MAX for n in pair):
        raise ValueError(f"{name} must be an int or two ints of at least {minimum} that fit int32, got {value!r}")
    return pair
