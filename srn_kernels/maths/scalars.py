"""The scalars of a layer: its statistics by name, gamma, a, b, and the gradient's coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a layer's float64 statistics, and the values of "branch"; csrc/scalars.h has the same.
STATS = ("sigma", "frobenius_sq", "q", "gamma", "a", "b", "branch", "reserved")


SPECTRAL, STABLE_RANK, PASS_THROUGH, NON_FINITE = range(4)


def contraction(q: Tensor, target_rank: float | Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """(active, gamma) of Theorem 1 with k = 1, elementwise: gamma = sqrt((r - 1) / q) where
    q > r - 1. ``good``: where sigma can be divided by."""
    r = torch.as_tensor(target_rank, dtype=q.dtype, device=q.device)
    active = good & (q > r - 1.0)
    excess = torch.where(r.isinf(), 1.0, (r - 1.0).clamp_min(0.0).sqrt())
    return active, torch.where(active, excess * torch.where(active, q, 1.0).rsqrt(), 1.0)


def layer_stats(
    sigma: Tensor,
    frobenius_sq: Tensor,
    q: Tensor,
    gamma: Tensor,
    active: Tensor,
    good: Tensor,
    broken: Tensor,
) -> Tensor:
    """The columns of :data:`STATS`, from tensors of one shape; a = gamma / sigma, b = 1 - gamma."""
    nan = torch.full_like(sigma, float("nan"))
    branch = torch.where(active, float(STABLE_RANK), float(SPECTRAL)).double()
    branch = torch.where(good, branch, float(PASS_THROUGH))
    branch = torch.where(broken, float(NON_FINITE), branch)
    a = torch.where(good, gamma / torch.where(good, sigma, 1.0), 1.0)
    columns = [
        sigma,
        frobenius_sq,
        torch.where(broken, nan, torch.where(good, q, 0.0)),
        torch.where(broken, nan, gamma),
        torch.where(broken, nan, a),
        torch.where(broken, nan, torch.where(good, 1.0 - gamma, 0.0)),
        branch,
        torch.zeros_like(sigma),
    ]
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
