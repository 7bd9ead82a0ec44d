"""Measuring what the model needs to know of this machine: :func:`calibrate`.

A fixed set of small layers is timed on one thread, dense and with a few patterns each, forward and backward. None of
them is a layer of :mod:`sparsekern.models` or of the benchmark: what is predicted for those is a prediction.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import SparseLayer
from .fit import Measurement, fit
from .layers import sparse_layer, timed_calls, work_of
from .model import PRODUCTS, Terms
from .table import Table, machine
from .timer import Call, time_calls

# (outputs, inputs, rows)
LINEAR = (
    (10, 240, 96), (12, 56, 320), (24, 1400, 40), (40, 40, 64), (56, 360, 160), (72, 144, 24), (120, 48, 480),
    (144, 560, 112), (176, 88, 16), (240, 240, 240), (280, 640, 48), (360, 176, 80), (400, 336, 448), (480, 900, 20),
    (600, 280, 200), (640, 1000, 192), (960, 72, 160), (1120, 440, 32),
)  # fmt: skip
# (c_in, c_out, kernel, side, images, stride); a kernel of 3 is padded by 1
CONV = (
    (1, 24, 5, 28, 48, 1), (1, 40, 3, 20, 96, 1), (3, 32, 3, 32, 24, 1), (3, 20, 5, 24, 64, 1), (4, 48, 3, 30, 24, 2),
    (6, 28, 5, 16, 96, 1), (8, 40, 3, 18, 48, 1), (12, 72, 1, 20, 48, 1), (16, 36, 5, 14, 64, 1),
    (24, 56, 3, 12, 64, 1), (28, 100, 5, 10, 80, 1), (32, 24, 3, 24, 16, 1), (40, 80, 3, 14, 24, 2),
    (56, 112, 1, 14, 32, 1), (72, 72, 3, 10, 32, 1), (112, 144, 3, 8, 32, 1), (160, 40, 3, 16, 8, 1),
    (176, 96, 1, 12, 32, 2), (96, 192, 3, 8, 12, 2), (144, 80, 1, 10, 24, 1), (64, 48, 3, 10, 1, 1),
    (20, 32, 5, 12, 2, 1),
)  # fmt: skip
# Taken in turn. Their numbers have no common divisor, so that every block meets every density.
BLOCKSIZES = (
    (1, 1), (8, 8), (4, 1), (16, 16), (2, 2), (1, 1), (4, 4), (1, 8), (32, 32), (8, 1), (3, 3), (16, 1), (1, 16),
)  # fmt: skip
DENSITIES = (0.1, 0.02, 0.4, 0.05, 0.8, 0.2, 1.0)
PATTERNS = 3  # of each layer; of every second layer, the last one runs dense, too
ROUNDS, SAMPLE_SECONDS = 7, 0.002
BUDGET_SECONDS = 15.0  # of all, after which no further round is begun
# Above either, the table says that the machine was busy. Alone on a core, the yardstick spreads by 2 %.
BUSY_SPREAD, BUSY_SWITCHES = 1.2, 20.0


def calibrate(progress: Callable[[str], object] = lambda note: None) -> Table:
    """Time the layers above and fit the model's coefficients to them; under 30 seconds on two cores.

    Nothing is written: :func:`sparsekern.cost.table.save` does that. A busy machine is no error: the table says so.

    Args:
        progress: called with what comes next.

    Raises:
        OSError: no kernels are built.
    """
    if ops.CPU_KERNELS_MISSING:
        raise OSError(f"there is nothing to calibrate: {ops.CPU_KERNELS_MISSING}")
    start = time.perf_counter()
    progress("building layers")
    with torch.random.fork_rng(devices=[]):
        jobs = list(_jobs())
    progress(f"timing {len(jobs)} calls")
    times = time_calls(
        {i: call for i, (_, call) in enumerate(jobs)},
        rounds=ROUNDS, sample_seconds=SAMPLE_SECONDS, limit_seconds=BUDGET_SECONDS - (time.perf_counter() - start),
    )  # fmt: skip
    measured = [Measurement(terms, times.ratios[i] * times.yardstick) for i, (terms, _) in enumerate(jobs)]
    coefficients, error = fit(measured)
    seconds = round(time.perf_counter() - start, 1)
    busy = _busy(times.spread, times.switches)
    return Table(coefficients, machine(), seconds, round(error, 4), times.yardstick, busy)


def _busy(spread: float, switches: float) -> str:
    """What told that the machine was busy, for people; empty where nothing did."""
    signs = []
    if spread > BUSY_SPREAD:
        signs.append(f"the same product took {spread - 1:.0%} longer at times")
    if switches > BUSY_SWITCHES:
        signs.append(f"other programs took the processor {switches:.0f} times a second")
    return ", ".join(signs)


def _jobs() -> Iterator[tuple[Terms, Call]]:
    """Every call to time, with its terms."""
    generator = torch.Generator().manual_seed(0)
    layers: list[tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]] = [
        *((nn.Linear(inputs, outputs), (rows, inputs)) for outputs, inputs, rows in LINEAR),
        *(
            (nn.Conv2d(c_in, c_out, kernel, stride, padding=int(kernel == 3)), (images, c_in, side, side))
            for c_in, c_out, kernel, side, images, stride in CONV
        ),
    ]
    turn = 0
    for number, (dense, shape) in enumerate(layers):
        x = torch.randn(shape, generator=generator)
        work = work_of(dense, shape, dense(x).shape)
        yield from ((work.dense(products), call) for products, call in _calls(dense, x, number).items())
        for _ in range(PATTERNS):
            (bh, bw), density = BLOCKSIZES[turn % len(BLOCKSIZES)], DENSITIES[turn % len(DENSITIES)]
            if isinstance(dense, nn.Conv2d):
                bw = math.gcd(bw, dense.in_channels)
            layer = sparse_layer(dense, (bh, bw), density, generator)
            kept = layer.pattern.density
            calls = _calls(layer, x, turn)
            yield from ((work.sparse((bh, bw), kept, products), call) for products, call in calls.items())
            turn += 1
        if number % 2:
            continue
        twin = copy.deepcopy(layer)
        twin.backend = "dense"
        calls = timed_calls(twin, x)
        for products in (PRODUCTS[:1], PRODUCTS):
            yield work.dense(products) | work.scatter(kept, products), calls[products]


def _calls(layer: nn.Linear | nn.Conv2d | SparseLayer, x: Tensor, number: int) -> dict[tuple[str, ...], Call]:
    """The forward, the whole step, and the forward with one product of the backward, which tells the two apart."""
    calls = timed_calls(layer, x)
    del calls["forward", ("dgrad", "wgrad")[number % 2]]
    return calls
