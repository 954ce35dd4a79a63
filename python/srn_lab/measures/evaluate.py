"""What the demo measures on a trained GAN: eLhist, quality, spectra of the discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from srn_lab.measures.elhist import PAIRS, PairKind, Slopes, draw_pairs, slopes
from srn_lab.measures.scores import fid
from srn_lab.measures.spectra import Spectrum, spectra

COMPONENTS = 32


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one GAN after training."""

    samples: Tensor
    """Generated images, (N, C, H, W)."""
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
    discriminator: nn.Module,
    real: Tensor,
    fake: Tensor,
    *,
    pairs: int = PAIRS,
    kinds: Sequence[PairKind] = tuple(PairKind),
    seed: int = 0,
) -> Evaluation:
    """Measure D, without classes, on real and generated (N, C, H, W); ``seed`` fixes pairs."""
    random = torch.Generator().manual_seed(seed)
    histograms = {
        kind: slopes(discriminator, *draw_pairs(real, fake, kind, pairs, random)[:2])
        for kind in kinds
    }
    return Evaluation(fake, frechet_distance_pca(real, fake), histograms, spectra(discriminator))


def frechet_distance_pca(real: Tensor, fake: Tensor, components: int = COMPONENTS) -> float:
    """FID's formula in the first principal axes of the real pixels, no feature network needed.

    It compares runs on the same data and resolution and means nothing across data sets.
    """
    pixels = real.flatten(1).double()
    centre = pixels.mean(dim=0)
    _, _, axes = torch.linalg.svd(pixels - centre, full_matrices=False)
    axes = axes[:components].t()
    return fid((pixels - centre) @ axes, (fake.flatten(1).double() - centre) @ axes)
