"""Timing many short calls on a machine that others use, too: :func:`time_calls`.

Processor time of one thread, which leaves out what other processes take while they run; and, as those slow down what
runs beside them by half or more, each time is compared with that of a yardstick (a small dense product) right before
and after it. What comes out are times at the speed that the machine has when it is quiet.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch

from ..timing import switches

MIN_ROUNDS = 2

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]


class Times(NamedTuple, Generic[Key]):
    """What :func:`time_calls` found."""

    ratios: dict[Key, float]  # what each call takes, in yardsticks: medians over the rounds
    yardstick: float  # its seconds at the 20 % quantile; times the ratio: seconds on the quiet machine
    spread: float  # 80 % quantile of the yardstick over its 20 % quantile: 1.0 on a quiet machine
    switches: float  # per second, of this process to another program


def time_calls(
    calls: Mapping[Key, Call], *, rounds: int, sample_seconds: float, limit_seconds: float, seed: int = 0
) -> Times[Key]:
    """Time calls on one thread, in turns, in a new random order every round.

    Args:
        calls: what to time; results are dropped.
        rounds: samples of each.
        sample_seconds: how long a sample, which is a median, should take; one call where a call takes longer.
        limit_seconds: no further round is begun after this time, except for the first 2.
        seed: of the order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yardstick = _yardstick()
        repeats = {key: _repeats(call, sample_seconds) for key, call in calls.items()}
        ratios: dict[Key, list[float]] = {key: [] for key in calls}
        seconds: list[float] = []
        order, shuffle = list(calls), random.Random(seed).shuffle
        start, switched = time.perf_counter(), switches()
        for done in range(rounds):
            if done >= MIN_ROUNDS and time.perf_counter() - start > limit_seconds:
                break
            shuffle(order)
            before = yardstick()
            for key in order:
                sample = statistics.median(_span(calls[key]) for _ in range(repeats[key]))
                after = yardstick()
                ratios[key].append(2 * sample / (before + after))
                seconds.append(after)
                before = after
        switched, took = switches() - switched, time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    seconds.sort()
    quiet, slow = seconds[len(seconds) // 5], seconds[len(seconds) * 4 // 5]
    medians = {key: statistics.median(of_key) for key, of_key in ratios.items()}
    return Times(medians, quiet, slow / quiet, switched / took)


def _yardstick() -> Callable[[], float]:
    """A call that times a product of 64 x 256 by 256 x 256; the better of two, as the first may find no cache warm."""
    a, b, c = torch.full((64, 256), 0.5), torch.full((256, 256), 0.5), torch.empty(64, 256)
    return lambda: min(_span(lambda: torch.mm(a, b, out=c)) for _ in range(2))


def _span(call: Call) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _repeats(call: Call, sample_seconds: float) -> int:
    """Calls that fit a sample; the first one, which pays for what is set up lazily, does not count."""
    call()
    return max(1, round(sample_seconds / max(_span(call), 1e-6)))
