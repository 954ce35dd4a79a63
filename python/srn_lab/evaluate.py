"""What is measured on a trained GAN: eLhist, sample quality, spectra of the discriminator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from srn_lab.data import digits
from srn_lab.elhist import PAIRS, PairKind, Slopes, draw_pairs, slopes
from srn_lab.normalisation import Norm, Spectrum, spectra
from srn_lab.quality import frechet_distance_pca
from srn_lab.train import Gan


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one GAN after training."""

    samples: Tensor
    """As many generated images as there are real ones, (1797, 1, resolution, resolution)."""
    frechet_distance_pca: float
    elhist: dict[PairKind, Slopes]
    layers: list[Spectrum]

    def to_dict(self) -> dict:
        """Plain numbers for JSON; the images and single slopes are left out."""
        return {
            "frechet_distance_pca": self.frechet_distance_pca,
            "elhist": {kind.value: found.summary() for kind, found in self.elhist.items()},
            "layers": [asdict(layer) for layer in self.layers],
        }


def evaluate(
    gan: Gan, *, pairs: int = PAIRS, kinds: Sequence[PairKind] = tuple(PairKind), seed: int = 0
) -> Evaluation:
    """Measure ``gan`` against the digits; ``seed`` fixes latents and pairs, equal for all GANs."""
    random = torch.Generator().manual_seed(seed)
    real = digits(gan.config.resolution)
    fake = gan.sample(len(real), random)
    histograms = {
        kind: slopes(gan.discriminator, *draw_pairs(real, fake, kind, pairs, random))
        for kind in kinds
    }
    return Evaluation(
        fake, frechet_distance_pca(real, fake), histograms, spectra(gan.discriminator)
    )


def stable_rank_bounds(
    layers: Sequence[Spectrum], norm: Norm, rank_ratio: float
) -> dict[str, float]:
    """Largest stable rank that ``norm`` allows each layer (Section 4, "control parameter").

    Infinite where nothing is bounded, as without SRN or at a ratio of 1.
    """
    if norm is not Norm.SRN or rank_ratio == 1:
        return {row.layer: math.inf for row in layers}
    return {row.layer: max(1.0, rank_ratio * min(row.rows, row.columns)) for row in layers}


def active_layers(layers: Sequence[Spectrum], bounds: Mapping[str, float]) -> list[str]:
    """The layers that SRN changes: the raw weight's stable rank exceeds the layer's bound."""
    return [row.layer for row in layers if row.raw_stable_rank > bounds[row.layer]]
