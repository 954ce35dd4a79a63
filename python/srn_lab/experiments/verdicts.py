"""What a claim is, and how the rows of several seeds decide on it.

A claim gives one number a seed, paired with the peer's of the same seed. A directed claim expects
it above 0; a claim of equality expects it within a margin. The 95 % interval over seeds decides:
wholly on the expected side is supported, wholly on the other not supported, else undecided, as is
everything below three seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from srn_lab.experiments.results import Results, Values
from srn_lab.experiments.statistics import interval


@dataclass(frozen=True)
class Claim:
    """``says`` paraphrases the paper; ``effect`` says what the number is."""

    name: str
    experiment: str
    source: str
    says: str
    effect: str
    numbers: Callable[[Results], Values]
    margin: Callable[[Results], float | None] | None = None
    """Of a claim of equality; None where rows for it are missing."""


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a claim."""

    claim: Claim
    verdict: str
    effect: float | None
    interval: tuple[float, float] | None
    seeds: int
    margin: float | None = None

    def to_dict(self) -> dict:
        """As in metrics.json."""
        return {
            "name": self.claim.name,
            "verdict": self.verdict,
            "effect": self.effect,
            "interval": None if self.interval is None else list(self.interval),
            "source": self.claim.source,
            "experiment": self.claim.experiment,
            "says": self.claim.says,
            "effect_is": self.claim.effect,
            "margin": self.margin,
            "seeds": self.seeds,
        }


def judge(claim: Claim, results: Results) -> Verdict:
    """The verdict on one claim."""
    values = list(claim.numbers(results).values())
    if not values:
        return Verdict(claim, "undecided", None, None, 0)
    mean, found = statistics.fmean(values), interval(values)
    margin = claim.margin(results) if claim.margin is not None else None
    if found is None or (claim.margin is not None and margin is None):
        return Verdict(claim, "undecided", mean, None, len(values), margin)
    low, high = found
    if claim.margin is None:
        verdict = "supported" if low > 0 else "not supported" if high < 0 else "undecided"
    else:
        inside, outside = -margin <= low and high <= margin, low > margin or high < -margin
        verdict = "supported" if inside else "not supported" if outside else "undecided"
    return Verdict(claim, verdict, mean, found, len(values), margin)
