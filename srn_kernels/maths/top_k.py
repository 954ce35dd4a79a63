"""Stable rank normalisation that keeps the top k singular values: Theorem 1 for every k.

For W / sigma_1 with triples (t_i sigma_1, u_i, v_i) of a block power iteration, arXiv 1906.04659,
Theorem 1 and Algorithm 1 give, with the largest l <= k for which t_1^2 + ... + t_l^2 <= r,

    W_hat = a W + sum_{i <= l} b_i u_i v_i^T,  a = gamma / sigma_1,  b_i = (1 - gamma) t_i,
    gamma^2 = (r - sum_{i <= l} t_i^2) / (|W|_F^2 / sigma_1^2 - sum_{i <= l} t_i^2),

and for k = 0, with gamma as for k = 1, a = gamma_2 / sigma_1 and b_1 = gamma_1 - gamma_2, where
gamma_2 = (gamma + r - 1) / r and gamma_1 = gamma_2 / gamma. Everything here is plain PyTorch on the
weight's device; k = 1 is what the kernels serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srn_kernels.maths.matrix import from_matrix, matrix, padded, state_dtype
from srn_kernels.maths.scalars import NON_FINITE, PASS_THROUGH, SPECTRAL, STABLE_RANK
from srn_kernels.maths.top_one import NormalizedLayer
from srn_kernels.maths.turning import top_part_gradient


def block_size(preserve: int, rows: int, columns: int) -> int:
    """How many u, v a layer keeps: one for k = 0 and k = 1, never more than the matrix has."""
    return max(1, min(preserve, rows, columns))


def state_vectors(
    round_state: Tensor, offset: int, weight: Tensor, dim: int, size: int
) -> tuple[Tensor, Tensor]:
    """Views (rows, size) and (columns, size) of u and v in a round's flat state."""
    rows = weight.shape[dim]
    columns = weight.numel() // rows
    start = offset + padded(rows * size)
    u = round_state[offset : offset + rows * size].view(rows, size)
    return u, round_state[start : start + columns * size].view(columns, size)


def _orthonormal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q


def power_iteration(w: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Steps U = orth(W V), V = orth(W^T U), then the pairs of U^T W V (Rayleigh-Ritz).

    The result has U^T U = V^T V = I and a diagonal, descending U^T W V >= 0.
    """
    for _ in range(iterations):
        u = _orthonormal(w @ v)
        v = _orthonormal(w.mT @ u)
    if iterations == 0:
        u, v = _orthonormal(u), _orthonormal(v)
    left, _, right = torch.linalg.svd(u.mT @ w @ v)
    return u @ left, v @ right.mT


class Coefficients(NamedTuple):
    """The scalars of a layer, float64; differentiable in W with u and v held constant."""

    sigma: Tensor  # (k,)
    t: Tensor  # (k,), sigma / sigma_1
    f: Tensor  # |W|_F^2 / sigma_1^2
    q: Tensor  # f - sum of t_i^2, i <= l
    gamma: Tensor
    kept: int  # l
    active: bool
    a: Tensor
    b: Tensor  # (k,)


def coefficients(
    w: Tensor,
    u: Tensor,
    v: Tensor,
    target_rank: float,
    preserve: int,
    frobenius_sq: Tensor | None = None,
) -> Coefficients:
    """From W, the pairs of :func:`power_iteration`, r and k; |W|_F^2 if it is known already."""
    sigma = ((w @ v) * u).sum(0).double()
    top = sigma[0]
    t = sigma / top
    if frobenius_sq is None:
        f = (w / top.to(w.dtype)).square().sum(dtype=torch.float64)
    else:
        f = frobenius_sq / top / top
    squares = t.square().cumsum(0)
    place = torch.arange(len(t), device=w.device)
    active = bool(f > target_rank)
    slack = 1e-12 if w.dtype == torch.float64 else 1e-6
    kept = int((squares <= target_rank * (1 + slack)).sum().clamp(1, max(preserve, 1)))
    zero = torch.zeros_like(t)
    if not active:
        q = f - squares[kept - 1]
        return Coefficients(sigma, t, f, q, torch.ones_like(f), kept, False, 1 / top, zero)
    here = place < kept
    # t_1 = 1 exactly, so that r = 1 gives gamma = 0 and not a rounding error's root.
    total = 1 + torch.where(here[1:], t[1:].square(), 0.0).sum()
    q, left = f - total, target_rank - total
    some = bool((left > 0) & (q > 0))
    gamma = (left / q).sqrt().clamp_max(1.0) if some else torch.zeros_like(f)
    if preserve == 0:
        two = (gamma + target_rank - 1) / target_rank
        one = (1 + ((target_rank - 1) * q).sqrt()) / target_rank if some else two + 1
        a, b = two / top, torch.where(here, one - two, 0.0)
    else:
        a, b = gamma / top, torch.where(here, (1 - gamma) * t, 0.0)
    return Coefficients(sigma, t, f, q, gamma, kept, True, a, b)


def combine(w: Tensor, u: Tensor, v: Tensor, c: Coefficients) -> Tensor:
    """a W + U diag(b) V^T."""
    return torch.addmm(w * c.a.to(w.dtype), u * c.b.to(u.dtype), v.mT)


def normalize_layer(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    target_rank: float,
    iterations: int,
    eps: float,
    dim: int,
    preserve: int,
    out_dtype: torch.dtype | None = None,
) -> NormalizedLayer:
    """One layer, as :func:`srn_kernels.reference.normalize_layer`, for any k = ``preserve``.

    u: (rows, size), v: (columns, size), or vectors for size 1, with size of :func:`block_size`;
    not modified. iterations -1: u and v are a round's own, used as they are. The last statistic
    is l, the number of values kept.
    """
    out_dtype = out_dtype or weight.dtype
    with torch.no_grad():
        w = matrix(weight, dim).to(state_dtype(weight.dtype))
        given = (u.reshape(w.shape[0], -1), v.reshape(w.shape[1], -1))
        # In float64, so that it is finite if and only if W is.
        frobenius_sq = torch.linalg.vector_norm(w, dtype=torch.float64).square()
        finite = bool(torch.stack([x.isfinite().all() for x in (frobenius_sq, *given)]).all())
        new_u, new_v = given
        if finite and iterations >= 0:
            new_u, new_v = power_iteration(w, *given, iterations)
        sigma = float(new_u[:, 0] @ (w @ new_v[:, 0]))
        stats = torch.zeros(8, dtype=torch.float64, device=w.device)
        if not finite or sigma != sigma or abs(sigma) == float("inf"):
            row, w_hat = [*[float("nan")] * 6, NON_FINITE, 0], torch.full_like(w, float("nan"))
            row[:2] = [sigma, float(frobenius_sq)]
            new_u, new_v = given
        elif sigma <= eps:
            row, w_hat = [sigma, float(frobenius_sq), 0, 1, 1, 0, PASS_THROUGH, 0], w
            new_u, new_v = given
        else:
            c = coefficients(w, new_u, new_v, target_rank, preserve, frobenius_sq)
            w_hat = combine(w, new_u, new_v, c)
            branch = STABLE_RANK if c.active else SPECTRAL
            row = [sigma, *(float(x) for x in (frobenius_sq, c.q, c.gamma, c.a, c.b[0]))]
            row += [branch, min(c.kept, preserve)]
        stats.copy_(torch.tensor(row, dtype=torch.float64))
        w_hat = from_matrix(w_hat, weight, dim).to(out_dtype)
    return NormalizedLayer(w_hat, new_u.reshape(u.shape), new_v.reshape(v.shape), stats)


def layer_gradient(
    grad: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    stats: Tensor,
    target_rank: float,
    dim: int,
    preserve: int,
    gradient: str,
) -> Tensor:
    """dL/dW from G = dL/dW_hat; with u and v constant itself differentiable in G and W.

    L depends on W through a W and the scalars sigma_i, f of :class:`Coefficients`:
    dL/dW = a G + sum_i dL/dsigma_i u_i v_i^T + 2 dL/dF W.
    """
    branch = int(stats[6])
    if branch == PASS_THROUGH:
        return grad.to(weight.dtype)
    if branch == NON_FINITE:
        return torch.full_like(weight, float("nan"))
    dtype = state_dtype(weight.dtype)
    w, g = matrix(weight, dim).to(dtype), matrix(grad, dim).to(dtype)
    known = None if torch.is_grad_enabled() else stats[1]
    c = coefficients(w, u, v, target_rank, preserve, known)
    top, f, q, gamma, t = c.sigma[0], c.f, c.q, c.gamma, c.t
    g_w = (g * (w / top.to(dtype))).sum(dtype=torch.float64)  # <G, W> / sigma_1
    g_e = ((g @ v) * u).sum(0).double()  # u_i^T G v_i
    by_t, by_f = torch.zeros_like(t), torch.zeros_like(f)
    if c.active and gamma > 0:
        here = torch.arange(len(t), device=w.device) < c.kept
        if preserve == 0:
            r, m = target_rank, ((target_rank - 1) * q).sqrt()
            by_f = (m * g_e[0] - gamma * (g_w - g_e[0])) / (2 * q * r)
        else:
            by_gamma = g_w - torch.where(here, t * g_e, 0.0).sum()
            by_f = -by_gamma * gamma / (2 * q)
            by_total = by_gamma * (gamma - 1 / gamma) / (2 * q)
            by_t = torch.where(here, (1 - gamma) * g_e + 2 * by_total * t, 0.0)
    elif c.active and preserve > 1:
        by_t = torch.where(torch.arange(len(t), device=w.device) < c.kept, g_e, 0.0)
    rest = torch.cat([torch.zeros_like(by_t[:1]), by_t[1:]])  # t_1 = 1 does not change
    by_top = -c.a * top * g_w - (rest * t).sum() - 2 * f * by_f
    by_sigma = (rest + torch.cat([by_top.reshape(1), torch.zeros_like(t[1:])])) / top
    result = g * c.a.to(dtype) + (w / top.to(dtype)) * (2 * by_f / top).to(dtype)
    result = torch.addmm(result, u * by_sigma.to(dtype), v.mT)
    if gradient == "exact" and c.active:
        with torch.no_grad():
            share = (c.b[0] / top).to(dtype)
            here = torch.arange(len(t), device=w.device) < c.kept
            part = top_part_gradient(g, w, u, c.sigma.to(dtype), v, here)
            fixed = (u * torch.where(here, g_e, 0.0).to(dtype)) @ v.mT
        result = result + share * (part - fixed)
    return from_matrix(result, weight, dim).to(weight.dtype)


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    outs: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    offsets: Sequence[int],
    target_ranks: Sequence[float],
    iterations: Sequence[int],
    dims: Sequence[int],
    eps: Sequence[float],
    preserve: Sequence[int],
) -> None:
    """The op normalize_block: as the op normalize, with k of each layer."""
    with torch.no_grad():
        for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
            rows = weight.shape[dims[i]]
            size = block_size(preserve[i], rows, weight.numel() // rows)
            round_u, round_v = state_vectors(round_state, offsets[i], weight, dims[i], size)
            pair = (round_u, round_v) if iterations[i] < 0 else (u, v)
            layer = normalize_layer(
                weight,
                *pair,
                target_ranks[i],
                iterations[i],
                eps[i],
                dims[i],
                preserve[i],
                outs[i].dtype,
            )
            if iterations[i] >= 0:
                round_u.copy_(layer.u.reshape(round_u.shape))
                round_v.copy_(layer.v.reshape(round_v.shape))
                stats[i].copy_(layer.stats)
            if iterations[i] > 0:
                u.copy_(layer.u)
                v.copy_(layer.v)
            outs[i].copy_(layer.weight)


def normalize_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    grad_weights: Sequence[Tensor],
    rows: Sequence[int],
    offsets: Sequence[int],
    target_ranks: Sequence[float],
    dims: Sequence[int],
    preserve: Sequence[int],
    gradient: str,
) -> None:
    """The op normalize_block_backward."""
    with torch.no_grad():
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            n = weight.shape[dims[i]]
            size = block_size(preserve[i], n, weight.numel() // n)
            u, v = state_vectors(round_state, offsets[i], weight, dims[i], size)
            grad_weights[i].copy_(
                layer_gradient(
                    grad,
                    weight,
                    u,
                    v,
                    stats[rows[i]],
                    target_ranks[i],
                    dims[i],
                    preserve[i],
                    gradient,
                )
            )
