"""Paired timing: all candidates in turn, repeat after repeat, ratios within a repeat."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

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
    bodies: Mapping[Key, Callable[[], object]],
    *,
    repeats: int,
    budget: float,
    clock: Clock = time.perf_counter,
    step: Callable[[], object] = lambda: None,
) -> Samples[Key]:
    """Times the candidates A B C A B C ...

    Args:
        bodies: what to time, one call a repeat, after WARM_UPS calls each.
        repeats: of a candidate that fits the budget.
        budget: seconds for one candidate; a slow one sits repeats out, down to FEWEST.
        step: called after every repeat, for a progress bar.
    """
    samples: Samples[Key] = Samples({key: [] for key in bodies})

    def time_once(body: Callable[[], object]) -> float:
        start = clock()
        body()
        return clock() - start

    with no_garbage_collection():
        shares = {}
        for key, body in bodies.items():
            seconds = min(time_once(body) for _ in range(WARM_UPS))
            shares[key] = share_of_repeats(seconds, repeats, budget)
        for repeat in range(repeats):
            for key, body in bodies.items():
                part = takes_part(repeat, shares[key], repeats)
                samples[key].append(time_once(body) if part else None)
            step()
    return samples
