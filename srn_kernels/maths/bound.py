"""A soft bound on the spectral norm, and a learnable gain: one factor on a layer's W_hat.

With P(W) = sigma W_hat, which keeps W's own spectral norm (P(W) = W without a stable rank), the
bounded weight is g P(W) / max(1, sigma / s) = g min(sigma, s) W_hat: W itself as long as its norm
is at most s (as SNGP does; Liu et al., arXiv 2006.10108), and s W_hat beyond. With f the factor,
G = dL/d(f W_hat), and sigma = u^T W v for the round's u and v,

    dL/dW = (what the rule makes of f G) + <G, W_hat> df/dsigma u v^T,  dL/dg = <G, W_hat> df/dg.

csrc/scalars.h has both in the terms of the kernels: f is part of a and b of W_hat = a W + b u v^T,
and <G, W_hat> = a <G, W> + b u^T G v, so that neither pass over the weights has more to do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srn_kernels.maths.matrix import first_vector, from_matrix, matrix
from srn_kernels.maths.rule import Rule
from srn_kernels.maths.scalars import Stats


class Scaling(NamedTuple):
    """What multiplies a layer's W_hat."""

    sigma_max: float = 0.0  # s; 0: none, and W_hat keeps spectral norm 1
    through: bool = True  # whether the divisor max(1, sigma / s) moves with W in the gradient
    gain: bool = False  # a learned one, a tensor beside the weight

    @property
    def scales(self) -> bool:
        return self.gain or self.sigma_max > 0


class Factor(NamedTuple):
    """The factor and its derivatives by the gain and by sigma; float64, one element each."""

    factor: Tensor
    by_gain: Tensor
    by_sigma: Tensor

    @classmethod
    def of(
        cls, sigma: Tensor, good: Tensor, gain: Tensor | None, sigma_max: float, through: bool
    ) -> Factor:
        """Differentiable in sigma and the gain. A weight that normalisation passes through, or that
        is not finite (not ``good``), gets the gain alone."""
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        by_gain, by_sigma = one, zero
        if sigma_max > 0:
            beyond = sigma > sigma_max
            # sigma / max(1, sigma / s) = min(sigma, s)
            by_gain = torch.where(good, torch.where(beyond, sigma_max, sigma), one)
            held = zero if through else sigma_max / sigma.detach()
            by_sigma = torch.where(good, torch.where(beyond, held, one), zero)
        if gain is None:
            return cls(by_gain, by_gain, by_sigma)
        gain = gain.reshape(()).to(sigma.dtype)
        return cls(by_gain * gain, by_gain, by_sigma * gain)


def with_factor(stats: Tensor, gain: Tensor | None, sigma_max: float, through: bool) -> Tensor:
    """A layer's statistics with its factor, from the sigma and branch that are in them."""
    known = Stats(*stats)
    made = Factor.of(known.sigma, known.masks()[0], gain, sigma_max, through)
    return torch.stack(known._replace(**made._asdict()))


def scaled_gradient(
    rule: Rule,
    factor: Factor,
    grad: Tensor,
    weight: Tensor,
    w_hat: Tensor,
    u: Tensor,
    v: Tensor,
    stats: Tensor,
    target_rank: float,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """dL/dW, in the weight's shape and dtype, and dL/dgain, float64, from dL/d(factor W_hat).

    grad, weight, w_hat: one shape; u, v: the round's own. Differentiable as
    :meth:`srn_kernels.maths.rule.Rule.gradient` is.
    """
    g, w, w_hat = (matrix(x, dim).to(u.dtype) for x in (grad, weight, w_hat))
    result = rule.gradient(g * factor.factor.to(u.dtype), w, u, v, stats, target_rank)
    inner = (g * w_hat).sum(dtype=torch.float64)
    first_u, first_v = first_vector(u), first_vector(v)
    if first_u.numel():  # else the rule knows no sigma
        moves = factor.by_sigma != 0  # an infinite gradient times 0 is none
        turn = (torch.where(moves, inner, 0.0) * factor.by_sigma).to(u.dtype)
        result = result + torch.outer(first_u * turn, first_v)
    return from_matrix(result, weight, dim).to(weight.dtype), inner * factor.by_gain
