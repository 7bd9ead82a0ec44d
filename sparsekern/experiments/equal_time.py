"""Networks that take the same measured time: how many times faster than dense, and how sparse or narrow for that."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..prune.by_time import Of, dense_runner, runner
from ..timing import equal_time_scale, interleaved, speedup

Batch = tuple[Tensor, Tensor]
ROUNDS, SEARCH_ROUNDS, SEARCH_SECONDS = 15, 5, 30.0
TOLERANCE, TRIES = 0.1, 6


def measured(dense: nn.Module, other: nn.Module, batch: Batch, of: Of) -> dict[str, float]:
    """How many times faster ``other`` is: {"p20", "p50", "p80"}; see :func:`sparsekern.prune.in_time` for ``of``.

    For inference ``other`` is frozen even where it is dense: a narrower dense network is a rival that deserves it.
    """
    runs = {
        "dense": dense_runner(dense, *batch, of, F.cross_entropy),
        "other": runner(copy.deepcopy(other), *batch, of, F.cross_entropy),
    }
    times = interleaved(runs, rounds=ROUNDS)
    return speedup(times["dense"], times["other"])


def scale(dense: nn.Module, scaled: Callable[[float], nn.Module], wanted: float, batch: Batch, of: Of) -> float:
    """The scale, a width or a density in (0, 1], at which ``scaled(scale)`` runs ``wanted`` times as fast as ``dense``.

    Raises:
        ValueError: none does: after six searches the speed-up is more than a tenth off.
    """
    reference = dense_runner(dense, *batch, of, F.cross_entropy)

    def slower(scale: float) -> bool:
        runs = {"dense": reference, "other": runner(scaled(scale), *batch, of, F.cross_entropy)}
        found = []
        for _ in range(3):
            times = interleaved(runs, rounds=SEARCH_ROUNDS)
            found.append(speedup(times["dense"], times["other"])["p50"])
        return statistics.median(found) < wanted

    # One wrong answer sends a search astray for good: what is found is measured again.
    for _ in range(TRIES):
        found = equal_time_scale(slower, limit_seconds=SEARCH_SECONDS)
        reached = measured(dense, scaled(found), batch, of)["p50"]
        if abs(reached / wanted - 1) <= TOLERANCE:
            return found
    raise ValueError(f"no scale gives {wanted:g}x of {of}: {found:.4f} gives {reached:.2f}x")
