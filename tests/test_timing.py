"""The interleaved timer, on a clock that we move ourselves: no test depends on how fast the machine is."""

import pytest

from sparsekern import timing
from sparsekern.timing import Timing, interleaved, speedup


class Clock:
    """Stands in for the clock; each candidate moves it on by its duration, times the machine's current slowness."""

    def __init__(self, monkeypatch):
        self.now, self.slowness, self.calls = 0.0, lambda now: 1.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "switches", lambda: 0)  # nor on how busy it is

    def takes(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds * self.slowness(self.now)

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_freed_memory_is_kept_where_glibc_is_asked(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, option, size):
            asked.append(option)
            return 1

    monkeypatch.setattr(timing.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(timing.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert timing.keep_freed_memory()
    assert asked == [-3, -1, -2]
    monkeypatch.setattr(timing.platform, "libc_ver", lambda: ("", ""))
    assert not timing.keep_freed_memory()


def test_medians_and_speedup(clock):
    found = interleaved({"slow": clock.takes("slow", 0.03), "fast": clock.takes("fast", 0.002)}, rounds=9)
    assert len(found["slow"].samples) == len(found["fast"].samples) == 9
    assert found["slow"].median == pytest.approx(0.03)
    assert found["fast"].median == pytest.approx(0.002)
    assert speedup(found["slow"], found["fast"])["p50"] == pytest.approx(15)


def test_every_round_runs_every_candidate_in_an_order_that_changes(clock):
    names = ("a", "b", "c")
    interleaved({name: clock.takes(name, 1.0) for name in names}, rounds=20, limit_seconds=1e9)
    timed = clock.calls[3 * len(names) :]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 20
    assert all(sorted(order) == list(names) for order in rounds)
    assert len(set(rounds)) > 3


def test_short_calls_are_repeated_to_fill_a_sample(clock):
    interleaved({"short": clock.takes("short", 1e-3)}, rounds=4, sample_seconds=0.02)
    assert len(clock.calls) == 20 + 4 * 20


def test_ratio_survives_a_slow_spell(clock):
    """The machine is ten times slower for most of the run; the ratio of medians would depend on when."""
    clock.slowness = lambda now: 10.0 if now > 0.5 else 1.0
    found = interleaved({"slow": clock.takes("slow", 0.04), "fast": clock.takes("fast", 0.02)}, rounds=21)
    assert speedup(found["slow"], found["fast"])["p50"] == pytest.approx(2)


def test_preempted_calls_do_not_count(clock):
    """Every fifth call is interrupted for 50 ms, so every sample of ten calls has two such."""
    calm, calls = clock.takes("calm", 1e-3), []

    def preempted():
        calls.append(None)
        calm()
        clock.now += 0.05 * (len(calls) % 5 == 0)

    found = interleaved({"calm": preempted}, rounds=6)
    assert found["calm"].quantiles() == pytest.approx({"p20": 1e-3, "p50": 1e-3, "p80": 1e-3})


def test_interrupted_calls_are_dropped(clock, monkeypatch):
    """The system takes the processor away for 50 ms during most calls, and says so; one call in five is left alone."""
    calm, calls = clock.takes("calm", 1e-3), []

    def interrupted():
        calls.append(None)
        calm()
        clock.now += 0.05 * (len(calls) % 5 > 0)

    monkeypatch.setattr(timing, "switches", lambda: len(calls) - len(calls) // 5)
    found = interleaved({"call": interrupted}, rounds=6, sample_seconds=0.01)
    assert found["call"].quantiles() == pytest.approx({"p20": 1e-3, "p50": 1e-3, "p80": 1e-3})


def test_where_every_call_is_interrupted_their_median_counts(clock, monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "switches", lambda: len(clock.calls))
    slow = clock.takes("slow", 1.0)
    found = interleaved({"slow": lambda: calls.append(slow())}, rounds=5)
    assert found["slow"].samples == pytest.approx((1.0,) * 5)
    assert len(calls) == timing.TRIES * (3 + 5)  # the warm-up is three samples of one call


def test_limit_ends_it_but_never_before_five_rounds(clock):
    found = interleaved({"slow": clock.takes("slow", 4.0)}, rounds=100, limit_seconds=10.0)
    assert len(found["slow"].samples) == timing.MIN_ROUNDS
    found = interleaved({"slow": clock.takes("slow", 1.0)}, rounds=100, limit_seconds=10.0)
    assert len(found["slow"].samples) == 11


def test_quantiles():
    found = Timing(tuple(float(n) for n in range(11, 0, -1)))
    assert found.quantiles() == pytest.approx({"p20": 3, "p50": 6, "p80": 9})
    assert found.median == 6
    assert Timing((2.0,)).quantiles() == {"p20": 2, "p50": 2, "p80": 2}


def test_bad_rounds():
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        interleaved({}, rounds=0)


def test_samples_of_different_rounds_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        speedup(Timing((1.0, 2.0)), Timing((1.0,)))
