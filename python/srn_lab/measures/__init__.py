"""Measures of networks. They work on any ``nn.Module``, not only on the lab's.

A discriminator of your own, images (N, C, H, W) in ``real`` and ``fake``::

    from srn_lab.measures import PairKind, draw_pairs, jacobian_norms, slopes, spectra

    random = torch.Generator().manual_seed(0)
    x, y, _ = draw_pairs(real, fake, PairKind.REAL_FAKE, 2000, random)
    print(slopes(D, x, y).percentile_95)          # eLhist's dashed line
    print(jacobian_norms(D, real[:256]).mean())   # local Lipschitz constant
    for layer in spectra(D):
        print(layer.layer, layer.sigma, layer.stable_rank)
"""

from srn_lab.measures.complexity import Complexity, complexity
from srn_lab.measures.elhist import PairKind, Slopes, draw_pairs, slopes
from srn_lab.measures.jacobian import jacobian_norms
from srn_lab.measures.spectra import (
    Spectrum,
    active_layers,
    log_product_of_norms,
    spectra,
    stable_rank_bounds,
)
from srn_lab.measures.stability import roughness

__all__ = [
    "Complexity",
    "PairKind",
    "Slopes",
    "Spectrum",
    "active_layers",
    "complexity",
    "draw_pairs",
    "jacobian_norms",
    "log_product_of_norms",
    "roughness",
    "slopes",
    "spectra",
    "stable_rank_bounds",
]
