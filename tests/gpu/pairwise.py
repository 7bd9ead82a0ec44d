"""Few cases that cover every pair."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def pairwise(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Settings of all axes such that any two values of any two axes meet in one; greedily few."""
    names = list(axes)
    missing = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    used: Counter[tuple[str, int]] = Counter()
    while missing:
        row = dict(next(iter(missing)))
        for name in names:
            if name not in row:  # the value that meets most of what is missing; of several, the one used least

                def gain(i: int, name: str = name, row: dict[str, int] = row) -> tuple[int, int]:
                    return sum(pair in missing for pair in _pairs(names, row, name, i)), -used[name, i]

                row[name] = max(range(len(axes[name])), key=gain)
        used.update(row.items())
        for a, b in itertools.combinations(names, 2):
            missing.pop(((a, row[a]), (b, row[b])), None)
        yield {name: axes[name][row[name]] for name in names}


def _pairs(names: list[str], row: dict[str, int], name: str, i: int) -> Iterator[tuple[tuple[str, int], ...]]:
    for other, j in row.items():
        pair = ((name, i), (other, j))
        yield pair if names.index(name) < names.index(other) else pair[::-1]
