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

import math
from typing import NamedTuple

import torch
from torch import Tensor

from srn_kernels.maths.rule import Normalized, Rule
from srn_kernels.maths.scalars import NON_FINITE, PASS_THROUGH, SPECTRAL, STABLE_RANK, Stats
from srn_kernels.maths.turning import top_part_gradient


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


class TopK(Rule):
    """Theorem 1 for any k = ``preserve``. The last statistic is l, how many values are kept."""

    def __init__(self, preserve: int) -> None:
        self.preserve = preserve
        self.name = f"stable_rank:{preserve}"

    def pairs(self, rows: int, columns: int) -> int:
        """One for k = 0 and k = 1, never more than the matrix has."""
        return max(1, min(self.preserve, rows, columns))

    def normalize(
        self, w: Tensor, u: Tensor, v: Tensor, target_rank: float, iterations: int, eps: float
    ) -> Normalized:
        with torch.no_grad():
            given = _blocks(u, v)
            # In float64, so that it is finite if and only if W is.
            frobenius_sq = torch.linalg.vector_norm(w, dtype=torch.float64).square()
            finite = bool(torch.stack([x.isfinite().all() for x in (frobenius_sq, *given)]).all())
            new_u, new_v = power_iteration(w, *given, iterations) if finite else given
            sigma = float(new_u[:, 0] @ (w @ new_v[:, 0]))
            known = {"sigma": sigma, "frobenius_sq": frobenius_sq}
            if not finite or not math.isfinite(sigma):
                (new_u, new_v), w_hat = given, torch.full_like(w, float("nan"))
                stats = self.stats_of(w, NON_FINITE, **known)
            elif sigma <= eps:
                (new_u, new_v), w_hat = given, w
                stats = self.stats_of(w, PASS_THROUGH, **known, q=0, gamma=1, a=1, b=0)
            else:
                c = coefficients(w, new_u, new_v, target_rank, self.preserve, frobenius_sq)
                w_hat = combine(w, new_u, new_v, c)
                branch, kept = STABLE_RANK if c.active else SPECTRAL, min(c.kept, self.preserve)
                known |= {"q": c.q, "gamma": c.gamma, "a": c.a, "b": c.b[0], "kept": kept}
                stats = self.stats_of(w, branch, **known)
        return Normalized(w_hat, new_u.reshape(u.shape), new_v.reshape(v.shape), stats)

    def repeat(
        self, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float, eps: float
    ) -> Tensor:
        known = Stats(*stats)
        if known.branch == NON_FINITE:
            return torch.full_like(w, float("nan"))
        if known.branch == PASS_THROUGH:
            return w
        u, v = _blocks(u, v)
        c = coefficients(w, u, v, target_rank, self.preserve, known.frobenius_sq)
        return combine(w, u, v, c)

    def gradient(
        self, g: Tensor, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float
    ) -> Tensor:
        """L depends on W through a W and the scalars sigma_i, f of :class:`Coefficients`:
        dL/dW = a G + sum_i dL/dsigma_i u_i v_i^T + 2 dL/dF W.
        """
        known, (u, v), preserve, dtype = Stats(*stats), _blocks(u, v), self.preserve, w.dtype
        if known.branch == PASS_THROUGH:
            return g
        if known.branch == NON_FINITE:
            return torch.full_like(w, float("nan"))
        settled = None if torch.is_grad_enabled() else known.frobenius_sq
        c = coefficients(w, u, v, target_rank, preserve, settled)
        top, f, q, gamma, t = c.sigma[0], c.f, c.q, c.gamma, c.t
        g_w = (g * (w / top.to(dtype))).sum(dtype=torch.float64)  # <G, W> / sigma_1
        g_e = ((g @ v) * u).sum(0).double()  # u_i^T G v_i
        by_t, by_f = torch.zeros_like(t), torch.zeros_like(f)
        here = torch.arange(len(t), device=w.device) < c.kept
        if c.active and gamma > 0:
            if preserve == 0:
                r, m = target_rank, ((target_rank - 1) * q).sqrt()
                by_f = (m * g_e[0] - gamma * (g_w - g_e[0])) / (2 * q * r)
            else:
                by_gamma = g_w - torch.where(here, t * g_e, 0.0).sum()
                by_f = -by_gamma * gamma / (2 * q)
                by_total = by_gamma * (gamma - 1 / gamma) / (2 * q)
                by_t = torch.where(here, (1 - gamma) * g_e + 2 * by_total * t, 0.0)
        elif c.active and preserve > 1:
            by_t = torch.where(here, g_e, 0.0)
        rest = torch.cat([torch.zeros_like(by_t[:1]), by_t[1:]])  # t_1 = 1 does not change
        by_top = -c.a * top * g_w - (rest * t).sum() - 2 * f * by_f
        by_sigma = (rest + torch.cat([by_top.reshape(1), torch.zeros_like(t[1:])])) / top
        result = g * c.a.to(dtype) + (w / top.to(dtype)) * (2 * by_f / top).to(dtype)
        return torch.addmm(result, u * by_sigma.to(dtype), v.mT)

    def exact_part(
        self, g: Tensor, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float
    ) -> Tensor | None:
        """b_1 / sigma_1 times what the kept part's own turning adds to its fixed gradient."""
        known = Stats(*stats)
        if known.branch != STABLE_RANK:
            return None
        u, v = _blocks(u, v)
        c = coefficients(w, u, v, target_rank, self.preserve, known.frobenius_sq)
        here = torch.arange(len(c.t), device=w.device) < c.kept
        turned = top_part_gradient(g, w, u, c.sigma.to(w.dtype), v, here)
        fixed = (u * torch.where(here, ((g @ v) * u).sum(0), 0.0)) @ v.mT
        return (c.b[0] / c.sigma[0]).to(w.dtype) * (turned - fixed)

    def note(self, stats: Tensor) -> str:
        kept = int(Stats(*stats).kept)
        return f"keeps the top {kept} of preserve={self.preserve}; plain PyTorch (reference)"


def _blocks(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, pairs) and (columns, pairs), also of a single pair."""
    return u.reshape(len(u), -1), v.reshape(len(v), -1)
