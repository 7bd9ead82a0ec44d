"""The block size of each layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torch import nn

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


def covering(pair: Blocksize, kept: int, rows: int) -> Blocksize:
    """``pair``, or the largest of its divisors of which ``kept`` weights make a block for every block row.

    Every output then has an input, so that paths lead through every layer, whatever is drawn.
    """

    def enough(bh: int, bw: int) -> bool:
        return kept // (bh * bw) >= -(-rows // bh)

    bh, bw = pair
    while (bh, bw) != (1, 1) and not enough(bh, bw):
        bh, bw = bh // _least_factor(bh), bw // _least_factor(bw)
    return bh, bw


def _least_factor(n: int) -> int:
    return next((factor for factor in range(2, n + 1) if n % factor == 0), 1)


def check_blocksize(name: str, pair: object) -> None:
    """Raise TypeError or ValueError unless ``pair`` is a block size (bh, bw)."""
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(n) is int for n in pair):
        raise TypeError(f"{name} must be a tuple of two integers (bh, bw), got {pair!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least 1 in both dimensions, got {pair!r}")
