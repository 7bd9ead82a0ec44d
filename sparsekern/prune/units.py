"""What is kept or removed as one: blocks, whole kernels or whole channels, and their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..pattern import tile
from ..weights import weight_matrix
from .blocksizes import Blocksize

Granularity = Literal["block", "kernel", "channel"]
BlockScore = Literal["mean", "l2", "gate"]


class Units(NamedTuple):
    """The units of one layer as a grid [unit rows, unit columns], and the way back to its blocks."""

    scores: Tensor  # float64
    sizes: Tensor  # int64, weights in each unit
    to_blocks: Callable[[Tensor], Tensor]  # a bool grid of units to one of blocks


def units(
    layer: nn.Linear | nn.Conv2d,
    scores: Tensor,
    blocksize: Blocksize,
    granularity: Granularity = "block",
    block_score: BlockScore = "mean",
) -> Units:
    """Cut a layer into units and score them.

    A block is a unit of its own ("block"); or the blocks of all kernel taps that join the same channels are one
    ("kernel"); or all blocks of a block row ("channel"), so that output channels go whole. What lies beyond the edge of
    the matrix is no weight and counts nowhere.

    Args:
        layer: whose weight it is.
        scores: of the weight's shape.
        blocksize: (bh, bw); within one tap for "kernel".
        granularity: as above.
        block_score: "mean" of the scores; "l2", the root of their mean square; "gate", the size of their mean: with
            signed SNIP scores that is the derivative of one gate for the whole unit.

    Raises:
        ValueError: granularity or block_score unknown; "kernel" with blocks that span taps.
    """
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity must be one of {get_args(Granularity)}, got {granularity!r}")
    if block_score not in get_args(BlockScore):
        raise ValueError(f"block_score must be one of {get_args(BlockScore)}, got {block_score!r}")
    matrix = weight_matrix(scores)
    counts = tile(torch.ones(matrix.shape, dtype=torch.int64), blocksize).sum((2, 3))
    sums = tile(matrix.square() if block_score == "l2" else matrix, blocksize).sum((2, 3))
    rows, columns = counts.shape
    if granularity == "channel":
        parts, to_blocks = 1, lambda kept: kept.expand(rows, columns)
    elif granularity == "kernel" and isinstance(layer, nn.Conv2d):
        taps, per_tap = layer.weight[0, 0].numel(), layer.weight.shape[1]
        if per_tap % blocksize[1]:
            raise ValueError(f"granularity 'kernel' needs blocks within one tap: {blocksize} do not divide {per_tap}")
        parts, to_blocks = columns // taps, lambda kept: kept.repeat(1, taps)
    else:
        parts, to_blocks = columns, lambda kept: kept
    # Columns are tap-major: the blocks of one kernel stand `parts` apart.
    sizes = counts.view(rows, -1, parts).sum(1)
    mean = sums.view(rows, -1, parts).sum(1) / sizes
    return Units(
        mean.sqrt() if block_score == "l2" else mean.abs() if block_score == "gate" else mean, sizes, to_blocks
    )
