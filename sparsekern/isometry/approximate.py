"""Approximate isometry: move the kept weights of each layer so that its rows are as orthonormal as the mask allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.eligible import convertible
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.pattern import BlockPattern
from sparsekern.weights import weight_from_matrix, weight_matrix

Layer = nn.Linear | nn.Conv2d | SparseLinear | SparseConv2d

# Steps between two looks at the stop: one step says little near the floor, where the iterates chatter.
WINDOW = 100


@dataclass(frozen=True)
class Report:
    """What :func:`approximate_isometry_` did.

    Attributes:
        before, after: the orthogonality score, see :func:`orthogonality_score`.
        steps: {module name: steps taken}.
    """

    before: float
    after: float
    steps: dict[str, int]


@torch.no_grad()
def approximate_isometry_(
    model: nn.Module,
    patterns: Mapping[str, BlockPattern] | None = None,
    *,
    lr: float = 0.1,
    steps: int = 10_000,
    tolerance: float | None = None,
) -> Report:
    """Minimise the sum over layers of ‖A Aᵀ − I‖_F over the kept weights A = C⊙W, in place, by gradient descent.

    A is [outputs, inputs] in torch's layout, a conv weight flattened to [C_out, C_in*kh*kw], so A Aᵀ is the authors'
    (C⊙W)ᵀ(C⊙W); with groups each group has its own. The norm is not squared, there is no momentum and no data. No layer
    depends on another, biases do not move, and neither do weights outside the patterns.

    A step costs two dense products, 4*min(m, n)²*max(m, n) operations for an m x n layer. For LeNet-300-100 on two CPU
    cores 10,000 steps take about half a minute; ``tolerance=1e-3`` ends as low in about a sixth of that.

    Source: SPP (ICLR 2020), section 5, equation 9; the authors take lr 0.1 and 10,000 steps.

    Args:
        model: a model with sparse layers, or a dense one and the patterns it will get.
        patterns: {module name: BlockPattern} of dense layers; None means the sparse layers of the model.
        lr: step size of plain gradient descent.
        steps: most steps for a layer.
        tolerance: stop a layer when 100 steps lower its norm by less than this fraction; None never stops.

    Raises:
        TypeError: a pattern that is no BlockPattern.
        ValueError: an argument out of range, nothing to work on, a pattern that does not fit its layer, weights that
            are not finite or do not stay so. Nothing has changed then.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, or None, got {tolerance}")
    layers = _layers(model, patterns)
    if patterns is None and all(isinstance(layer, nn.Linear | nn.Conv2d) for layer, _ in layers.values()):
        raise ValueError("patterns must be given for a model without sparse layers")

    results, before, after, taken = {}, 0.0, 0.0, {}
    for name, (layer, pattern) in layers.items():
        matrix, mask = _kept(layer, pattern)
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"layer {name!r} has weights that are not finite")
        groups = _groups(layer)
        before += _norm(matrix, groups)
        matrix, taken[name] = _descend(matrix, mask, groups, lr, steps, tolerance)
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"layer {name!r} does not stay finite with lr={lr}: lower it")
        after += _norm(matrix, groups)
        results[name] = (matrix, mask)
    for name, (layer, pattern) in layers.items():
        _put(layer, pattern, *results[name])
    return Report(before / len(layers), after / len(layers), taken)


@torch.no_grad()
def orthogonality_score(model: nn.Module, patterns: Mapping[str, BlockPattern] | None = None) -> float:
    """Mean over layers of ‖A Aᵀ − I‖_F with A = C⊙W, as in :func:`approximate_isometry_`; 0 if all are orthogonal.

    Without patterns the sparse layers of the model count, or, where it has none, its dense layers as they are.
    """
    layers = _layers(model, patterns)
    return sum(_norm(_kept(layer, pattern)[0], _groups(layer)) for layer, pattern in layers.values()) / len(layers)


def _layers(
    model: nn.Module, patterns: Mapping[str, BlockPattern] | None
) -> dict[str, tuple[Layer, BlockPattern | None]]:
    """{name: (layer, its pattern)} of what to work on; a dense layer without a pattern is kept whole."""
    found: dict[str, tuple[Layer, BlockPattern | None]] = {}
    if patterns is None:
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear | SparseConv2d):
                found[name] = (module, module.pattern)
        if not found:
            found = {name: (layer, None) for name, layer in convertible(model)[0].items()}
    else:
        dense, reasons = convertible(model)
        for name, pattern in patterns.items():
            if not isinstance(pattern, BlockPattern):
                raise TypeError(f"patterns must hold BlockPattern, got {type(pattern).__name__} for {name!r}")
            if name not in dense:
                raise ValueError(f"patterns names {name!r}: {reasons.get(name, 'no dense layer of the model')}")
            shape = tuple(weight_matrix(dense[name].weight).shape)
            if pattern.shape != shape:
                raise ValueError(f"the pattern of layer {name!r} must have shape {shape}, got {pattern.shape}")
            found[name] = (dense[name], pattern)
    if not found:
        raise ValueError("model has no layer to work on")
    return found


def _groups(layer: Layer) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d | SparseConv2d) else 1


def _kept(layer: Layer, pattern: BlockPattern | None) -> tuple[Tensor, Tensor]:
    """The kept weights as a matrix [rows, columns], 0 elsewhere, at least float32; and which are kept, bool."""
    if isinstance(layer, SparseLinear | SparseConv2d):
        matrix, mask = layer.pattern.scatter(layer.values), layer.pattern.to_element_mask()
    else:
        matrix = weight_matrix(layer.weight)
        mask = torch.ones_like(matrix, dtype=torch.bool)
        if pattern is not None:
            mask = pattern.to(matrix.device).to_element_mask()
        matrix = matrix.where(mask, 0)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32)), mask


def _put(layer: Layer, pattern: BlockPattern | None, matrix: Tensor, mask: Tensor) -> None:
    if isinstance(layer, SparseLinear | SparseConv2d):
        layer.values.copy_(layer.pattern.gather(matrix))
    else:
        weight = weight_matrix(layer.weight)
        layer.weight.copy_(weight_from_matrix(matrix.to(weight.dtype).where(mask, weight), layer.weight.shape))


def _residual(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """G − I of the smaller Gram matrix G of each [rows, columns] in a batch, and ‖A Aᵀ − I‖_F of all together."""
    rows, columns = matrix.shape[-2:]
    gram = matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    # Aᵀ A has the eigenvalues of A Aᵀ but for rows - columns zeros, each of which is 1 away from the identity.
    lacking = len(matrix) * max(rows - columns, 0)
    return gram, (gram.square().sum() + lacking).sqrt()


def _by_group(matrix: Tensor, groups: int) -> Tensor:
    return matrix.view(groups, len(matrix) // groups, matrix.shape[1])


def _norm(matrix: Tensor, groups: int) -> float:
    return float(_residual(_by_group(matrix, groups))[1])


def _descend(
    matrix: Tensor, mask: Tensor, groups: int, lr: float, steps: int, tolerance: float | None
) -> tuple[Tensor, int]:
    """Gradient descent on the norm from ``matrix`` (kept), and the number of steps taken."""
    weights, kept = _by_group(matrix.clone(), groups), _by_group(mask, groups)
    tiny = torch.finfo(matrix.dtype).tiny
    last = math.inf
    for step in range(steps):
        residual, norm = _residual(weights)
        if step % WINDOW == 0:
            now = float(norm)
            if now == 0 or not math.isfinite(now) or (tolerance is not None and now > last * (1 - tolerance)):
                return weights.view_as(matrix), step
            last = now
        rows, columns = weights.shape[-2:]
        gradient = residual @ weights if rows <= columns else weights @ residual
        # ∂‖A Aᵀ − I‖/∂A = 2 (A Aᵀ − I) A / ‖A Aᵀ − I‖, and A (Aᵀ A − I) is the same product. It is 0 at a norm of 0.
        weights -= gradient.mul_(2 * lr).div_(norm.clamp_min(tiny)).where(kept, 0)
    return weights.view_as(matrix), steps
