"""How the top singular vectors turn with W: what the frozen-u,v gradient leaves out.

For singular triples (s_i, u_i, v_i), i <= k, and vectors a_i, b_i orthogonal to all u and all v,

    s_i x_i - W y_i = a_i,    s_i y_i - W^T x_i = b_i,    x_i in U's complement, y_i in V's

give the adjoint of W -> (U, V): sum_i x_i v_i^T + u_i y_i^T. With y_i eliminated the system is
symmetric, and positive definite with smallest eigenvalue 1 - (s_{k+1} / s_i)^2: a case for
conjugate gradients, two matrix products a step and no decomposition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Conjugate gradients end here at the latest; convergence takes about sqrt(1 / gap) steps.
ITERATIONS = 500
# How often the host looks whether all systems are solved.
_LOOK_EVERY = 8


class Accuracy(NamedTuple):
    """Of the solution, for a dtype."""

    tolerance: float  # of the residual, relative to the right-hand side
    gap: float  # 1 - (s_j / s_i)^2 below it counts as repeated


ACCURACY = {torch.float64: Accuracy(1e-12, 1e-7), torch.float32: Accuracy(1e-5, 1e-3)}


def _off(x: Tensor, basis: Tensor) -> Tensor:
    """The part of x orthogonal to the columns of ``basis``."""
    return x - basis @ (basis.mT @ x)


def turning(
    w: Tensor, u: Tensor, s: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """s_i x_i and s_i y_i for the equations above; a and b are projected first.

    w: (..., rows, columns), float32 or float64; u, a: (..., rows, k); s: (..., k), positive;
    v, b: (..., columns, k). Returns tensors of the shapes of a and b.

    Where s_{k+1} comes within ``ACCURACY[dtype].gap`` of s_i, W does not determine u_i, v_i, and
    the solution is Steihaug's truncated one: conjugate gradients stop before they meet a curvature
    below the gap, or leave the ball of radius |right-hand side| / gap. So the result is never
    longer than it could be at that gap, and it stays finite.
    """
    if w.shape[-2] > w.shape[-1]:
        y, x = turning(w.mT, v, s, u, b, a)
        return x, y
    tolerance, gap = ACCURACY[w.dtype]
    a, b, s = _off(a, u), _off(b, v), s.unsqueeze(-2)

    def product(x: Tensor) -> Tensor:  # P W Q W^T x / s^2
        return _off(w @ (_off(w.mT @ x, v) / s), u) / s

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-2, keepdim=True)

    r = a + _off(w @ b, u) / s
    x, p, rr = torch.zeros_like(r), r, dot(r, r)
    start = rr
    active = start > 0
    for step in range(ITERATIONS):
        if step % _LOOK_EVERY == 0 and not active.any():
            break
        ap = p - product(p)
        curvature = dot(p, ap)
        active = active & (curvature > gap * dot(p, p))
        alpha = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)
        new = x + alpha * p
        active = active & (dot(new, new) * gap**2 <= start)
        x = torch.where(active, new, x)
        r = r - alpha * ap
        new_rr = dot(r, r)
        active = active & (new_rr > tolerance**2 * start)
        p = r + torch.where(active, new_rr / torch.where(rr > 0, rr, 1.0), 0.0) * p
        rr = new_rr
    return x, b + _off(w.mT @ x, v) / s


class TopOuter(torch.autograd.Function):
    """u v^T of the top singular pair of W, given with its sigma; its derivative is exact."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(w, u, sigma, v)
        return torch.outer(u, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, u, sigma, v = ctx.saved_tensors
        a, b = (g @ v).unsqueeze(-1), (g.mT @ u).unsqueeze(-1)
        x, y = turning(w, u.unsqueeze(-1), sigma.reshape(1), v.unsqueeze(-1), a, b)
        return (torch.outer(x[:, 0], v) + torch.outer(u, y[:, 0])) / sigma, None, None, None


def top_part_gradient(
    g: Tensor,
    w: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    mask: Tensor,
    offset: Tensor | float = 0.0,
) -> Tensor:
    """dL/dW from the gradient G of L by sum of (s_i - offset) u_i v_i^T over the i in ``mask``.

    The Daleckii-Krein formula (divided differences of the spectral function): it needs no gap among
    the masked triples, nor among the others. Shapes as in :func:`turning`; mask: (..., k), bool.
    """
    gv, gu = g @ v, g.mT @ u
    core = u.mT @ gv
    h = torch.where(mask, s - offset, 0.0)
    (hi, hj), (si, sj), (mi, mj) = ((t.unsqueeze(-1), t.unsqueeze(-2)) for t in (h, s, mask))
    split, total = mi != mj, si + sj
    even = torch.where(split, (hi - hj) / torch.where(split, si - sj, 1.0), (mi & mj).to(s))
    odd = torch.where(total > 0, (hi + hj) / torch.where(total > 0, total, 1.0), even)
    core = (even * (core + core.mT) + odd * (core - core.mT)) / 2
    result = u @ core @ v.mT
    if mask.any():
        # How u_i, v_i turn against everything outside the block.
        divisor, here = torch.where(mask, s, 1.0), mask.unsqueeze(-2)
        x, y = turning(w, u, divisor, v, gv * here, gu * here)
        share = (h / divisor).unsqueeze(-2)
        result = result + (x * share) @ v.mT + u @ (y * share).mT
    return result
