"""Coefficients from measurements: least relative error, none below 0 (:func:`fit`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .model import NAMES, Terms

# Rounds of reweighting, and the relative error below which all measurements weigh the same.
ROUNDS, CLOSE = 4, 0.03

Array = npt.NDArray[np.float64]


class Measurement(NamedTuple):
    """Seconds that the work of ``terms`` took."""

    terms: Terms
    seconds: float


def fit(measurements: Sequence[Measurement]) -> tuple[dict[str, float], float]:
    """The coefficients that explain ``measurements`` best, and the median of |predicted / measured - 1|.

    Relative errors count, by their size rather than their square (iteratively reweighted least squares), so that a few
    measurements on a machine that was busy do not matter.

    Raises:
        ValueError: a coefficient that no measurement says anything about.
    """
    names = sorted(NAMES)
    place = {name: i for i, name in enumerate(names)}
    amounts = np.zeros((len(measurements), len(names)))
    for row, (terms, seconds) in zip(amounts, measurements, strict=True):
        for name, amount in terms.items():
            row[place[name]] = amount / seconds
    scale = amounts.max(axis=0, initial=0.0)
    if not scale.all():
        raise ValueError(f"measurements say nothing about {names[int(np.argmin(scale))]}")
    amounts /= scale
    weights = np.ones(len(measurements))
    for _ in range(ROUNDS):
        coefficients = nonnegative_least_squares(amounts * weights[:, None], weights)
        errors = np.abs(amounts @ coefficients - 1)
        weights = 1 / np.sqrt(np.maximum(errors, CLOSE))
    return dict(zip(names, (coefficients / scale).tolist(), strict=True)), float(np.median(errors))


def nonnegative_least_squares(a: Array, b: Array) -> Array:
    """The x >= 0 that minimises |a x - b|; a [m, n], b [m], in float64.

    Source: the active-set method of Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23.
    """
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)
    tolerance = 1e-10 * np.abs(a.T @ b).max(initial=0.0)
    while True:
        gain = np.where(free, -np.inf, a.T @ (b - a @ x))
        if gain.max(initial=-np.inf) <= tolerance:
            return x
        free[int(gain.argmax())] = True
        while True:
            step = np.zeros_like(x)
            step[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if step[free].min() > 0:
                break
            # As far towards it as none falls below 0; those that reach 0 are held there.
            low = free & (step <= 0)
            x += (x[low] / (x[low] - step[low])).min() * (step - x)
            free &= x > 1e-14 * x.max()
            x[~free] = 0
            if not free.any():
                break
        x = step if free.any() else x
