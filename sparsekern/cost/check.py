"""Whether predictions come true: :func:`check` times a sample of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..prune.blocksizes import Blocksize
from .advise import LayerAdvice
from .layers import sparse_layer, timed_calls
from .table import Table, current
from .timer import time_calls

SAMPLE = 24
ROUNDS, SAMPLE_SECONDS, LIMIT_SECONDS = 7, 0.004, 3.0


class Checked(NamedTuple):
    """A layer, dense and sparse, in milliseconds: predicted, and measured in turns.

    What is measured is scaled to the speed that the machine had when it was calibrated, by ``timer.py``'s yardstick.
    """

    name: str
    blocksize: Blocksize
    sparsity: float
    dense_predicted: float
    dense_measured: float
    sparse_predicted: float
    sparse_measured: float


def check(
    model: nn.Module, rows: Sequence[LayerAdvice], table: Table | None = None, sample: int = SAMPLE, seed: int = 0
) -> Iterator[Checked]:
    """Time some of what :func:`sparsekern.advise` has predicted, on one thread, dense beside sparse.

    Args:
        model: what ``rows`` are about.
        rows: by ``advise``.
        table: the coefficients that ``advise`` had.
        sample: how many pairs of a layer and a pattern to draw at most. Patterns are random.
        seed: of the drawing.
    """
    table = table or current()
    pairs = {
        (row.name, blocksize, sparsity): call
        for row in rows
        for call in row.calls[:1]
        for asked, blocksize in row.blocksizes.items()
        for sparsity in row.sparse_ms[asked]
    }
    drawn = sorted(random.Random(seed).sample(list(pairs), min(sample, len(pairs))), key=list(pairs).index)
    generator = torch.Generator().manual_seed(seed)
    for name, blocksize, sparsity in drawn:
        call, dense = pairs[name, blocksize, sparsity], model.get_submodule(name)
        assert isinstance(dense, (nn.Linear, nn.Conv2d))
        sparse = sparse_layer(dense, blocksize, 1 - sparsity, generator)
        x = torch.randn(call.input, generator=generator)
        calls = {kind: timed_calls(layer, x)[call.products] for kind, layer in (("dense", dense), ("sparse", sparse))}
        times = time_calls(
            calls, rounds=ROUNDS, sample_seconds=SAMPLE_SECONDS, limit_seconds=LIMIT_SECONDS
        )  # fmt: skip
        measured = {kind: 1e3 * table.yardstick * time for kind, time in times.ratios.items()}
        predicted = table.predict(call.work.dense(call.products))
        of_sparse = table.predict(call.work.sparse(blocksize, sparse.pattern.density, call.products))
        yield Checked(
            name, blocksize, sparsity, 1e3 * predicted, measured["dense"],
            1e3 * of_sparse, measured["sparse"],
        )  # fmt: skip


def errors(checked: Sequence[Checked]) -> dict[str, tuple[float, float]]:
    """Median and 90th percentile of |predicted / measured - 1|: {"dense", "sparse", "speed-up": (median, p90)}."""
    pairs = {
        "dense": [(c.dense_predicted, c.dense_measured) for c in checked],
        "sparse": [(c.sparse_predicted, c.sparse_measured) for c in checked],
        "speed-up": [(c.dense_predicted / c.sparse_predicted, c.dense_measured / c.sparse_measured) for c in checked],
    }
    found = {}
    for name, values in pairs.items():
        off = [abs(predicted / measured - 1) for predicted, measured in values]
        found[name] = (float(np.median(off)), float(np.quantile(off, 0.9)))
    return found
