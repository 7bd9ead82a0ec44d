"""Approximate isometry: move the kept weights of each layer so that its rows are as orthonormal as the mask allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsekern.eligible import convertible, fitting_layers
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.pattern import BlockPattern
from sparsekern.weights import weight_from_matrix, weight_matrix

Layer = nn.Linear | nn.Conv2d | SparseLinear | SparseConv2d

Mode = Literal["fast", "paper"]

# Steps between two looks at the stop, and the fraction by which they have to lower the norm for more to be taken.
WINDOW, ENOUGH = 25, 1e-3
STEPS: dict[Mode, int] = {"fast": 500, "paper": 10_000}


@dataclass(frozen=True)
class Report:
    """What :func:`approximate_isometry_` did.

    Attributes:
        before, after: the orthogonality score, see :func:`orthogonality_score`.
        steps: {module name: steps taken}, of L-BFGS or of gradient descent.
    """

    before: float
    after: float
    steps: dict[str, int]


@torch.no_grad()
def approximate_isometry_(
    model: nn.Module,
    patterns: Mapping[str, BlockPattern] | None = None,
    *,
    mode: Mode = "fast",
    steps: int | None = None,
    lr: float = 0.1,
) -> Report:
    """Minimise the sum over layers of ‖A Aᵀ − I‖_F over the kept weights A = C⊙W, in place.

    A is [outputs, inputs] in torch's layout, a conv weight flattened to [C_out, C_in*kh*kw], so A Aᵀ is the authors'
    (C⊙W)ᵀ(C⊙W); with groups each group has its own. No data are needed. No layer depends on another, biases do not
    move, and neither do weights outside the patterns.

    "paper" is gradient descent on the norm, not squared, without momentum and without a stop. "fast" is L-BFGS on its
    square, until 25 steps lower the norm by less than a thousandth; it ends lower, in a small fraction of the time. A
    step of either costs two dense products, 4*min(m, n)²*max(m, n) operations for an m x n layer.

    Source: SPP (ICLR 2020), section 5, equation 9; the authors take lr 0.1 and 10,000 steps.

    Args:
        model: a model with sparse layers, or a dense one and the patterns it will get.
        patterns: {module name: BlockPattern} of dense layers; None means the sparse layers of the model.
        mode: "fast" or "paper".
        steps: most steps for a layer; by default 500 ("fast") or the authors' 10,000 ("paper").
        lr: step size of the gradient descent; "fast" has none.

    Raises:
        TypeError: a pattern that is no BlockPattern, steps that are no integer.
        ValueError: an argument out of range, nothing to work on, a pattern that does not fit its layer, weights that
            are not finite or do not stay so. Nothing has changed then.
    """
    if mode not in STEPS:
        raise ValueError(f"mode must be one of {tuple(STEPS)}, got {mode!r}")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    steps = STEPS[mode] if steps is None else steps
    if type(steps) is not int:
        raise TypeError(f"steps must be an integer, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    layers = _pruned_layers(model, patterns)
    results, before, after, taken = {}, 0.0, 0.0, {}
    for name, (layer, pattern) in layers.items():
        matrix, mask = _kept(layer, pattern)
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"layer {name!r} has weights that are not finite")
        groups = _groups(layer)
        before += _norm(matrix, groups)
        if mode == "fast":
            matrix, taken[name] = _lbfgs(matrix, mask, groups, steps)
        else:
            matrix, taken[name] = _descend(matrix, mask, groups, lr, steps), steps
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


@torch.no_grad()
def fan_in_rescale_(model: nn.Module, patterns: Mapping[str, BlockPattern] | None = None) -> None:
    """Scale the kept weights of every output by sqrt(fan-in / kept fan-in), in place: a rival to isometry.

    What flows into an output then has the variance that it had before pruning, if weights were alike; directions are as
    they were. Outputs that keep nothing, and biases, are left. Calling it again scales again.

    Source: Evci et al., "Gradient flow in sparse neural networks and how lottery tickets win", AAAI 2022, who draw
    weights anew by each neuron's own fan-in.

    Args, raises: as :func:`approximate_isometry_`.
    """
    layers = _pruned_layers(model, patterns)
    results = {}
    for name, (layer, pattern) in layers.items():
        matrix, mask = _kept(layer, pattern)
        kept = mask.sum(1, keepdim=True)
        results[name] = matrix * (mask.shape[1] / kept.clamp_min(1).to(matrix.dtype)).sqrt(), mask
        stored = layer.values if isinstance(layer, SparseLinear | SparseConv2d) else layer.weight
        if not bool(results[name][0].to(stored.dtype).isfinite().all()):
            raise ValueError(f"layer {name!r} has weights that are not finite, or would be after scaling")
    for name, (layer, pattern) in layers.items():
        _put(layer, pattern, *results[name])


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
        found = {name: (layer, patterns[name]) for name, layer in fitting_layers(model, patterns).items()}
    if not found:
        raise ValueError("model has no layer to work on")
    return found


def _pruned_layers(
    model: nn.Module, patterns: Mapping[str, BlockPattern] | None
) -> dict[str, tuple[Layer, BlockPattern | None]]:
    """As :func:`_layers`, but a dense model needs patterns."""
    layers = _layers(model, patterns)
    if patterns is None and all(isinstance(layer, nn.Linear | nn.Conv2d) for layer, _ in layers.values()):
        raise ValueError("patterns must be given for a model without sparse layers")
    return layers


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


def _descend(matrix: Tensor, mask: Tensor, groups: int, lr: float, steps: int) -> Tensor:
    """``steps`` steps of gradient descent on the norm from ``matrix`` (kept)."""
    weights, kept = _by_group(matrix.clone(), groups), _by_group(mask, groups)
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(steps):
        gradient, norm = _slope(weights)
        # ∂‖A Aᵀ − I‖/∂A = 2 (A Aᵀ − I) A / ‖A Aᵀ − I‖. It is 0 at a norm of 0.
        weights -= gradient.mul_(2 * lr).div_(norm.clamp_min(tiny)).where(kept, 0)
    return weights.view_as(matrix)


def _lbfgs(matrix: Tensor, mask: Tensor, groups: int, steps: int) -> tuple[Tensor, int]:
    """L-BFGS on ‖A Aᵀ − I‖² / 4 over the kept entries of ``matrix``, and the number of steps taken."""
    weights = _by_group(matrix.clone(), groups)
    kept = _by_group(mask, groups).nonzero(as_tuple=True)
    values = weights[kept].requires_grad_()
    if not values.numel():
        return matrix, 0
    optimizer = torch.optim.LBFGS(
        [values], max_iter=WINDOW, tolerance_grad=0, tolerance_change=0, history_size=10, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def closure() -> float:
        weights[kept] = values
        gradient, norm = _slope(weights)
        values.grad = gradient[kept]
        return float(norm.square() / 4)

    taken, last = 0, math.inf
    while taken < steps:
        optimizer.param_groups[0]["max_iter"] = min(WINDOW, steps - taken)
        optimizer.step(closure)
        taken += optimizer.param_groups[0]["max_iter"]
        weights[kept] = values
        now = float(_residual(weights)[1])
        if not math.isfinite(now) or now == 0 or now > last * (1 - ENOUGH):
            break
        last = now
    return weights.view_as(matrix), taken


def _slope(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(A Aᵀ − I) A, a quarter of the gradient of the norm's square, and the norm, of a batch of matrices A."""
    residual, norm = _residual(weights)
    rows, columns = weights.shape[-2:]
    # A (Aᵀ A − I) is the same product.
    return (residual @ weights if rows <= columns else weights @ residual), norm
