"""Empirical Lipschitz histogram (eLhist) of a discriminator (Section 4.2, Figures 2, 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from srn_lab.measures.spectra import evaluating

PAIRS = 2000
_BATCH = 512


class PairKind(str, Enum):
    """Where the two images of a pair come from."""

    REAL_FAKE = "real-fake"
    REAL_REAL = "real-real"
    FAKE_FAKE = "fake-fake"


@dataclass(frozen=True)
class Slopes:
    """The slopes |D(x) - D(y)|_2 / |x - y|_2 of one network, in outputs per unit distance."""

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


def slopes(
    network: nn.Module, x: Tensor, y: Tensor, labels: tuple[Tensor, Tensor] | None = None
) -> Slopes:
    """Slopes over the pairs (x[i], y[i]); x and y are (pairs, ...), outputs (pairs,) or vectors.

    ``labels``, one tensor for each side, go to a conditional network as its second argument. It
    runs in evaluation mode without gradients, so u and v stay as they are. Differences are taken in
    float64. A pair of identical images has no slope and is left out and counted.
    """
    if x.shape != y.shape or x.shape[0] == 0:
        raise ValueError(f"x and y must be equal, non-empty batches, got {x.shape} and {y.shape}")
    distance = (x.double() - y.double()).flatten(1).norm(dim=1)
    distinct = distance > 0
    if not distinct.any():
        raise ValueError("x and y hold no pair of distinct images")
    of_x, of_y = labels if labels is not None else (None, None)
    with evaluating(network):
        rise = _outputs(network, x, of_x) - _outputs(network, y, of_y)
    rise = rise.flatten(1).norm(dim=1) if rise.dim() > 1 else rise.abs()
    identical = int((~distinct).sum())
    return Slopes(rise[distinct] / distance[distinct], identical)


def draw_pairs(
    real: Tensor,
    fake: Tensor,
    kind: PairKind,
    pairs: int,
    random: torch.Generator,
    labels: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``pairs`` independent pairs drawn with replacement from real (N, ...) and fake (M, ...).

    Within one set the two members of a pair are different entries of it. With ``labels``, those of
    real (N,) and of fake (M,), a class is drawn first, uniformly among those that can make a pair,
    and both images come from it; it is the third result, (pairs,), else None.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    sides = {
        PairKind.REAL_FAKE: (real, fake),
        PairKind.REAL_REAL: (real, real),
        PairKind.FAKE_FAKE: (fake, fake),
    }[kind]
    if labels is None:
        first, second = _draw(len(sides[0]), len(sides[1]), kind, pairs, random)
        return sides[0][first], sides[1][second], None
    of_real, of_fake = labels
    sets = {
        PairKind.REAL_FAKE: (of_real, of_fake),
        PairKind.REAL_REAL: (of_real, of_real),
        PairKind.FAKE_FAKE: (of_fake, of_fake),
    }[kind]
    least = 1 if kind is PairKind.REAL_FAKE else 2
    classes = [
        label
        for label in torch.cat(sets).unique().tolist()
        if all(int((s == label).sum()) >= least for s in sets)
    ]
    if not classes:
        raise ValueError(f"no class has images for {kind.value} pairs")
    drawn = torch.tensor(classes)[torch.randint(len(classes), (pairs,), generator=random)]
    first = torch.empty(pairs, dtype=torch.int64)
    second = torch.empty(pairs, dtype=torch.int64)
    for label in drawn.unique().tolist():
        places = drawn == label
        members = [(s == label).nonzero().flatten() for s in sets]
        a, b = _draw(len(members[0]), len(members[1]), kind, int(places.sum()), random)
        first[places], second[places] = members[0][a], members[1][b]
    return sides[0][first], sides[1][second], drawn


def _draw(
    first: int, second: int, kind: PairKind, pairs: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    a = torch.randint(first, (pairs,), generator=random)
    if kind is PairKind.REAL_FAKE:
        return a, torch.randint(second, (pairs,), generator=random)
    if first < 2:
        raise ValueError(f"{kind.value} pairs need at least 2 images, got {first}")
    offset = torch.randint(1, first, (pairs,), generator=random)
    return a, (a + offset) % first


def _outputs(network: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    parameter = next(network.parameters(), x)
    parts = []
    for index in torch.arange(len(x)).split(_BATCH):
        inputs = x[index].to(parameter.device)
        if labels is None:
            out = network(inputs)
        else:
            out = network(inputs, labels[index].to(parameter.device))
        parts.append(out.double().cpu())
    return torch.cat(parts)
