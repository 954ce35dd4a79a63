"""Inception score, FID, KID and Intra-FID through torchmetrics, on features computed once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

# Every process of a launch has all features; gathering them would count each several times.
_ALONE = {"sync_on_compute": False}


class _AsTheyAre(nn.Module):
    """Hands features that are computed already to a metric that wants a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (N, d) and (M, d), in float64."""
    metric = FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1]), **_ALONE)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute().item()


def kid(real: Tensor, fake: Tensor, subset: int = 500, subsets: int = 20) -> float:
    """Kernel distance of features (N, d) and (M, d), the mean over ``subsets`` random subsets."""
    subset = min(subset, len(real), len(fake))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
        torch.manual_seed(0)  # torchmetrics draws the subsets from the global state
        metric = KernelInceptionDistance(
            feature=_AsTheyAre(real.shape[1]), subsets=subsets, subset_size=subset, **_ALONE
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        return metric.compute()[0].item()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) | p(y)) of class logits (N, classes): mean and deviation over splits."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save")
        torch.manual_seed(0)  # torchmetrics shuffles with the global state
        metric = InceptionScore(feature=_AsTheyAre(logits.shape[1]), splits=splits, **_ALONE)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def intra_fid(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> float:
    """Mean over classes of the FID within the class (Miyato and Koyama 2018)."""
    classes = real_labels.unique().tolist()
    distances = []
    for label in classes:
        of_real, of_fake = real[real_labels == label], fake[fake_labels == label]
        if min(len(of_real), len(of_fake)) < 2:
            raise ValueError(f"class {label} has fewer than 2 real or generated images")
        distances.append(fid(of_real, of_fake))
    return sum(distances) / len(distances)
