"""From scores to patterns: how much each layer keeps and where, by the rules in :class:`Selection`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from ..pattern import BlockPattern
from ..weights import weight_matrix
from .allocation import Allocation, best, densities, exact_counts, top_k, whole_blocks
from .arguments import all_named, check_rules, checked_scores, chosen_layers
from .blocksizes import Blocksize, blocksizes, covering
from .patterns import Patterns
from .placement import Balance, Placement, best_order, cpu_generator, drawn_order, first
from .scores.gradients import Scores
from .units import BlockScore, Granularity, Units, units

log = logging.getLogger("sparsekern")


class Selection(TypedDict, total=False):
    """Keyword arguments that all pruning methods share; :func:`from_scores` explains them."""

    allocation: Allocation | Mapping[str, float]
    placement: Placement
    balance: Balance
    granularity: Granularity
    block_score: BlockScore
    min_blocks: int
    min_density: float
    max_density: float
    exclude: Sequence[str | type[nn.Module]]
    generator: torch.Generator | None


def from_scores(
    model: nn.Module,
    scores: Scores,
    sparsity: float | None = 0.9,
    blocksize: Blocksize | Mapping[str, Blocksize] = (8, 8),
    *,
    allocation: Allocation | Mapping[str, float] = "global",
    placement: Placement = "auto",
    balance: Balance = "auto",
    granularity: Granularity = "block",
    block_score: BlockScore = "mean",
    min_blocks: int = 1,
    min_density: float = 0.0,
    max_density: float = 1.0,
    exclude: Sequence[str | type[nn.Module]] = (),
    generator: torch.Generator | None = None,
) -> Patterns:
    """Which blocks of each layer to keep, by any scores. Changes nothing.

    First each layer gets its number of weights (``allocation``), then blocks are placed within it (``placement``).

    Args:
        model: dense; each nn.Linear and nn.Conv2d that can be sparse gets a pattern, unless excluded.
        scores: {parameter name: scores of its shape}, higher is better, at least for the weights of those layers; those
            of biases count, too, and a layer all of whose bias falls is named in ``drop_bias`` of the result.
        sparsity: fraction to remove, in [0, 1), of the weights of all layers in the result (and of the biases scored);
            None where ``allocation`` says it all.
        blocksize: (bh, bw), or one per layer; :func:`blocksizes` says where it gives way.
        allocation: "global": as many weights as a layer has among the best of all, ranked together one by one;
            "uniform", "erk", "igq": :func:`~sparsekern.prune.allocation.densities`; or {layer: density} for all layers,
            such as ``{name: p.density for name, p in patterns.items()}`` from another method; where a limit raises or
            lowers one of them, the others stay.
        placement: which blocks of a layer to keep.
            "draw": at random in proportion to their score (those of score 0 or less last);
            "random": at random;
            "best": those with the best score in the layer;
            "auto": "best" where single weights are asked for, or whole channels, "draw" in all others, layers where
            blocks give way to single weights among them. Where a layer would keep fewer blocks than it has block rows,
            so that outputs had none, its blocks are made smaller (a ``blocksize`` by name is taken at its word);
            "global": those with the best score in the model, whatever layer they are in; only for allocation "global".
        balance: of "draw" and "random": the same number (±1) of blocks in every block "rows", in "both" rows and
            columns (columns as far as that can be), or "none"; "auto" is "both", but "rows" where single weights are
            asked for, where it makes little difference and many draws take long.
        granularity: "block"; "kernel" (the blocks of all taps that join the same channels go together); "channel"
            (block rows go whole; exclude the last layer, whose rows are the classes).
        block_score: of several weights: their "mean"; "l2", the root of their mean square; "gate", the size of the mean
            of signed scores.
        min_blocks: blocks that each layer keeps in any case.
        min_density, max_density: of every layer, in [0, 1]; not with placement "global".
        exclude: layers to leave dense, by name or by type; they do not count.
        generator: CPU generator for the draws; a fresh one with seed 0 by default.

    Returns:
        {module name: BlockPattern, on the CPU}. With units of single weights exactly ``round(n * (1 - sparsity))`` of
        the ``n`` weights (and scored biases) are kept; larger ones come within half a unit of that, and ``achieved``
        says how near.

    Raises:
        ValueError: an argument out of range, a model without layers to prune, scores that are missing, of another shape
            or not finite, limits that leave no room, or a bias that would fall in part.
        TypeError: an argument of the wrong type.
    """
    check_rules(sparsity, allocation, placement, balance, min_blocks, min_density, max_density)
    generator = cpu_generator(generator)
    layers = chosen_layers(model, exclude)
    pairs = blocksizes(model, blocksize)
    weights, biases = checked_scores(layers, scores)
    if biases and allocation != "global":
        raise ValueError(
            f"scores of biases need allocation 'global', where they compete with weights, got {allocation!r}"
        )
    grids = {n: units(layer, weights[n], pairs[n], granularity, block_score) for n, layer in layers.items()}

    # Single weights are ranked by their size where blocks are scored by signed gates.
    flat = {n: s.abs() if block_score == "gate" else s for n, s in (weights | biases).items()}
    floors, ceilings = {}, {}
    for name, grid in grids.items():
        size = weights[name].numel()
        # A floor in single weights is enough for as many whole units, so the targets need no correction for it.
        floors[name] = max(min(min_blocks * int(grid.sizes.max()), size), math.ceil(min_density * size - 1e-9))
        ceilings[name] = max(math.floor(max_density * size + 1e-9), floors[name])
    total = sum(score.numel() for score in flat.values())
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    given = all_named(allocation, layers) if isinstance(allocation, Mapping) else {}
    if sparsity is None:
        asked = {name: round(density * weights[name].numel()) for name, density in given.items()}
        kept = sum(min(max(size, floors[name]), ceilings[name]) for name, size in asked.items())
    else:
        kept = round(total * (1 - sparsity))
    if sum(floors.values()) > kept:
        raise ValueError(
            f"sparsity {sparsity} leaves {kept} weights, but min_blocks={min_blocks} and min_density={min_density} in "
            f"each of {len(layers)} layers need {sum(floors.values())}: lower one of the three"
        )
    room = sum(ceilings.values()) + sum(score.numel() for score in biases.values())
    if kept > room:
        raise ValueError(f"sparsity {sparsity} leaves {kept} weights, but max_density={max_density} allows {room}")

    if placement == "global":
        masks, bias_masks = _globally(grids, {name: flat[name] for name in biases}, min_blocks, kept)
    else:
        ranked = top_k(flat, kept, floors, ceilings) if allocation == "global" else {}
        if allocation == "global":
            targets = {name: int(ranked[name].sum()) for name in layers}
        else:
            wanted = given
            if isinstance(allocation, str):
                wanted = densities(shapes, allocation, kept / sum(map(math.prod, shapes.values())))
            sizes = {name: wanted[name] * math.prod(shape) for name, shape in shapes.items()}
            targets = exact_counts(sizes, kept, floors, ceilings)
        bias_masks = {name: ranked[name] for name in biases}
        if placement == "auto" and granularity == "block" and not isinstance(blocksize, Mapping):
            for name, layer in layers.items():
                pair = covering(pairs[name], targets[name], layer.weight.shape[0])
                if pair != pairs[name]:
                    log.info("layer %r gets blocks of %s, not %s, to reach every output", name, pair, pairs[name])
                    pairs[name], grids[name] = pair, units(layer, weights[name], pair, granularity, block_score)
        single = {name for name in layers if _asked(blocksize, name) == (1, 1) and int(grids[name].sizes.max()) == 1}
        ranked_layers = set(layers) if granularity == "channel" else single
        masks = _within_layers(grids, targets, placement, balance, ranked_layers, generator)
    drop_bias = _fallen(bias_masks)
    patterns = {}
    for name, layer in layers.items():
        rows, columns = weight_matrix(layer.weight).shape
        patterns[name] = BlockPattern.from_mask(grids[name].to_blocks(masks[name]), pairs[name], (rows, columns))
    result = Patterns(patterns, sparsity, drop_bias)
    log.info("%s", result.summary())
    return result


def _asked(blocksize: Blocksize | Mapping[str, Blocksize], name: str) -> Blocksize:
    return blocksize.get(name, (1, 1)) if isinstance(blocksize, Mapping) else blocksize


def _within_layers(
    grids: Mapping[str, Units],
    targets: Mapping[str, int],
    placement: Placement,
    balance: Balance,
    ranked: set[str],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Masks over units; "auto" takes the best in the layers ``ranked``, and draws in the others."""
    orders = {}
    for name, grid in grids.items():
        if placement == "best" or (placement == "auto" and name in ranked):
            orders[name] = best_order(grid.scores)
        else:
            likely = torch.ones_like(grid.scores) if placement == "random" else grid.scores
            limit = targets[name] // int(grid.sizes.min()) + 1
            evenly = balance if balance != "auto" else "rows" if name in ranked else "both"
            orders[name] = drawn_order(likely, generator, evenly, limit)
    counts = whole_blocks({name: grids[name].sizes.flatten()[order] for name, order in orders.items()}, targets)
    return {name: first(order, counts[name], tuple(grids[name].sizes.shape)) for name, order in orders.items()}


def _globally(
    grids: Mapping[str, Units], biases: Mapping[str, Tensor], min_blocks: int, kept: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The units of all layers, and the entries of biases, ranked together by their score."""
    ranked, sizes = {}, {}
    for name, grid in grids.items():
        floor = best(grid.scores, min(min_blocks, grid.scores.numel()))
        ranked[name], sizes[name] = grid.scores.masked_fill(floor, math.inf), grid.sizes
    for name, scores in biases.items():
        ranked[name], sizes[name] = scores, torch.ones_like(scores, dtype=torch.int64)
    order = best_order(torch.cat([scores.flatten() for scores in ranked.values()]))
    entries = torch.cat([size.flatten() for size in sizes.values()])
    mask = first(order, whole_blocks({"all": entries[order]}, {"all": kept})["all"], tuple(entries.shape))
    parts = mask.split([size.numel() for size in sizes.values()])
    masks = {name: part.view(size.shape) for (name, size), part in zip(sizes.items(), parts, strict=True)}
    return {name: masks[name] for name in grids}, {name: masks[name] for name in biases}


def _fallen(bias_masks: Mapping[str, Tensor]) -> frozenset[str]:
    """Layers whose bias is not kept; none may be kept in part."""
    for name, mask in bias_masks.items():
        if bool(mask.any()) and not bool(mask.all()):
            raise ValueError(
                f"the bias of layer {_layer_of(name)!r} would keep {int(mask.sum())} of {mask.numel()} entries: layers "
                "keep all or none. The authors begin with biases of 0, which all fall; or give biases='keep'"
            )
    return frozenset(_layer_of(name) for name, mask in bias_masks.items() if not bool(mask.any()))


def _layer_of(bias: str) -> str:
    return bias.removesuffix("bias").removesuffix(".")
