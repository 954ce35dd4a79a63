"""How close generated digits are to real ones."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from torch import Tensor

COMPONENTS = 32


def frechet_distance_pca(real: Tensor, fake: Tensor, components: int = COMPONENTS) -> float:
    """Frechet distance between Gaussians fitted to real (N, ...) and fake (M, ...) images.

    |mu_r - mu_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)) in the first ``components`` principal axes
    of the real pixels. FID's formula without Inception features: it compares runs on the same
    data and resolution and means nothing across data sets.
    """
    pca = PCA(components, svd_solver="full").fit(_pixels(real))
    return frechet_distance(pca.transform(_pixels(real)), pca.transform(_pixels(fake)))


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The same distance for feature vectors (N, features) and (M, features)."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The eigenvalues of cov_x @ cov_y are those of a symmetric product, hence real and >= 0;
    # rounding alone makes them otherwise.
    eigenvalues = np.linalg.eigvals(cov_x @ cov_y).real.clip(min=0)
    mean_term = np.square(x.mean(0) - y.mean(0)).sum()
    return float(mean_term + np.trace(cov_x) + np.trace(cov_y) - 2 * np.sqrt(eigenvalues).sum())


def _pixels(images: Tensor) -> np.ndarray:
    return images.flatten(1).double().numpy()
