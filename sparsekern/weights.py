"""The one matrix view of a layer's weight, shared by pruning, layers, checkpoints and kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def weight_matrix(weight: Tensor) -> Tensor:
    """The weight of a Linear or Conv2d as a matrix, one row per output.

    Args:
        weight: [out, in], returned as it is, or [C_out, C_in/groups, kh, kw].

    Returns:
        [C_out, kh*kw*C_in/groups], tap-major: element (o, t*C_in/groups + c) is ``weight[o, c, t//kw, t%kw]``.
        Differentiable; a view where the strides of ``weight`` allow one.

    Raises:
        ValueError: ``weight`` is neither 2-D nor 4-D.
    """
    if weight.dim() == 2:
        return weight
    if weight.dim() != 4:
        raise ValueError(f"weight must be 2-D (linear) or 4-D (conv2d), got shape {tuple(weight.shape)}")
    return weight.permute(0, 2, 3, 1).flatten(1)


def weight_from_matrix(matrix: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`weight_matrix`: ``matrix`` [rows, columns] as a contiguous weight of shape ``weight_shape``.

    Raises:
        ValueError: ``weight_shape`` is neither 2-D nor 4-D, or ``matrix`` has not the shape of its matrix.
    """
    if len(weight_shape) not in (2, 4):
        raise ValueError(f"weight_shape must have 2 or 4 entries, got {tuple(weight_shape)}")
    rows, per_group, *kernel = weight_shape
    columns = per_group * math.prod(kernel)
    if tuple(matrix.shape) != (rows, columns):
        raise ValueError(
            f"matrix must be {(rows, columns)} for weight_shape {tuple(weight_shape)}, got {tuple(matrix.shape)}"
        )
    if not kernel:
        return matrix.contiguous()
    return matrix.reshape(rows, *kernel, per_group).permute(0, 3, 1, 2).contiguous()
