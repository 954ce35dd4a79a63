"""Losses of a GAN and the penalties of WGAN-GP and Ortho-GAN. Logits are (B,), results scalars."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(str, Enum):
    """Hinge is the paper's; Wasserstein is WGAN-GP's; non-saturating is Goodfellow's."""

    HINGE = "hinge"
    WASSERSTEIN = "wasserstein"
    NON_SATURATING = "non-saturating"

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """The loss that D minimises."""
        if self is Loss.HINGE:
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        if self is Loss.WASSERSTEIN:
            return fake.mean() - real.mean()
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def generator(self, fake: Tensor) -> Tensor:
        """The loss that G minimises."""
        return F.softplus(-fake).mean() if self is Loss.NON_SATURATING else -fake.mean()


def between(real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    """A point on the segment from each real to its generated image, where WGAN-GP penalises."""
    shape = (len(real), *[1] * (real.dim() - 1))
    t = torch.rand(shape, generator=generator).to(real.device)
    return (real + t * (fake - real)).requires_grad_()


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """E[(|grad_x D(x)|_2 - 1)^2], differentiable once more (Gulrajani et al. 2017, Eq. 3)."""
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    # The small constant keeps the norm's derivative finite where the gradient vanishes.
    norms = (gradient.flatten(1).square().sum(dim=1) + 1e-12).sqrt()
    return (norms - 1).square().mean()


def orthogonality_penalty(weights: Iterable[Tensor]) -> Tensor:
    """Sum over layers of |W W^T - I|_F^2 on the shorter side, W (rows, the rest).

    Where rows exceed columns W W^T cannot be the identity, and W^T W is meant.
    """
    total = torch.zeros(())
    for weight in weights:
        matrix = weight.flatten(1)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.t()
        identity = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
        total = total.to(matrix.device) + (matrix @ matrix.t() - identity).square().sum()
    return total
