"""Paired wall-clock timing: the contestants take turns, so drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """The spread of all numbers of ``sample``, one at least."""
        if len(sample) == 1:
            return cls(*[float(sample[0])] * 3)
        p25, median, p75 = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, p25, p75)

    def to_dict(self, unit: str) -> dict[str, float]:
        """``{"median_<unit>": ...}`` and the quartiles."""
        return {f"{name}_{unit}": value for name, value in asdict(self).items()}


def paired_ms(
    contestants: Mapping[str, Callable[[], object]], *, repeats: int, warmups: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each contestant, ``repeats`` numbers; the i-th of all are of one round.

    Who goes first rotates from round to round.
    """
    names = list(contestants)
    for name in names:
        for _ in range(warmups):
            contestants[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Quotients of two paired samples, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]
