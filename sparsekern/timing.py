"""Timing things against each other on a machine that is never quite quiet: :func:`interleaved`."""

from __future__ import annotations

import ctypes
import math
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_ROUNDS = 5
TRIES = 3  # for a sample in which the system interrupted every call


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one sample per round, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantiles(self) -> dict[str, float]:
        """The 20 %, 50 % and 80 % quantiles in seconds: {"p20", "p50", "p80"}."""
        return _quantiles(self.samples)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    sample_seconds: float = 0.01,
    limit_seconds: float = 10.0,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time several callables in one process, in turn, in a new random order every round, by the wall clock.

    A slow spell of the machine thus meets all of them, and none always runs after the same other one. A sample repeats
    its callable for about ``sample_seconds``, so that it finds the caches it would have in a loop of its own, and is
    the median of these calls; those during which the system gave the processor to another program are dropped. The
    warm-up sets how many calls there are.

    Args:
        candidates: what to time, by name; called without arguments, the result is dropped.
        rounds: samples per candidate, at least 1.
        sample_seconds: how long a sample should take; one call where a call takes longer.
        limit_seconds: no further round is begun after this time, except for the first 5.
        seed: of the order within rounds.

    Returns:
        {name: Timing}; sample i of every candidate is from round i.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    repeats = {name: _warm_up(call, sample_seconds) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > limit_seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(_sample(candidates[name], repeats[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def speedup(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster ``fast`` is, from samples of the same rounds: {"p20", "p50", "p80"}.

    The ratio is taken round by round and its median reported, not the ratio of the medians: where the machine slows
    down for a while, both samples of a round are slow and their ratio still holds.
    """
    return _quantiles([s / f for s, f in zip(slow.samples, fast.samples, strict=True)])


def equal_time_scale(
    slower: Callable[[float], bool], *, smallest: float = 0.003, tries: int = 10, limit_seconds: float = 5.0
) -> float:
    """The scale in [``smallest``, 1] above which ``slower(scale)``, by bisection of its logarithm.

    Each try is a timing of its own. No further one is begun after ``limit_seconds``.
    """
    low, high = math.log(smallest), 0.0
    start = time.perf_counter()
    for done in range(tries):
        if done and time.perf_counter() - start > limit_seconds:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if slower(math.exp(middle)) else (middle, high)
    return math.exp((low + high) / 2)


def keep_freed_memory() -> bool:
    """Tell the C library (glibc) to keep what is freed, for the rest of the process; returns whether it does.

    If left alone it gives large results back to the system and fetches them again, page by page, on each call. That
    costs dense and sparse alike, varies, and hides the ratio; long-running programs reuse such memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    c = ctypes.CDLL(None)
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h.
    return all(c.mallopt(option, size) for option, size in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 28)))


def _sample(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of ``repeats`` calls in a row, without those that were interrupted where any was not."""
    spans: list[float] = []
    for _ in range(TRIES):
        calm = []
        before = switches()
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            spans.append(time.perf_counter() - start)
            after = switches()
            if after == before:
                calm.append(spans[-1])
            before = after
        if calm:
            return statistics.median(calm)
    return statistics.median(spans)


def switches() -> int:
    """How often the system took a processor from a thread of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _warm_up(call: Callable[[], object], sample_seconds: float) -> int:
    """Call until ``sample_seconds`` have passed, at least three times; returns the calls that fit a sample."""
    calls = [_sample(call, 1) for _ in range(3)]
    while sum(calls) < sample_seconds:
        calls.append(_sample(call, 1))
    # The first call pays for allocations and lazy setup; the fastest one is the closest to the steady state.
    return max(1, round(sample_seconds / max(min(calls), 1e-9)))


def _quantiles(samples: tuple[float, ...] | list[float]) -> dict[str, float]:
    if len(samples) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}
