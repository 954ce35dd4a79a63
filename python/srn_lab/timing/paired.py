"""Paired wall-clock timing: the contestants take turns, so drift of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, sample: np.ndarray) -> Spread:
        """The spread of all entries of ``sample``."""
        p25, median, p75 = np.percentile(sample, [25, 50, 75])
        return cls(float(median), float(p25), float(p75))

    def to_dict(self, unit: str) -> dict[str, float]:
        """``{"median_<unit>": ...}`` and the quartiles."""
        return {f"{name}_{unit}": value for name, value in asdict(self).items()}


def paired_ms(
    contestants: Mapping[str, Callable[[], object]], *, repeats: int, warmups: int = 2
) -> dict[str, np.ndarray]:
    """Milliseconds (repeats,) of each contestant; row i of all samples was taken in one round.

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
    return {name: np.array(values) for name, values in times.items()}
