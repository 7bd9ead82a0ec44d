"""How much each layer keeps: densities by rule or by one ranking of all weights, exact counts, and whole blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Allocation = Literal["global", "uniform", "erk", "igq"]


def densities(shapes: Mapping[str, tuple[int, ...]], rule: Allocation, density: float) -> dict[str, float]:
    """The density of each layer by a rule that knows only shapes, so that all layers together have ``density``.

    - "uniform": the same everywhere.
    - "erk": Erdős-Rényi-kernel, proportional to sum(shape) / prod(shape), at most 1. Source: Evci et al., "Rigging the
      lottery", ICML 2020, and its code for layers that would exceed 1.
    - "igq": 1 / (F * weights + 1), "ideal gas quotas", with the one F that fits. Source: Vysogorets & Kempe,
      "Connectivity matters: neural network pruning through the lens of effective sparsity", JMLR 2023.

    Args:
        shapes: {layer: shape of its weight in torch's layout}.
        rule: one of the above.
        density: of all weights together, in (0, 1].
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if rule == "uniform":
        return dict.fromkeys(shapes, density)
    total = density * sum(sizes.values())
    if rule == "erk":
        ratios = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
        kept = _filled(lambda scale, name: min(1.0, scale * ratios[name]) * sizes[name], sizes, total)
        return {name: kept[name] / size for name, size in sizes.items()}
    if rule == "igq":
        kept = _filled(lambda scale, name: sizes[name] / (sizes[name] / scale + 1), sizes, total)
        return {name: kept[name] / size for name, size in sizes.items()}
    raise ValueError(f"allocation must be one of {get_args(Allocation)}, or {{layer: density}}, got {rule!r}")


def exact_counts(
    wanted: Mapping[str, float], k: int, floors: Mapping[str, int], ceilings: Mapping[str, int]
) -> dict[str, int]:
    """Whole numbers near ``wanted``, within floors and ceilings, that add up to ``k``.

    What the limits take away or add is shared among the other layers in proportion to what they want; fractions go to
    the largest remainders, the earlier layer winning a tie.

    Raises:
        ValueError: the limits leave no room for ``k``.
    """
    if not sum(floors.values()) <= k <= sum(ceilings.values()):
        raise ValueError(
            f"the limits of the layers leave {sum(floors.values())} to {sum(ceilings.values())} weights, not {k}"
        )

    def of(scale: float, name: str) -> float:
        return min(max(scale * wanted[name], floors[name]), ceilings[name])

    # Zero wants can't be scaled up: a little of everything makes every count between the limits reachable.
    wanted = {name: max(value, 1e-9) for name, value in wanted.items()}
    shares = _filled(of, wanted, k)
    counts = {name: math.floor(share + 1e-9) for name, share in shares.items()}
    by_remainder = sorted(counts, key=lambda name: counts[name] - shares[name])
    while (missing := k - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        for name in by_remainder if step > 0 else reversed(by_remainder):
            if missing and floors[name] <= counts[name] + step <= ceilings[name]:
                counts[name] += step
                missing -= step
    return counts


def _filled(of: Callable[[float, str], float], names: Iterable[str], total: float) -> dict[str, float]:
    """``of(scale, name)``, which rises with the scale, at the least scale at which all names have ``total``."""
    names, low, high = list(names), 0.0, 1.0
    while sum(of(high, name) for name in names) < total and high < 1e30:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if sum(of(middle, name) for name in names) < total:
            low = middle
        else:
            high = middle
    return {name: of(high, name) for name in names}


def top_k(
    scores: Mapping[str, Tensor],
    k: int,
    floors: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Exactly the ``k`` best of all scores together, as bool masks of the same shapes; the earlier entry wins a tie.

    Args:
        scores: {name: float64, any shape}, without NaN.
        k: how many entries to keep, within what the limits leave.
        floors: {name: how many of that tensor's best entries are kept whatever the others score}; 0 where not given.
        ceilings: {name: how many of that tensor's entries can be kept}; all where not given.
    """
    flat = []
    for name, score in scores.items():
        values = score.flatten()
        if ceilings and name in ceilings:
            values = values.masked_fill(~best(values, ceilings[name]), -math.inf)
        flat.append(values.masked_fill(best(values, (floors or {}).get(name, 0)), math.inf))
    parts = best(torch.cat(flat), k).split([values.numel() for values in flat])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def best(scores: Tensor, k: int) -> Tensor:
    """Bool mask of exactly the ``k`` best entries of ``scores``; the earlier entry wins a tie."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    values = scores.flatten()
    threshold = values.kthvalue(values.numel() - k + 1).values
    mask = values > threshold
    ties = (values == threshold).nonzero().flatten()
    mask[ties[: k - int(mask.sum())]] = True
    return mask.view(scores.shape)


def whole_blocks(sizes: Mapping[str, Tensor], targets: Mapping[str, int]) -> dict[str, int]:
    """How many blocks each layer keeps so that it holds its target, and all layers the sum of the targets, closely.

    Every layer gets the blocks that fit its target; what is left over goes, a block at a time, to the layers with the
    largest remainder, while that brings the sum closer. The sum is then within half of the largest block.

    Args:
        sizes: {layer: int64 [blocks]}, weights in each block, in the order in which blocks would be taken.
        targets: {layer: weights to keep}, at most all of them.
    """
    counts, missing, remainders = {}, 0, []
    for name, size in sizes.items():
        held = size.cumsum(0)
        count = int(torch.searchsorted(held, targets[name], right=True))
        left = targets[name] - (int(held[count - 1]) if count else 0)
        counts[name] = count
        missing += left
        if count < size.numel():
            remainders.append((left / int(size[count]), int(size[count]), name))
    for _, size_of_next, name in sorted(remainders, key=lambda entry: -entry[0]):
        if abs(missing - size_of_next) < abs(missing):
            counts[name] += 1
            missing -= size_of_next
    return counts
