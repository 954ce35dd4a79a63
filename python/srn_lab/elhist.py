"""Empirical Lipschitz histogram (eLhist) of a discriminator (Section 4.2, Figures 2, 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from srn_lab.normalisation import evaluating

PAIRS = 2000
_BATCH = 512


class PairKind(str, Enum):
    """Where the two images of a pair come from."""

    REAL_FAKE = "real-fake"
    REAL_REAL = "real-real"
    FAKE_FAKE = "fake-fake"


@dataclass(frozen=True)
class Slopes:
    """The slopes |D(x) - D(y)| / |x - y|_2 of one discriminator, in logits per unit distance."""

    values: Tensor
    """float64 (pairs,); pairs of identical images are left out."""
    identical_pairs: int

    @property
    def percentile_95(self) -> float:
        """The paper's dashed line, interpolated linearly between order statistics."""
        return torch.quantile(self.values, 0.95).item()

    def summary(self) -> dict[str, float | int]:
        """The numbers of one histogram, for JSON."""
        return {
            "pairs": self.values.numel(),
            "identical_pairs_left_out": self.identical_pairs,
            "mean_slope": self.values.mean().item(),
            "median_slope": self.values.median().item(),
            "percentile_95_slope": self.percentile_95,
            "max_slope": self.values.max().item(),
        }


def slopes(discriminator: nn.Module, x: Tensor, y: Tensor) -> Slopes:
    """Slopes over the pairs (x[i], y[i]); x and y are (pairs, ...), the logits (pairs,).

    D runs in evaluation mode without gradients, so u and v stay as they are. Differences are taken
    in float64. A pair of identical images has no slope and is left out and counted.
    """
    if x.shape != y.shape or x.shape[0] == 0:
        raise ValueError(f"x and y must be equal, non-empty batches, got {x.shape} and {y.shape}")
    distance = (x.double() - y.double()).flatten(1).norm(dim=1)
    distinct = distance > 0
    if not distinct.any():
        raise ValueError("x and y hold no pair of distinct images")
    with evaluating(discriminator):
        rise = (_logits(discriminator, x) - _logits(discriminator, y)).abs()
    identical = int((~distinct).sum())
    return Slopes(rise[distinct] / distance[distinct], identical)


def draw_pairs(
    real: Tensor, fake: Tensor, kind: PairKind, pairs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``pairs`` independent pairs drawn with replacement from real (N, ...) and fake (M, ...).

    Within one set the two members of a pair are different entries of it.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if kind is PairKind.REAL_FAKE:
        return _draw(real, pairs, generator), _draw(fake, pairs, generator)
    images = real if kind is PairKind.REAL_REAL else fake
    if len(images) < 2:
        raise ValueError(f"{kind.value} pairs need at least 2 images, got {len(images)}")
    first = torch.randint(len(images), (pairs,), generator=generator)
    offset = torch.randint(1, len(images), (pairs,), generator=generator)
    return images[first], images[(first + offset) % len(images)]


def _draw(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return images[torch.randint(len(images), (count,), generator=generator)]


def _logits(discriminator: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([discriminator(batch).double() for batch in x.split(_BATCH)])
