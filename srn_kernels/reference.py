"""Stable Rank Normalization in plain PyTorch: any device, any real dtype, autograd's own backward.

This is the definition that every backend is compared with. Source: Sanyal, Torr, Dokania, "Stable
Rank Normalization for Improved Generalization in Neural Networks and GANs" (arXiv 1906.04659),
Theorem 1 with k = 1 and Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srn_kernels.turning import TopOuter

# Columns of a layer's float64 statistics, and the values of "branch"; csrc/scalars.h has the same.
STATS = ("sigma", "frobenius_sq", "q", "gamma", "a", "b", "branch", "reserved")
SPECTRAL, STABLE_RANK, PASS_THROUGH, NON_FINITE = range(4)
# u and v of a round lie in one flat tensor, each padded to this many elements.
STATE_ALIGNMENT = 16


class NormalizedLayer(NamedTuple):
    weight: Tensor  # W_hat
    u: Tensor  # (rows,), the unit u of this round
    v: Tensor  # (columns,)
    stats: Tensor  # (8,) float64, see STATS


def padded(n: int) -> int:
    return -(-n // STATE_ALIGNMENT) * STATE_ALIGNMENT


def state_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of u, v and of the arithmetic: float64 for float64 weights, else float32."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


def matrix(weight: Tensor, dim: int) -> Tensor:
    """The (rows, columns) view of a weight whose output dimension is ``dim``."""
    return weight.movedim(dim, 0).flatten(1)


def from_matrix(w: Tensor, like: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`matrix`."""
    shape = list(like.shape)
    rows = shape.pop(dim)
    return w.reshape(rows, *shape).movedim(0, dim)


def round_vectors(
    round_state: Tensor, offset: int, weight: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Views of u and v in a round's flat state."""
    rows = weight.shape[dim]
    columns = weight.numel() // rows
    start = offset + padded(rows)
    return round_state[offset : offset + rows], round_state[start : start + columns]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return (x.double() / norm).to(x.dtype), norm


def power_iteration(w: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """``iterations`` steps u = W v / |W v|, v = W^T u / |W^T u| (Algorithm 2; u first)."""
    for _ in range(iterations):
        u, _ = _unit(w @ v)
        v, _ = _unit(w.T @ u)
    return u, v


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
    evaluation, which uses u/|u| and v/|v|. Returns W_hat in the weight's shape, and in its dtype
    unless ``out_dtype`` says otherwise.
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
            new_u = torch.where(new_u @ (fixed @ new_v) < 0, -new_u, new_u)
        finite = fixed.isfinite().all()
        usable = finite & (new_u.isfinite().all() & new_v.isfinite().all())
        if iterations > 0:  # a zero or non-finite weight leaves u and v as they were
            new_u, new_v = torch.where(usable, new_u, u), torch.where(usable, new_v, v)

    sigma = (new_u @ (w @ new_v)).double()
    with torch.no_grad():
        good = usable & (sigma > eps)
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


def stable_rank_normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    target_ranks: Sequence[float],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    training: bool = True,
    out_dtype: torch.dtype | None = None,
    gradient: str = "frozen",
) -> list[Tensor]:
    """:func:`srn_kernels.functional.stable_rank_normalize`, layer by layer in plain PyTorch."""
    from srn_kernels.functional import Request

    request = Request.checked(
        weights, us, vs, target_ranks, n_power_iterations, eps, dims, training, out_dtype, gradient
    )
    outs = []
    for i, weight in enumerate(weights):
        if weight.numel() == 0:
            outs.append(weight.to(request.out_dtypes[i]))
            continue
        layer = normalize_layer(
            weight,
            us[i],
            vs[i],
            request.target_ranks[i],
            request.iterations[i],
            eps,
            request.dims[i],
            request.out_dtypes[i],
            gradient,
        )
        if training:
            us[i].copy_(layer.u)
            vs[i].copy_(layer.v)
        outs.append(layer.weight)
    return outs


def stable_rank_project_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    target_ranks: Sequence[float],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    training: bool = True,
) -> None:
    """:func:`srn_kernels.functional.stable_rank_project_`, layer by layer in plain PyTorch."""
    with torch.no_grad():
        outs = stable_rank_normalize(
            weights,
            us,
            vs,
            target_ranks,
            n_power_iterations=n_power_iterations,
            eps=eps,
            dims=dims,
            training=training,
        )
        for weight, out in zip(weights, outs, strict=True):
            weight.copy_(out)
