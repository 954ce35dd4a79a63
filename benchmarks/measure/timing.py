"""Paired timing: all candidates in every repeat, in an order drawn anew, ratios within a repeat."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from benchmarks.cases.runner import Body

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]

WARM_UPS = 2
FEWEST = 5  # repeats of a candidate that is too slow for the budget


class Spread(NamedTuple):
    """20th, 50th and 80th percentile of the repeats."""

    p20: float
    p50: float
    p80: float
    repeats: int


def spread(values: Sequence[float]) -> Spread:
    """Percentiles with linear interpolation between order statistics."""
    if not values:
        raise ValueError("values must not be empty")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(tenths[1], tenths[4], tenths[7], len(values))


class Interval(NamedTuple):
    """A median, and the 95 % interval that order statistics give it."""

    low: float
    median: float
    high: float
    spread: Spread


def interval(values: Sequence[float]) -> Interval:
    """ValueError for fewer than 20 values."""
    n = len(values)
    if n < 20:
        raise ValueError(f"an interval needs 20 values, got {n}")
    ordered = sorted(values)
    # Normal approximation of the binomial, rounded outwards.
    reach = 0.98 * n**0.5
    low = max(0, int(n / 2 - reach - 0.5))
    found = spread(values)
    return Interval(ordered[low], found.p50, ordered[n - 1 - low], found)


class Samples(dict[Key, list[float | None]]):
    """Seconds of every candidate in every repeat; None where it sat the repeat out."""

    def spread(self, key: Key) -> Spread:
        return spread([t for t in self[key] if t is not None])

    def paired(
        self, key: Key, base: Key, function: Callable[[float, float], float]
    ) -> Spread | None:
        """``function(time, base time)`` over the repeats that both took part in."""
        if key not in self or base not in self:
            return None
        pairs = zip(self[key], self[base], strict=True)
        values = [function(t, b) for t, b in pairs if t is not None and b is not None]
        return spread(values) if values else None


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def share_of_repeats(seconds: float, repeats: int, budget: float) -> int:
    """How many of ``repeats`` a candidate of this cost takes part in."""
    return max(min(FEWEST, repeats), min(repeats, int(budget / max(seconds, 1e-9))))


def takes_part(repeat: int, share: int, repeats: int) -> bool:
    """Spreads ``share`` turns evenly over the repeats; equal shares meet in the same ones."""
    return (repeat + 1) * share // repeats > repeat * share // repeats


def measure(
    bodies: Mapping[Key, Body],
    *,
    repeats: int,
    budget: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    step: Callable[[], object] = lambda: None,
) -> Samples[Key]:
    """Times every candidate once a repeat.

    The order changes from repeat to repeat: what a candidate finds in the caches depends on who ran
    before it, and must not be the same neighbour every time.

    Args:
        bodies: what to time, one call a repeat, after WARM_UPS calls each, or one if it is slow.
        repeats: of a candidate that fits the budget.
        budget: seconds for one candidate; a slow one sits repeats out, down to FEWEST.
        seed: of the orders.
        step: called after every repeat, for a progress bar.
    """
    samples: Samples[Key] = Samples({key: [] for key in bodies})
    generator = random.Random(seed)

    def time_once(body: Body) -> float:
        body.prepare()
        start = clock()
        body.run()
        return clock() - start

    with no_garbage_collection():
        shares = {}
        for key, body in bodies.items():
            seconds = time_once(body)
            if FEWEST * seconds < budget:
                seconds = min(seconds, *(time_once(body) for _ in range(WARM_UPS - 1)))
            shares[key] = share_of_repeats(seconds, repeats, budget)
        for repeat in range(repeats):
            for key in generator.sample(list(bodies), len(bodies)):
                part = takes_part(repeat, shares[key], repeats)
                samples[key].append(time_once(bodies[key]) if part else None)
            step()
    return samples
