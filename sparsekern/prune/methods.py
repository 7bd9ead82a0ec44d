"""From a dense model to the patterns of its layers: SNIP, random pruning, and the random twin of given patterns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sparsekern.eligible import convertible
from sparsekern.pattern import BlockPattern
from sparsekern.prune.allocation import Blocksize, blocksizes
from sparsekern.prune.patterns import Patterns
from sparsekern.prune.placement import Placement, Rule, cpu_generator, drawn_order, first, place
from sparsekern.prune.scores import Batches, LossFn, connection_sensitivity
from sparsekern.weights import weight_matrix

Biases = Literal["keep", "score"]

log = logging.getLogger("sparsekern")


def snip(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    sparsity: float = 0.9,
    blocksize: Blocksize | Mapping[str, Blocksize] = (8, 8),
    *,
    placement: Placement = "auto",
    biases: Biases = "keep",
    min_blocks: int = 1,
    generator: torch.Generator | None = None,
) -> Patterns:
    """Prune before training by connection sensitivity |w·∂L/∂w|: which blocks of each layer to keep. Changes nothing.

    Source: Lee, Ajanthan & Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019;
    :mod:`sparsekern.prune` shows the authors' own mode.

    With larger blocks a ranking of all blocks together starves small layers. By default each layer therefore gets the
    density that it has when single weights are ranked together, and its blocks are placed within the layer.

    Args:
        model: any model; each nn.Linear and nn.Conv2d that can be sparse gets a pattern. It runs in the mode it is in
            (train or eval) and is left exactly as it was.
        batches: (input, target) pairs, or one such pair, on the model's device. Gradients are summed over them.
        loss_fn: ``loss_fn(model(input), target)`` is a scalar tensor.
        sparsity: fraction to remove, in [0, 1), of the weights of all layers in the result (and of their biases, with
            ``biases="score"``).
        blocksize: (bh, bw), or one per layer; :func:`blocksizes` says where it gives way.
        placement: which blocks of a layer to keep.
            "draw": at random in proportion to their mean score, the same number (±1) from every block row;
            "random": at random, the same number (±1) from every block row;
            "best": those with the best mean score in the layer;
            "auto": "best" in layers with blocks of (1, 1), "draw" in all others;
            "global": those with the best mean score in the model, whatever layer they are in.
        biases: "keep" all; or "score" them like weights, as the authors do (zero biases score 0 and fall): a layer
            whose bias falls is named in ``drop_bias`` of the result.
        min_blocks: blocks that each layer keeps in any case.
        generator: CPU generator for the draws; a fresh one with seed 0 by default.

    Returns:
        {module name: BlockPattern, on the CPU}. With blocks of (1, 1) exactly ``round(n * (1 - sparsity))`` of the
        ``n`` weights (and scored biases) are kept; larger blocks come within half a block of that, and ``achieved``
        says how near.

    Raises:
        ValueError: an argument out of range, a model without layers to prune, no batch, a loss without gradient, scores
            that are not finite, a sparsity that leaves less than ``min_blocks``, or a bias that would fall in part.
        TypeError: an argument, batch or loss of the wrong type.
    """
    if biases not in get_args(Biases):
        raise ValueError(f"biases must be one of {get_args(Biases)}, got {biases!r}")
    rule = Rule(sparsity, placement, min_blocks, cpu_generator(generator))
    layers, pairs = _layers(model), blocksizes(model, blocksize)
    weights, bias_scores = connection_sensitivity(model, layers, batches, loss_fn, biases=biases == "score")
    masks = place(weights, {_bias_key(name): scores for name, scores in bias_scores.items()}, pairs, rule)

    drop_bias = set()
    for name in bias_scores:
        kept, size = int(masks[_bias_key(name)].sum()), masks[_bias_key(name)].numel()
        if 0 < kept < size:
            raise ValueError(f"the bias of layer {name!r} would keep {kept} of {size} entries: layers keep all or none")
        if not kept:
            drop_bias.add(name)
    return _patterns(masks, layers, pairs, sparsity, frozenset(drop_bias))


def random(
    model: nn.Module,
    sparsity: float = 0.9,
    blocksize: Blocksize | Mapping[str, Blocksize] = (8, 8),
    *,
    min_blocks: int = 1,
    generator: torch.Generator | None = None,
) -> Patterns:
    """Blocks at random, the same density in every layer and the same number (±1) from every block row; needs no data.

    Arguments, counts and errors as in :func:`snip`.
    """
    rule = Rule(sparsity, "random", min_blocks, cpu_generator(generator))
    layers, pairs = _layers(model), blocksizes(model, blocksize)
    # Scores spread evenly over (0, 1) in every layer: one threshold for all leaves the same density everywhere.
    even = {}
    for name, layer in layers.items():
        size = layer.weight.numel()
        even[name] = ((torch.arange(size, dtype=torch.float64) + 0.5) / size).view(weight_matrix(layer.weight).shape)
    return _patterns(place(even, {}, pairs, rule), layers, pairs, sparsity)


def shuffle(patterns: Mapping[str, BlockPattern], generator: torch.Generator | None = None) -> Patterns:
    """The random twin of ``patterns``: in every layer as many blocks of the same size, at random places.

    Where all block rows of a layer hold the same number (±1), they do so in the twin. Where blocks overhang the edge,
    the number of weights can differ by what edge blocks lack.

    Source: Frankle et al., "Pruning neural networks at initialization: why are we missing the mark?", ICLR 2021.

    Args:
        patterns: {module name: BlockPattern}.
        generator: CPU generator for the draws; a fresh one with seed 0 by default.
    """
    generator = cpu_generator(generator)
    twins = {}
    for name, pattern in patterns.items():
        per_row = pattern.blocks_per_row()
        if per_row.numel() and int(per_row.max() - per_row.min()) <= 1:
            order = drawn_order(torch.ones(pattern.grid, dtype=torch.float64), generator)
        else:
            order = torch.randperm(math.prod(pattern.grid), generator=generator)
        mask = first(order, pattern.nnz_blocks, pattern.grid)
        twins[name] = BlockPattern.from_mask(mask, pattern.blocksize, pattern.shape).to(pattern.device)
    return Patterns(twins, getattr(patterns, "requested", None), getattr(patterns, "drop_bias", frozenset()))


def _layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers, skipped = convertible(model)
    if not layers:
        why = "".join(f"; {name!r}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"model has no nn.Linear or nn.Conv2d that can be sparse{why}")
    return layers


def _bias_key(name: str) -> str:
    # No module has this name: it is a parameter's.
    return f"{name}.bias"


def _patterns(
    masks: dict[str, Tensor],
    layers: dict[str, nn.Linear | nn.Conv2d],
    pairs: dict[str, Blocksize],
    sparsity: float,
    drop_bias: frozenset[str] = frozenset(),
) -> Patterns:
    patterns = {}
    for name, layer in layers.items():
        rows, columns = weight_matrix(layer.weight).shape
        patterns[name] = BlockPattern.from_mask(masks[name], pairs[name], (rows, columns))
    result = Patterns(patterns, sparsity, drop_bias)
    log.info("%s", result.summary())
    return result
