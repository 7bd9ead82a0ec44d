"""Seconds on a GPU: CUDA events around single calls, second-level cache flushed in between, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

Call = Callable[[], object]
WARM_UP_SECONDS, SAMPLE_SECONDS, MIN_CALLS = 0.1, 0.5, 10


class Timing(NamedTuple):
    """Seconds of one call."""

    p20: float
    median: float
    p80: float


Clock = Callable[[Call], Timing]


def cuda_clock() -> Clock:
    """A clock for the current device."""
    # Twice the cache; writing it leaves nothing of a call's inputs there.
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")

    def time(call: Call) -> Timing:
        for _ in range(3):  # the first call compiles
            call()
        calls = max(MIN_CALLS, min(1000, int(SAMPLE_SECONDS / max(_seconds([call])[0], 1e-6))))
        warm = max(3, int(calls * WARM_UP_SECONDS / SAMPLE_SECONDS))
        samples = sorted(_seconds([call] * (warm + calls), flush)[warm:])
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return Timing(cuts[1], cuts[4], cuts[7])

    return time


def _seconds(calls: list[Call], flush: torch.Tensor | None = None) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    for call, (start, end) in zip(calls, events, strict=True):
        if flush is not None:
            flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def measured_peaks(clock: Clock, device: str = "cuda", size: int = 8192) -> dict[str, float]:
    """FLOP/s of the library's product of two matrices of that size, by kind, and bytes/s of a copy ("memory")."""
    peaks = {}
    for kind, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("tf32", torch.float32)):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        with allow_tf32(kind == "tf32"):
            peaks[kind] = 2 * size**3 / clock(partial(torch.matmul, a, b)).median
    source = torch.randn(4 * size, size, device=device)
    target = torch.empty_like(source)
    peaks["memory"] = 2 * source.numel() * source.element_size() / clock(lambda: target.copy_(source)).median
    return peaks


class allow_tf32:
    """Within, torch may or may not round float32 factors of matrix products to TF32."""

    def __init__(self, allowed: bool) -> None:
        self.precision = "tf32" if allowed else "ieee"

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = self.precision

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.fp32_precision = self.before
