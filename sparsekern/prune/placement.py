"""Where the kept blocks stand: orders in which blocks are taken, and the masks that follow from scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsekern.prune.allocation import Blocksize, best, top_k, whole_blocks
from sparsekern.prune.scores import block_means

Placement = Literal["auto", "global", "best", "draw", "random"]


@dataclass(frozen=True)
class Rule:
    """How much to keep and how to place it; the arguments of the pruning methods, checked."""

    sparsity: float
    placement: Placement
    min_blocks: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real):
            raise TypeError(f"sparsity must be a number, got {type(self.sparsity).__name__}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be the fraction to remove, in [0, 1), got {self.sparsity}")
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement must be one of {get_args(Placement)}, got {self.placement!r}")
        if type(self.min_blocks) is not int:
            raise TypeError(f"min_blocks must be an integer, got {type(self.min_blocks).__name__}")
        if self.min_blocks < 0:
            raise ValueError(f"min_blocks must not be negative, got {self.min_blocks}")


def place(
    weights: dict[str, Tensor], biases: dict[str, Tensor], blocksizes: dict[str, Blocksize], rule: Rule
) -> dict[str, Tensor]:
    """Bool masks of what is kept: a grid of blocks for each matrix of ``weights``, entries for each of ``biases``.

    Args:
        weights: {layer: scores [rows, columns]}, float64 on the CPU, not negative.
        biases: {key, none of which is a layer: scores [rows]}, ranked together with the weights.
        blocksizes: {layer: (bh, bw)}.
        rule: how much to keep and how.

    Raises:
        ValueError: the sparsity leaves less than ``min_blocks`` in every layer.
    """
    kept = round(sum(scores.numel() for scores in (weights | biases).values()) * (1 - rule.sparsity))
    floors = {name: min(rule.min_blocks * math.prod(blocksizes[name]), s.numel()) for name, s in weights.items()}
    if sum(floors.values()) > kept:
        raise ValueError(
            f"sparsity {rule.sparsity} leaves {kept} weights, but min_blocks={rule.min_blocks} in each of "
            f"{len(weights)} layers needs {sum(floors.values())}: lower one of them"
        )
    if rule.placement == "global":
        return _globally(weights, biases, blocksizes, rule.min_blocks, kept)

    # A floor in single weights is enough for as many whole blocks, so the targets need no correction for it.
    masks = top_k(weights | biases, kept, floors)
    orders, sizes = {}, {}
    for name, scores in weights.items():
        if blocksizes[name] == (1, 1) and rule.placement in ("auto", "best"):
            continue  # the ranking of single weights has placed them
        means, entries = block_means(scores, blocksizes[name])
        if rule.placement == "best":
            orders[name] = best_order(means)
        else:
            likely = torch.ones_like(means) if rule.placement == "random" else means
            orders[name] = drawn_order(likely, rule.generator)
        sizes[name] = entries
    targets = {name: int(masks[name].sum()) for name in orders}
    counts = whole_blocks({name: sizes[name].flatten()[order] for name, order in orders.items()}, targets)
    return masks | {name: first(order, counts[name], sizes[name].shape) for name, order in orders.items()}


def _globally(
    weights: dict[str, Tensor], biases: dict[str, Tensor], blocksizes: dict[str, Blocksize], min_blocks: int, kept: int
) -> dict[str, Tensor]:
    """The blocks of all layers, and the entries of biases, ranked together by their mean score."""
    means, sizes = {}, {}
    for name, scores in weights.items():
        means[name], sizes[name] = block_means(scores, blocksizes[name])
        means[name][best(means[name], min(min_blocks, means[name].numel()))] = math.inf
    for name, scores in biases.items():
        means[name], sizes[name] = scores, torch.ones_like(scores, dtype=torch.int64)
    order = best_order(torch.cat([mean.flatten() for mean in means.values()]))
    entries = torch.cat([size.flatten() for size in sizes.values()])
    mask = first(order, whole_blocks({"all": entries[order]}, {"all": kept})["all"], entries.shape)
    parts = mask.split([size.numel() for size in sizes.values()])
    return {name: part.view(size.shape) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def best_order(scores: Tensor) -> Tensor:
    """Indices into the flattened ``scores``, best first; the earlier one wins a tie. int64 [blocks]."""
    return scores.flatten().sort(descending=True, stable=True).indices


def drawn_order(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Blocks in random order, in proportion to their score, and the same number from every block row.

    Within a row, blocks are drawn without replacement with probabilities proportional to their scores, those of score 0
    last. Rows take turns, so in any prefix of the order their counts differ by at most one.

    Source: sorting by log score + Gumbel noise draws without replacement (Vieira, "Gumbel-max trick and weighted
    reservoir sampling", 2014).

    Args:
        scores: float64 on the CPU, [block_rows, block_cols], not negative.
        generator: a CPU generator; one number per block is taken from it.

    Returns:
        int64 [blocks], indices into the flattened grid.
    """
    # torch.rand, unlike torch.exponential_, gives the same numbers on every CPU.
    noise = -torch.rand(scores.shape, dtype=torch.float64, generator=generator).log_().neg_().log_()
    keys = scores.clamp_min(torch.finfo(torch.float64).tiny).log() + noise
    turns = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    by_key = best_order(keys)
    return by_key[turns.flatten()[by_key].argsort(stable=True)]


def first(order: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """The first ``count`` entries of ``order`` as a bool mask of ``shape``."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(shape)


def cpu_generator(generator: torch.Generator | None) -> torch.Generator:
    """``generator``, or a fresh one with seed 0; always on the CPU, so that all devices and ranks draw the same."""
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, so that every device draws the same, got {generator.device}")
    return generator
