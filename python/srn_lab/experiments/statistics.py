"""Student's t over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats

CONFIDENCE = 0.95
LEAST_SEEDS = 3


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The two-sided 95 % interval of the mean; None below three values."""
    if len(values) < LEAST_SEEDS:
        return None
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    half = float(quantile) * deviation / math.sqrt(len(values))
    return mean - half, mean + half
