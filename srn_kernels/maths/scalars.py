"""The scalars of a layer: its statistics by name, gamma, a, b, and the gradient's coefficients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Values of a layer's "branch"; csrc/scalars.h has the same.
SPECTRAL, STABLE_RANK, PASS_THROUGH, NON_FINITE = range(4)


class Stats(NamedTuple):
    """A layer's float64 statistics by name, in the order of their columns; csrc/scalars.h has the
    same. ``Stats(*stats[i])`` reads a layer, ``Stats(*stats.unbind(-1))`` all layers at once."""

    sigma: Any  #: u^T W v
    frobenius_sq: Any  #: |W|_F^2
    q: Any  #: |W|_F^2 / sigma^2 less the part that is kept
    gamma: Any
    a: Any  #: W_hat = a W + b u v^T
    b: Any
    branch: Any
    kept: Any  #: how many singular values are kept, where that is counted; else 0
    factor: Any = 1.0  #: what is returned is factor W_hat, see srn_kernels.maths.bound
    by_gain: Any = 1.0  #: the factor's derivatives
    by_sigma: Any = 0.0

    def masks(self) -> tuple[Tensor, Tensor]:
        """Where sigma can be divided by, and where the stable-rank constraint is active."""
        return self.branch <= STABLE_RANK, self.branch == STABLE_RANK


STATS = Stats._fields


def contraction(q: Tensor, target_rank: float | Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """(active, gamma) of Theorem 1 with k = 1, elementwise: gamma = sqrt((r - 1) / q) where
    q > r - 1. ``good``: where sigma can be divided by."""
    r = torch.as_tensor(target_rank, dtype=q.dtype, device=q.device)
    active = good & (q > r - 1.0)
    excess = torch.where(r.isinf(), 1.0, (r - 1.0).clamp_min(0.0).sqrt())
    return active, torch.where(active, excess * torch.where(active, q, 1.0).rsqrt(), 1.0)


class Verdict(NamedTuple):
    """What a weight's norms say about it, elementwise."""

    good: Tensor  # sigma can be divided by
    broken: Tensor  # W is not finite


def verdict(sigma: Tensor, usable: Tensor, finite: Tensor, eps: float | Tensor) -> Verdict:
    """From sigma, whether u and v are ``usable`` and W is ``finite``.

    0 / 0 in the iteration of a zero weight is not a non-finite weight.
    """
    return Verdict(usable & (sigma.abs() > eps), ~finite | ~sigma.isfinite())


def layer_stats(
    sigma: Tensor, frobenius_sq: Tensor, q: Tensor, gamma: Tensor, active: Tensor, seen: Verdict
) -> Tensor:
    """The columns of :class:`Stats`, from tensors of one shape."""
    good, broken = seen
    nan = torch.full_like(sigma, float("nan"))
    branch = torch.where(active, float(STABLE_RANK), float(SPECTRAL)).double()
    branch = torch.where(good, branch, float(PASS_THROUGH))
    branch = torch.where(broken, float(NON_FINITE), branch)
    a = torch.where(good, gamma / torch.where(good, sigma, 1.0), 1.0)
    columns = Stats(
        sigma=sigma,
        frobenius_sq=frobenius_sq,
        q=torch.where(broken, nan, torch.where(good, q, 0.0)),
        gamma=torch.where(broken, nan, gamma),
        a=torch.where(broken, nan, a),
        b=torch.where(broken, nan, torch.where(good, 1.0 - gamma, 0.0)),
        branch=branch,
        kept=torch.zeros_like(sigma),
        factor=torch.ones_like(sigma),
        by_gain=torch.ones_like(sigma),
        by_sigma=torch.zeros_like(sigma),
    )
    return torch.stack(columns, dim=-1)


def gradient_coefficients(
    g_w: Tensor, d: Tensor, q: Tensor, moving: Tensor, active: Tensor, good: Tensor
) -> tuple[Tensor, Tensor]:
    """(x, y) of dL/dW = gamma / sigma (G + x W / sigma + y u v^T), elementwise.

    With g_w = <G, W> / sigma and d = g_w - u^T G v: x = -d / q and y = (q + 1) / q d - g_w where
    gamma moves with W, x = 0 and y = -g_w on the spectral branch.
    """
    q = torch.where(moving, q, 1.0)
    x = torch.where(moving, -d / q, 0.0)
    y = torch.where(moving, (q + 1.0) / q * d - g_w, torch.where(active, 0.0, -g_w))
    return x, torch.where(good, y, 0.0)
