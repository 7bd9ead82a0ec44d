"""How much each layer keeps: its block size, its share of the kept weights, and that share in whole blocks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekern.eligible import convertible
from sparsekern.weights import weight_matrix

Blocksize = tuple[int, int]

# Fewer blocks than this across a layer leave no choice of what to keep.
MIN_GRID = 4

log = logging.getLogger("sparsekern")


def blocksizes(model: nn.Module, blocksize: Blocksize | Mapping[str, Blocksize]) -> dict[str, Blocksize]:
    """The block size (bh, bw) of every layer that can be sparse, {module name: (bh, bw)} in module order.

    One block size for all is adjusted, and the adjustment logged: a convolution's blocks stay within one kernel tap and
    one group (bw becomes gcd(bw, C_in/groups), with groups also bh gcd(bh, C_out/groups)), and (1, 1) goes to the
    classifier (the model's last Linear or Conv2d) and to layers with fewer than 4 block rows or columns.

    A dictionary is taken at its word for the layers that it names; all others get (1, 1).

    Raises:
        ValueError: a block size below 1, or a dictionary that names what cannot be sparse.
        TypeError: a block size that is no pair of integers.
    """
    layers, skipped = convertible(model)
    if isinstance(blocksize, Mapping):
        for name, pair in blocksize.items():
            if name not in layers:
                raise ValueError(f"blocksize names {name!r}: {skipped.get(name, 'no Linear or Conv2d of the model')}")
            check_blocksize(f"blocksize[{name!r}]", pair)
        return {name: blocksize.get(name, (1, 1)) for name in layers}
    check_blocksize("blocksize", blocksize)
    candidates = [name for name, _ in model.named_modules() if name in layers or name in skipped]
    return {name: _adjusted(name, layer, blocksize, name == candidates[-1]) for name, layer in layers.items()}


def _adjusted(name: str, layer: nn.Linear | nn.Conv2d, blocksize: Blocksize, classifier: bool) -> Blocksize:
    bh, bw = blocksize
    if isinstance(layer, nn.Conv2d):
        bw = math.gcd(bw, layer.in_channels // layer.groups)
        if layer.groups > 1:
            bh = math.gcd(bh, layer.out_channels // layer.groups)
    rows, columns = weight_matrix(layer.weight).shape
    if classifier or -(-rows // bh) < MIN_GRID or -(-columns // bw) < MIN_GRID:
        bh = bw = 1
    if (bh, bw) != blocksize:
        log.info("layer %r, %d x %d, gets blocks of %s instead of %s", name, rows, columns, (bh, bw), blocksize)
    return bh, bw


def check_blocksize(name: str, pair: object) -> None:
    """Raise TypeError or ValueError unless ``pair`` is a block size (bh, bw)."""
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(n) is int for n in pair):
        raise TypeError(f"{name} must be a tuple of two integers (bh, bw), got {pair!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least 1 in both dimensions, got {pair!r}")


def top_k(scores: Mapping[str, Tensor], k: int, floors: Mapping[str, int]) -> dict[str, Tensor]:
    """Exactly the ``k`` best of all scores together, as bool masks of the same shapes; the earlier entry wins a tie.

    Args:
        scores: {name: float64, any shape}, without NaN.
        k: how many entries to keep, at least the sum of the floors, at most as many as there are.
        floors: {name: how many of that tensor's best entries are kept whatever the others score}; 0 where not given.
    """
    flat = []
    for name, score in scores.items():
        values = score.flatten()
        flat.append(values.masked_fill(best(values, floors.get(name, 0)), math.inf))
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
