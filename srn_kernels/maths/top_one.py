"""The rule that the kernels serve, in plain PyTorch: Theorem 1 with k = 1 and Algorithm 2.

Source: Sanyal, Torr, Dokania (arXiv 1906.04659).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srn_kernels.maths.matrix import from_matrix, matrix, state_dtype
from srn_kernels.maths.scalars import (
    NON_FINITE,
    STABLE_RANK,
    contraction,
    gradient_coefficients,
    layer_stats,
)
from srn_kernels.maths.turning import TopOuter


class NormalizedLayer(NamedTuple):
    weight: Tensor  # W_hat
    u: Tensor  # (rows,), the unit u of this round
    v: Tensor  # (columns,)
    stats: Tensor  # (8,) float64, see STATS


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return (x.double() / norm).to(x.dtype), norm


def power_iteration(w: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """``iterations`` steps u = W v / |W v|, v = W^T u / |W^T u| (Algorithm 2; u first)."""
    for _ in range(iterations):
        u, _ = _unit(w @ v)
        v, _ = _unit(w.T @ u)
    return u, v


def normalize_layer(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    target_rank: float,
    iterations: int,
    eps: float,
    dim: int,
    out_dtype: torch.dtype | None = None,
    gradient: str = "frozen",
) -> NormalizedLayer:
    """One layer, differentiable in ``weight`` with u and v held constant, or not ("exact").

    weight: any real floating dtype, two dimensions or more; u: (rows,), v: (columns,), not
    modified; target_rank: r >= 1, inf for spectral normalisation alone; iterations: 0 for
    evaluation, which uses u/|u| and v/|v| and their sigma with its sign, as torch does. Returns
    W_hat in the weight's shape, and in its dtype unless ``out_dtype`` says otherwise.
    """
    dtype = state_dtype(weight.dtype)
    w = matrix(weight, dim).to(dtype)
    with torch.no_grad():
        fixed = w.detach()
        new_u, new_v = u.to(dtype), v.to(dtype)
        if iterations > 0:
            new_u, new_v = power_iteration(fixed, new_u, new_v, iterations)
        else:
            (new_u, _), (new_v, _) = _unit(new_u), _unit(new_v)
        finite = fixed.isfinite().all()
        usable = finite & (new_u.isfinite().all() & new_v.isfinite().all())
        if iterations > 0:  # a zero or non-finite weight leaves u and v as they were
            new_u, new_v = torch.where(usable, new_u, u), torch.where(usable, new_v, v)

    sigma = (new_u @ (w @ new_v)).double()
    with torch.no_grad():
        good = usable & (sigma.abs() > eps)
        # 0/0 in the iteration of a zero weight is not a non-finite weight.
        broken = ~finite | ~sigma.isfinite()
    if iterations > 0:
        new_u = torch.where(good, new_u, u.to(dtype))
        new_v = torch.where(good, new_v, v.to(dtype))
    scaled = w / torch.where(good, sigma, 1.0).to(dtype)
    # |W / sigma - u v^T|_F^2 = |W|_F^2 / sigma^2 - 1 for any unit u, v with sigma = u^T W v.
    ratio = scaled.square().sum(dtype=torch.float64)
    q = (ratio - 1.0).clamp_min(0.0)
    active, gamma = contraction(q, target_rank, good)
    outer = torch.outer(new_u, new_v)
    if gradient == "exact":
        outer = TopOuter.apply(w, new_u, torch.where(good, sigma, 1.0).to(dtype), new_v)
    w_hat = gamma.to(dtype) * scaled + torch.where(good, 1.0 - gamma, 0.0).to(dtype) * outer
    w_hat = torch.where(broken, torch.full_like(w_hat, float("nan")), w_hat)

    with torch.no_grad():
        frobenius_sq = fixed.double().square().sum()
        stats = layer_stats(sigma.detach(), frobenius_sq, q, gamma, active, good, broken)
    w_hat = from_matrix(w_hat, weight, dim).to(out_dtype or weight.dtype)
    return NormalizedLayer(w_hat, new_u, new_v, stats)


def repeat_layer(weight: Tensor, u: Tensor, v: Tensor, stats: Tensor, dim: int) -> Tensor:
    """W_hat = a W + b u v^T from a round's own u, v and statistics, in the arithmetic's dtype."""
    dtype = state_dtype(weight.dtype)
    w = matrix(weight, dim).to(dtype)
    a, b = stats[4].to(dtype), stats[5].to(dtype)
    return from_matrix(a * w + b * torch.outer(u, v), weight, dim)


def layer_gradient(
    grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, stats: Tensor, dim: int
) -> Tensor:
    """dL/dW from G = dL/dW_hat, u and v held constant; itself differentiable in G and W.

    With sigma = u^T W v, E = u v^T, q = |W|_F^2 / sigma^2 - 1 and d = <G, W> / sigma - u^T G v:
    dL/dW = a (G - <G, W> / sigma E) on the spectral branch, and
    dL/dW = a (G - d / (q sigma) W + ((q + 1) / q d - <G, W> / sigma) E) on the stable-rank branch.
    """
    dtype = state_dtype(weight.dtype)
    w, g = matrix(weight, dim).to(dtype), matrix(grad, dim).to(dtype)
    branch = stats[6]
    good, active = branch <= STABLE_RANK, branch == STABLE_RANK
    sigma = torch.where(good, (u @ (w @ v)).double(), 1.0)
    scaled = w / sigma.to(dtype)
    q = scaled.square().sum(dtype=torch.float64) - 1.0
    # gamma = sqrt(r - 1) / sqrt(q) as a function of W; sqrt(r - 1) is a constant of the layer.
    excess = stats[3] * stats[2].clamp_min(0.0).sqrt()
    moving = active & (stats[3] > 0)
    q = torch.where(moving, q, 1.0)
    gamma = torch.where(active, torch.where(moving, excess * q.rsqrt(), 0.0), 1.0)
    g_w = (g * scaled).sum(dtype=torch.float64)  # <G, W> / sigma
    d = g_w - (u @ (g @ v)).double()
    weight_part, outer_part = gradient_coefficients(g_w, d, q, moving, active, good)
    combined = g + weight_part.to(dtype) * scaled + outer_part.to(dtype) * torch.outer(u, v)
    combined = (gamma / sigma).to(dtype) * combined
    combined = torch.where(branch == NON_FINITE, torch.full_like(combined, float("nan")), combined)
    return from_matrix(combined, weight, dim).to(weight.dtype)
