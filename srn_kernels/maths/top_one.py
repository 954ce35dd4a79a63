"""The rule that the kernels serve, in plain PyTorch: Theorem 1 with k = 1 and Algorithm 2.

Source: Sanyal, Torr, Dokania (arXiv 1906.04659). What sums over a whole matrix (products with W and
inner products) stands apart from what follows from the sums, so that a matrix which lies with
several processes goes by the same formulas, with a reduction in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srn_kernels.maths.rule import Normalized, Rule
from srn_kernels.maths.scalars import (
    NON_FINITE,
    STABLE_RANK,
    Stats,
    contraction,
    gradient_coefficients,
    layer_stats,
    verdict,
)
from srn_kernels.maths.top_k import TopK
from srn_kernels.maths.turning import TopOuter, turning


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| and |x|, float64; a zero vector stays one."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return x.double() / torch.where(norm > 0, norm, 1.0), norm


def times(w: Tensor, v: Tensor) -> Tensor:
    """s = W v in float64; of some columns of W and their part of v, a summand of it."""
    return (w @ v.to(w.dtype)).double()


def times_back(w: Tensor, s: Tensor) -> Tensor:
    """t = W^T s in float64; of some rows of W and their part of s, a summand of it."""
    direction, norm = unit(s)  # t grows as sigma squared: multiply by the unit vector first
    return (w.mT @ direction.to(w.dtype)).double() * norm


class Step(NamedTuple):
    """One step of the power iteration, float64."""

    u: Tensor
    v: Tensor
    sigma: Tensor
    usable: Tensor  # whether u and v are directions


def step(s: Tensor, t: Tensor) -> Step:
    """u = W v / |W v|, v = W^T u / |W^T u| (Algorithm 2; u first) from s = W v and t = W^T s."""
    (u, s_norm), (v, t_norm) = unit(s), unit(t)
    usable = s_norm.isfinite() & (s_norm > 0) & t_norm.isfinite() & (t_norm > 0)
    return Step(u, v, t_norm / torch.where(s_norm > 0, s_norm, 1.0), usable)


def evaluated(u: Tensor, v: Tensor, sigma: Tensor) -> Step:
    """The step of an evaluation, from unit u, v and sigma = u^T W v with its sign, as in torch."""
    return Step(u, v, sigma, u.isfinite().all() & v.isfinite().all())


def inner_products(g: Tensor, scaled: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(<G, W> / sigma, u^T G v), float64, from ``scaled`` = W / sigma."""
    g_w = (g * scaled).sum(dtype=torch.float64)
    return torch.stack([g_w, (u @ (g @ v)).double()])


def gradient_of(
    g: Tensor,
    scaled: Tensor,
    u: Tensor,
    v: Tensor,
    inner: Tensor,
    sigma: Tensor,
    q: Tensor,
    gamma: Tensor,
    stats: Stats,
) -> Tensor:
    """dL/dW from :func:`inner_products`, and sigma, q, gamma as constants or functions of W."""
    good, active = stats.masks()
    g_w, g_e = inner
    moving = active & (stats.gamma > 0)
    x, y = gradient_coefficients(g_w, g_w - g_e, q, moving, active, good)
    result = g + x.to(g.dtype) * scaled + y.to(g.dtype) * torch.outer(u, v)
    result = (gamma / sigma).to(g.dtype) * result
    broken = stats.branch == NON_FINITE
    return torch.where(broken, torch.full_like(result, float("nan")), result)


class TopOne(Rule):
    """W_hat = gamma W / sigma + (1 - gamma) u v^T with sigma = u^T W v."""

    name = "stable_rank"
    kernels = split = True

    def pairs(self, rows: int, columns: int) -> int:
        return 1

    def preserving(self, preserve: int) -> Rule:
        return self if preserve == 1 else TopK(preserve)

    def normalize(
        self,
        w: Tensor,
        u: Tensor,
        v: Tensor,
        target_rank: float,
        iterations: int,
        eps: float,
        gradient: str = "frozen",
    ) -> Normalized:
        """Differentiable in ``w`` with u and v held constant, or not ("exact")."""
        with torch.no_grad():
            fixed, new = w.detach(), (u, v)
            for _ in range(iterations):
                s = times(fixed, new[1])
                made = step(s, times_back(fixed, s))
                new = made.u.to(u.dtype), made.v.to(u.dtype)
            if iterations == 0:
                new = unit(u)[0].to(u.dtype), unit(v)[0].to(u.dtype)
                made = evaluated(*new, new[0] @ (fixed @ new[1]))
                new = made.u, made.v
            finite = fixed.isfinite().all()
            usable = finite & made.usable
            if iterations > 0:  # a zero or non-finite weight leaves u and v as they were
                new = tuple(torch.where(usable, x, old) for x, old in zip(new, (u, v), strict=True))
        new_u, new_v = new
        sigma = (new_u @ (w @ new_v)).double()
        with torch.no_grad():
            seen = verdict(sigma, usable, finite, eps)
        if iterations > 0:
            new_u, new_v = torch.where(seen.good, new_u, u), torch.where(seen.good, new_v, v)
        divisor = torch.where(seen.good, sigma, 1.0).to(w.dtype)
        scaled = w / divisor
        # |W / sigma - u v^T|_F^2 = |W|_F^2 / sigma^2 - 1 for any unit u, v with sigma = u^T W v.
        q = (scaled.square().sum(dtype=torch.float64) - 1.0).clamp_min(0.0)
        active, gamma = contraction(q, target_rank, seen.good)
        outer = torch.outer(new_u, new_v)
        if gradient == "exact":
            outer = TopOuter.apply(w, new_u, divisor, new_v)
        rest = torch.where(seen.good, 1.0 - gamma, 0.0)
        w_hat = gamma.to(w.dtype) * scaled + rest.to(w.dtype) * outer
        w_hat = torch.where(seen.broken, torch.full_like(w_hat, float("nan")), w_hat)
        with torch.no_grad():
            frobenius_sq = fixed.double().square().sum()
            stats = layer_stats(sigma.detach(), frobenius_sq, q, gamma, active, seen)
        return Normalized(w_hat, new_u, new_v, stats)

    def repeat(
        self,
        w: Tensor,
        u: Tensor,
        v: Tensor,
        stats: Tensor,
        target_rank: float = 0.0,
        eps: float = 0.0,
    ) -> Tensor:
        """a W + b u v^T: the round's statistics hold all that r and eps decide."""
        known = Stats(*stats)
        return known.a.to(w.dtype) * w + known.b.to(w.dtype) * torch.outer(u, v)

    def gradient(
        self, g: Tensor, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float
    ) -> Tensor:
        """With sigma = u^T W v, E = u v^T, q = |W|_F^2 / sigma^2 - 1, d = <G, W> / sigma - u^T G v:
        dL/dW = a (G - <G, W> / sigma E) on the spectral branch, and
        dL/dW = a (G - d / (q sigma) W + ((q + 1) / q d - <G, W> / sigma) E) on the stable-rank one.
        """
        known = Stats(*stats)
        good, active = known.masks()
        sigma = torch.where(good, (u @ (w @ v)).double(), 1.0)
        scaled = w / sigma.to(w.dtype)
        # gamma = sqrt(r - 1) / sqrt(q) as a function of W; sqrt(r - 1) is a constant of the layer.
        excess = known.gamma * known.q.clamp_min(0.0).sqrt()
        moving = active & (known.gamma > 0)
        q = torch.where(moving, scaled.square().sum(dtype=torch.float64) - 1.0, 1.0)
        gamma = torch.where(active, torch.where(moving, excess * q.rsqrt(), 0.0), 1.0)
        inner = inner_products(g, scaled, u, v)
        return gradient_of(g, scaled, u, v, inner, sigma, q, gamma, known)

    def exact_part(
        self, g: Tensor, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float
    ) -> Tensor | None:
        """b (x v^T + u y^T), see :mod:`srn_kernels.maths.turning`; nothing where b = 0."""
        known = Stats(*stats.tolist())
        if known.branch != STABLE_RANK or known.b == 0:
            return None
        a, b = (g @ v).unsqueeze(-1), (g.mT @ u).unsqueeze(-1)
        s = u.new_full((1,), known.sigma)
        x, y = turning(w, u.unsqueeze(-1), s, v.unsqueeze(-1), a, b)
        part = torch.outer(x[:, 0], v) + torch.outer(u, y[:, 0])
        return part * (known.b / known.sigma)

    def note(self, stats: Tensor) -> str:
        return ""


TOP_ONE = TopOne()
