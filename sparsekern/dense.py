"""``backend="dense"``: torch's own products with a dense weight that the values are written into.

For what dense does faster than the kernels. The layer stays what it is (its Parameter, its pattern, its checkpoints);
only the arithmetic is dense. Gradients come by torch's own rules, of any order: that of the values is read from the
weight's at the stored blocks, and is 0 where a block overhangs the edge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import BlockPattern
from .plan import Kernel


def linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: BlockPattern) -> Tensor:
    """[*, in] -> [*, out], in the dtype of x, which the others have too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight(values, pattern), bias)


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: BlockPattern,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """[n, c_in, h, w] -> [n, c_out, h', w'], in the dtype of x, which the others have too."""
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x, weight(values, pattern, (*kernel_size, groups)), bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def weight(values: Tensor, pattern: BlockPattern, kernel: Kernel | None = None) -> Tensor:
    """The dense weight that ``pattern`` and ``values`` describe; differentiable.

    As ``pattern.scatter``, but in one op on the flat weight: ten times faster for a layer of 1024 x 1024.

    Args:
        values: [nnz_blocks, bh, bw]; entries that overhang the edge do not show.
        pattern: which blocks they are.
        kernel: (kh, kw, groups) of a convolution.

    Returns:
        [out, in], or [c_out, c_in / groups, kh, kw]; contiguous.
    """
    rows, columns = pattern.shape
    flat = values.new_zeros(rows * columns + 1).scatter(0, positions(pattern, kernel), values.reshape(-1))[:-1]
    if kernel is None:
        return flat.view(rows, columns)
    kh, kw, _ = kernel
    return flat.view(rows, columns // (kh * kw), kh, kw)


def positions(pattern: BlockPattern, kernel: Kernel | None = None) -> Tensor:
    """int64 [numel of the values]: where each lies in the flattened weight, or one past its end beyond the edge.

    Worked out once and kept on the pattern.
    """
    index: Tensor | None = pattern._plans.get(("dense", kernel))
    if index is None:
        (rows, columns), (bh, bw), device = pattern.shape, pattern.blocksize, pattern.device
        row = (pattern.block_rows()[:, None] * bh + torch.arange(bh, device=device))[:, :, None]
        column = (pattern._col.long()[:, None] * bw + torch.arange(bw, device=device))[:, None, :]
        taps = 1 if kernel is None else kernel[0] * kernel[1]
        channels = max(columns // taps, 1)
        # The matrix is tap-major, the weight channel-major.
        at = row * columns + column % channels * taps + column // channels
        index = torch.where((row < rows) & (column < columns), at, rows * columns).reshape(-1)
        pattern._plans["dense", kernel] = index
    return index
