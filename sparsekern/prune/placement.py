"""Where the kept blocks of a layer stand: the orders in which blocks are taken."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Placement = Literal["auto", "global", "best", "draw", "random"]
Balance = Literal["auto", "none", "rows", "both"]


def best_order(scores: Tensor) -> Tensor:
    """Indices into the flattened ``scores``, best first; the earlier one wins a tie. int64 [blocks]."""
    return scores.flatten().sort(descending=True, stable=True).indices


def drawn_order(
    scores: Tensor, generator: torch.Generator, balance: Literal["none", "rows", "both"] = "rows", limit: int = 0
) -> Tensor:
    """Blocks in random order, in proportion to their score.

    Blocks are drawn without replacement with probabilities proportional to their scores, those of score 0 (or less)
    last. With "rows", draws are within a row and rows take turns, so that in any prefix of the order their counts
    differ by at most one. With "both", each turn also takes from the columns that have the fewest so far, as far as the
    row still has a block there.

    Source: sorting by log score + Gumbel noise draws without replacement (Vieira, "Gumbel-max trick and weighted
    reservoir sampling", 2014).

    Args:
        scores: float64 on the CPU, [block_rows, block_cols].
        generator: a CPU generator; one number per block is taken from it.
        balance: "none", "rows" or "both".
        limit: with "both", columns are balanced in the first ``limit`` blocks; the others follow as for "rows".

    Returns:
        int64 [blocks], indices into the flattened grid.
    """
    # torch.rand, unlike torch.exponential_, gives the same numbers on every CPU.
    uniform = torch.rand(scores.shape, dtype=torch.float64, generator=generator)
    noise = -uniform.clamp_min_(torch.finfo(torch.float64).tiny).log_().neg_().log_()
    keys = scores.clamp_min(torch.finfo(torch.float64).tiny).log() + noise
    if balance == "none":
        return best_order(keys)
    head = _both(keys, limit) if balance == "both" else torch.empty(0, dtype=torch.int64)
    taken = torch.zeros(keys.numel(), dtype=torch.bool)
    taken[head] = True
    # What is left, in turns that go on where the head stopped.
    later = keys.masked_fill(taken.view_as(keys), math.inf)
    turns = later.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    by_key = best_order(keys)
    order = by_key[turns.flatten()[by_key].argsort(stable=True)]
    return torch.cat([head, order[~taken[order]]])


def _both(keys: Tensor, limit: int) -> Tensor:
    """The first ``limit`` blocks: rows in turns, each turn in the order of their best key, columns kept even."""
    free = keys.numpy().copy()  # -inf where taken
    rows, columns = free.shape
    counts = np.zeros(columns, dtype=np.int64)
    behind, level = np.zeros(columns), columns  # 0 for the columns that have the fewest, -inf for others; their number
    order: list[int] = []
    turn: list[int] = []
    while len(order) < min(limit, rows * columns):
        turn = turn or (-free.max(1)).argsort(kind="stable").tolist()
        row = turn.pop(0)
        of_row = free[row]
        column = int((of_row + behind).argmax())
        if of_row[column] + behind[column] == -np.inf:  # the row has a block in each of those
            fewest = counts[of_row > -np.inf].min()
            column = int(np.where(counts == fewest, of_row, -np.inf).argmax())
        of_row[column] = -np.inf
        counts[column] += 1
        level -= behind[column] == 0
        behind[column] = -np.inf
        if not level:
            level = int((counts == counts.min()).sum())
            behind[counts == counts.min()] = 0
        order.append(row * columns + column)
    return torch.tensor(order, dtype=torch.int64)


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
