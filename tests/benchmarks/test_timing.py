"""Paired timing: turns, shares of the repeats, percentiles and ratios."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.cases import runner
from benchmarks.measure import timing


class FakeClock:
    """Time that passes only inside the timed bodies."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def body(self, name: str, seconds):
        durations = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(durations)

        return runner.Body(run, prepare=lambda: self.prepare(name))

    def prepare(self, name: str) -> None:
        self.calls.append(name.upper())
        self.now += 1000.0  # must not count


def test_percentiles():
    assert timing.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0, 6)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="values"):
        timing.spread([])


def test_candidates_take_turns_and_ratios_are_paired():
    clock = FakeClock()
    warm = [1.0] * timing.WARM_UPS
    bodies = {
        "a": clock.body("a", [*warm, 1.0, 10.0, 100.0]),
        "b": clock.body("b", [*warm, 2.0, 30.0, 400.0]),
    }
    samples = timing.measure(bodies, repeats=3, budget=1e9, clock=clock)
    turns = "".join(clock.calls[4 * timing.WARM_UPS :])
    assert sorted(turns[:4]) == sorted(turns[4:8]) == sorted(turns[8:]) == ["A", "B", "a", "b"]
    assert turns.replace("Aa", "").replace("Bb", "") == ""  # prepared right before its call
    assert samples == {"a": [1.0, 10.0, 100.0], "b": [2.0, 30.0, 400.0]}
    ratios = samples.paired("b", "a", lambda t, base: t / base)
    # Of the ratios 2, 3 and 4, not of medians: a machine that slows down cancels.
    assert ratios == pytest.approx((2.4, 3.0, 3.6, 3))
    assert samples.paired("b", "absent", lambda t, base: t) is None


def test_a_slow_candidate_sits_repeats_out():
    clock = FakeClock()
    bodies = {"slow": clock.body("slow", [3.0] * 99), "fast": clock.body("fast", [0.1] * 99)}
    samples = timing.measure(bodies, repeats=20, budget=30.0, clock=clock)
    assert samples.spread("slow").repeats == 10
    assert samples.spread("fast").repeats == 20
    assert samples.paired("fast", "slow", lambda t, base: t / base).repeats == 10
    assert timing.share_of_repeats(1e6, 20, 30.0) == timing.FEWEST


@pytest.mark.parametrize(("seconds", "calls"), [(2.0, timing.FEWEST + 1), (1.0, 7 + 2)])
def test_a_slow_candidate_is_warmed_up_once(seconds, calls):
    clock = FakeClock()
    body = clock.body("x", [seconds] * 99)
    timing.measure({"x": body}, repeats=20, budget=7.0, clock=clock)
    assert clock.calls.count("x") == calls


def test_neighbours_change_from_repeat_to_repeat():
    clock = FakeClock()
    bodies = {name: clock.body(name, [1.0] * 99) for name in "abcd"}
    timing.measure(bodies, repeats=40, budget=1e9, clock=clock)
    turns = [name for name in clock.calls if name.islower()][4 * timing.WARM_UPS :]
    first = Counter(turns[::4])
    assert set(first) == set("abcd") and max(first.values()) < 20


def test_garbage_collection_is_off_and_comes_back():
    import gc

    seen = []
    body = runner.Body(lambda: seen.append(gc.isenabled()))
    timing.measure({"a": body}, repeats=1, budget=1.0)
    assert not any(seen)
    assert gc.isenabled()
