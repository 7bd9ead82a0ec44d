"""The arguments of pruning, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import get_args

import torch
from torch import Tensor, nn

from .allocation import Allocation
from .placement import Balance, Placement
from .scores.gradients import Scores, parameter_name, prunable

Layers = dict[str, nn.Linear | nn.Conv2d]


def chosen_layers(model: nn.Module, exclude: Sequence[str | type[nn.Module]]) -> Layers:
    if isinstance(exclude, str) or not isinstance(exclude, Sequence):
        raise TypeError(f"exclude must be a sequence of names and types, got {exclude!r}")
    layers, skipped = prunable(model)
    for entry in exclude:
        if isinstance(entry, str) and entry not in layers:
            raise ValueError(f"exclude names {entry!r}: {skipped.get(entry, 'no Linear or Conv2d of the model')}")
        if not isinstance(entry, str | type):
            raise TypeError(f"exclude must hold names and types, got {entry!r}")
    types = tuple(entry for entry in exclude if isinstance(entry, type))
    left = {name: layer for name, layer in layers.items() if name not in exclude and not isinstance(layer, types)}
    if not left:
        raise ValueError(f"exclude must leave a layer to prune, but names all {len(layers)}")
    return left


def checked_scores(layers: Layers, scores: Scores) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({layer: scores of its weight}, {name of a bias: its scores}), float64 on the CPU."""
    weights, biases = {}, {}
    for name, layer in layers.items():
        key = parameter_name(name, "weight")
        if key not in scores:
            raise ValueError(f"scores must hold {key!r}; they hold {', '.join(map(repr, scores)) or 'nothing'}")
        weights[name] = _finite(key, scores[key], layer.weight)
        key = parameter_name(name, "bias")
        if key in scores and layer.bias is not None:
            biases[key] = _finite(key, scores[key], layer.bias)
    # Of all layers, these or not: where the others are kept whole, one whose weights are worth nothing can be left.
    if not any(bool(score.any()) for score in scores.values() if isinstance(score, Tensor)):
        raise ValueError("scores must not all be zero: does the loss depend on the data, and the data on anything?")
    return weights, biases


def _finite(name: str, score: Tensor, like: Tensor) -> Tensor:
    if not isinstance(score, Tensor) or score.shape != like.shape:
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"scores[{name!r}] must have shape {tuple(like.shape)}, got {found}")
    score = score.detach().to("cpu", torch.float64)
    if not bool(score.isfinite().all()):
        raise ValueError(f"{name!r} has scores that are not finite: check loss, data and weights")
    return score


def all_named(allocation: Mapping[str, float], layers: Layers) -> dict[str, float]:
    if set(allocation) != set(layers):
        wrong = ", ".join(sorted(set(allocation) ^ set(layers)))
        raise ValueError(f"allocation must give a density for every layer and no other; missing or unknown: {wrong}")
    for name, density in allocation.items():
        if not isinstance(density, Real):
            raise TypeError(f"allocation[{name!r}] must be a density in [0, 1], got {type(density).__name__}")
        if not 0 <= density <= 1:
            raise ValueError(f"allocation[{name!r}] must be a density in [0, 1], got {density}")
    return dict(allocation)


def check_rules(
    sparsity: float | None,
    allocation: Allocation | Mapping[str, float],
    placement: Placement,
    balance: Balance,
    min_blocks: int,
    min_density: float,
    max_density: float,
) -> None:
    if isinstance(allocation, Mapping) != (sparsity is None):
        raise ValueError("sparsity must be None where allocation gives densities, and a number where it does not")
    if sparsity is not None:
        if not isinstance(sparsity, Real):
            raise TypeError(f"sparsity must be a number, got {type(sparsity).__name__}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be the fraction to remove, in [0, 1), got {sparsity}")
    chosen: tuple[tuple[str, object, tuple[str, ...]], ...] = (
        ("placement", placement, get_args(Placement)),
        ("balance", balance, get_args(Balance)),
    )
    for name, value, allowed in chosen:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if not isinstance(allocation, Mapping) and allocation not in get_args(Allocation):
        raise ValueError(f"allocation must be one of {get_args(Allocation)}, or {{layer: density}}, got {allocation!r}")
    if placement == "global" and allocation != "global":
        raise ValueError(f"placement 'global' needs allocation 'global', got {allocation!r}")
    for name, limit in (("min_density", min_density), ("max_density", max_density)):
        if not isinstance(limit, Real):
            raise TypeError(f"{name} must be one number for all layers, got {type(limit).__name__}")
    if placement == "global" and (min_density, max_density) != (0, 1):
        raise ValueError(
            f"min_density and max_density cannot be given with placement 'global', got {min_density}, {max_density}"
        )
    if type(min_blocks) is not int:
        raise TypeError(f"min_blocks must be an integer, got {type(min_blocks).__name__}")
    if min_blocks < 0:
        raise ValueError(f"min_blocks must not be negative, got {min_blocks}")
    if not 0 <= min_density <= max_density <= 1:
        raise ValueError(
            f"min_density and max_density must be in [0, 1] and in order, got {min_density}, {max_density}"
        )
