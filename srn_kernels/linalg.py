"""Matrix functions around the stable rank (arXiv 1906.04659), batched over leading dimensions.

``method="power"`` needs products with W and factorisations of thin blocks, on W's device;
``method="svd"`` decomposes W and is what the former is tested against. Both are differentiable,
once, in the same way: :mod:`srn_kernels.turning`. The arithmetic is that of W's dtype, float32 for
half and bfloat16.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srn_kernels.maths.turning import top_part_gradient, turning

# The block carries some more vectors than asked for: convergence goes by the gap behind them.
_OVERSAMPLING = 4
# Power steps between two Rayleigh-Ritz projections, each on the space of all these steps.
_SWEEP = 8
# What the functions built on top_singular ask of it.
_TOLERANCE = 1e-8


class _Triples(NamedTuple):
    U: Tensor
    S: Tensor
    V: Tensor


class TopSingular(_Triples):
    """(U, S, V) of :func:`top_singular`, which knows how good they are.

    ``residual`` (..., k): the larger of |W v - s u| and |W^T u - s v|, computed from U, S, V
    themselves, plus what rounding can hide in them, eps (4 |W|_F + sqrt(n) s_1) with n =
    max(rows, columns): a singular value of W lies within it of each s. Another method's value,
    an SVD's for instance, has its own rounding besides, up to about n eps s_1.
    ``iterations``: power steps taken. ``converged`` (...): whether the tolerance was met.
    """

    residual: Tensor
    iterations: int
    converged: Tensor


def _matrix(W: Any) -> Tensor:
    if not isinstance(W, Tensor) or not (W.is_floating_point() or W.is_complex()):
        raise TypeError(f"W must be a floating-point tensor, got {getattr(W, 'dtype', type(W))}")
    if W.dim() < 2:
        raise ValueError(f"W must have two dimensions or more, got shape {tuple(W.shape)}")
    return W.float() if W.dtype in (torch.float16, torch.bfloat16) else W


def _scaled(W: Any) -> tuple[Tensor, Tensor]:
    """W over a power of two near its largest element, so that squares stay in range; and that."""
    w = _matrix(W)
    if w.is_complex():
        raise TypeError(f"W must be real, got {w.dtype}")
    if not w.isfinite().all():
        raise ValueError("W has elements that are not finite")
    if w.numel() == 0:
        return w, w.new_ones(w.shape[:-2])
    largest = w.detach().abs().amax((-2, -1))
    _, exponent = torch.frexp(largest)
    # 2^exponent itself may be infinite: half of it, twice, is not.
    scale = torch.ldexp(torch.ones_like(largest), exponent - 1)
    return w / scale[..., None, None], torch.where(largest > 0, scale, 1.0)


def _check_method(method: str) -> None:
    if method not in ("power", "svd"):
        raise ValueError(f"method must be 'power' or 'svd', got {method!r}")


def _number(value: Any, argument: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    return float(value)


def _integer(value: Any, argument: str, smallest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < smallest:
        raise ValueError(f"{argument} must be at least {smallest}, got {value}")
    return value


def stable_rank(W: Tensor) -> Tensor:
    """|W|_F^2 / |W|_2^2, between 1 and rank(W) (arXiv 1906.04659, Definition 3.1).

    W: (..., rows, columns), real or complex floating point. Returns (...), real, differentiable;
    0 for a zero matrix. Raises TypeError for other dtypes, ValueError for fewer dimensions or
    elements that are not finite.

    Example:
        >>> srn.linalg.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        tensor(1.5000)
    """
    W = _matrix(W)
    if not W.isfinite().all():
        raise ValueError("W has elements that are not finite")
    if W.numel() == 0:
        return W.new_zeros(W.shape[:-2]).real
    s = torch.linalg.svdvals(W)
    top = s[..., :1]
    safe = torch.where(top > 0, top, 1.0)
    return (s / safe).square().sum(-1)


# --- singular triples -----------------------------------------------------------------------------


def _orthonormal(x: Tensor, against: Tensor | None = None) -> Tensor:
    """An orthonormal basis of x's columns, without their part along those of ``against``."""
    if against is not None:
        x = x - against @ (against.mT @ x)
    return torch.linalg.qr(x).Q


def _ritz(w: Tensor, basis: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best k triples with v in the span of an orthonormal basis: W v = s u exactly."""
    q, r = torch.linalg.qr(w @ basis)
    left, s, right = torch.linalg.svd(r)
    return q @ left[..., :k], s[..., :k], basis @ right.mT[..., :k]


def _residual(w: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    one = torch.linalg.vector_norm(w @ v - u * s.unsqueeze(-2), dim=-2)
    other = torch.linalg.vector_norm(w.mT @ u - v * s.unsqueeze(-2), dim=-2)
    return torch.maximum(one, other)


def power_triples(
    w: Any, k: int, iterations: int, tol: float, oversampling: int = _OVERSAMPLING
) -> TopSingular:
    """Block power iteration on W^T W from a fixed start, best for columns <= rows.

    w: a tensor (..., rows, columns), or a linear operator with shape, dtype, device, mT and @.

    A sweep keeps the blocks of its power steps and projects W on all of them (Rayleigh-Ritz on a
    block Krylov space): the best combination of the steps instead of the last one.
    """
    columns = w.shape[-1]
    block = min(columns, k + oversampling)
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(columns, block, generator=generator, dtype=torch.float64, device="cpu")
    x = torch.linalg.qr(start).Q.to(w.device, w.dtype).expand(*w.shape[:-2], columns, block)
    frobenius = torch.linalg.matrix_norm(w) if isinstance(w, Tensor) else None
    done, before = 0, torch.inf
    while True:
        basis = x
        steps = min(_SWEEP, iterations - done, max(1, columns // block))
        for _ in range(steps - 1):
            x = _orthonormal(w.mT @ (w @ x), basis)
            basis = torch.cat([basis, x], -1)
        if steps > 1:  # orthonormal to rounding, also where the power steps ran out of directions
            basis = _orthonormal(basis)
        u, s, v = _ritz(w, basis, block)
        done += steps
        # W v is off by about the unit roundoff times |W|_F for a unit v.
        rounding = 4 * torch.finfo(w.dtype).eps * (s[..., 0] if frobenius is None else frobenius)
        residual = _residual(w, u[..., :k], s[..., :k], v[..., :k])
        worst = residual.amax(-1)
        met = worst <= torch.maximum(tol * s[..., 0], rounding)
        # Long columns round more: a sweep that no longer helps, this close, has got there too.
        met |= (worst > before / 2) & (worst <= math.sqrt(w.shape[-2]) * rounding)
        before = worst
        if done >= iterations or met.all():
            break
        # The next sweep starts from one power step beyond the Ritz vectors.
        x = _orthonormal(w.mT @ u)
    found = TopSingular(u[..., :k], s[..., :k], v[..., :k])
    # What of a row lies along v adds up in one direction: its rounding grows like sqrt(n).
    aligned = math.sqrt(max(w.shape[-2:])) * torch.finfo(w.dtype).eps * s[..., 0]
    found.residual = residual + (rounding + aligned).unsqueeze(-1)
    found.iterations, found.converged = done, met
    return found


def _top(w: Tensor, k: int, method: str, iterations: int, tol: float) -> TopSingular:
    """Triples of a scaled matrix, without a graph."""
    with torch.no_grad():
        w = w.detach()
        if method == "svd":
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            return TopSingular(u[..., :k], s[..., :k], vh.mT[..., :k])
        if w.shape[-2] >= w.shape[-1]:
            return power_triples(w, k, iterations, tol)
        found = power_triples(w.mT, k, iterations, tol)
        turned = TopSingular(found.V, found.S, found.U)
        turned.__dict__.update(found.__dict__)
        return turned


class _Differentiable(torch.autograd.Function):
    """Gives (U, S, V), found without a graph, the derivative of a singular value decomposition."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(w, u, s, v)
        return u.clone(), s.clone(), v.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gu: Tensor, gs: Tensor, gv: Tensor) -> tuple[Tensor | None, ...]:
        w, u, s, v = ctx.saved_tensors
        core = torch.diag_embed(gs)
        if gu.any() or gv.any():
            f = s.square().unsqueeze(-2) - s.square().unsqueeze(-1)
            f = 1 / f.masked_fill(
                torch.eye(s.shape[-1], dtype=torch.bool, device=s.device), math.inf
            )
            a, b = f * (u.mT @ gu), f * (v.mT @ gv)
            core = core + (a + a.mT) * s.unsqueeze(-2) + s.unsqueeze(-1) * (b + b.mT)
            x, y = (t / s.unsqueeze(-2) for t in turning(w, u, s, v, gu, gv))
            return u @ core @ v.mT + x @ v.mT + u @ y.mT, None, None, None
        return u @ core @ v.mT, None, None, None


def top_singular(W: Tensor, k: int, *, iterations: int = 1000, tol: float = 1e-6) -> TopSingular:
    """The top k singular triples by block power iteration from a fixed start.

    W: (..., rows, columns), real floating point. It stops when
    max(|W v - s u|, |W^T u - s v|) <= tol * s_1, or what rounding allows, in every matrix of the
    batch, or after ``iterations`` power steps.

    Returns (U, S, V): (..., rows, k), (..., k) in descending order and (..., columns, k), float32
    for half and bfloat16; a :class:`TopSingular` with the certified residual. U and V are
    differentiable where the singular values differ, S where they are distinct from the next.

    Raises TypeError or ValueError for a wrong W, k (1 to min(rows, columns)), iterations or tol.

    Example:
        >>> found = srn.linalg.top_singular(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=2)
        >>> found.S, bool(found.converged)
        (tensor([3.0000, 2.0000]), True)
    """
    _integer(k, "k", 1)
    _integer(iterations, "iterations", 1)
    if not 0 <= _number(tol, "tol") < math.inf:
        raise ValueError(f"tol must be finite and not negative, got {tol}")
    w, scale = _scaled(W)
    if k > min(w.shape[-2:]):
        raise ValueError(f"k must be at most min(rows, columns) of {tuple(w.shape)}, got {k}")
    if w.numel() == 0:
        raise ValueError(f"W must have elements, got shape {tuple(w.shape)}")
    found = _top(w, k, "power", iterations, tol)
    u, s, v = found
    if torch.is_grad_enabled() and w.requires_grad:
        u, s, v = _Differentiable.apply(w, u, s, v)
    scale = scale.unsqueeze(-1)
    result = TopSingular(u, s * scale, v)
    result.residual = found.residual * scale
    result.iterations, result.converged = found.iterations, found.converged
    return result


# --- Theorem 1 and Algorithms 1 and 3 -------------------------------------------------------------


class _TopPart(torch.autograd.Function):
    """sum of (s_i - offset) u_i v_i^T over the triples in ``mask``: a spectral function of W."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        u: Tensor,
        s: Tensor,
        v: Tensor,
        mask: Tensor,
        offset: Tensor | float,
    ) -> Tensor:
        ctx.save_for_backward(w, u, s, v, mask)
        ctx.offset = offset
        return (u * torch.where(mask, s - offset, 0.0).unsqueeze(-2)) @ v.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return top_part_gradient(g, *ctx.saved_tensors, ctx.offset), None, None, None, None, None


def nearest_with_stable_rank(
    W: Tensor, r: float, k: int = 1, *, method: str = "power"
) -> tuple[Tensor, int | Tensor, float | Tensor]:
    """The nearest matrix with stable rank r that keeps the top k singular values.

    Theorem 1 and Algorithm 1 of arXiv 1906.04659. With S1 the top max(1, k) singular terms of W,
    S2 = W - S1 and gamma = sqrt(r s_1^2 - |S1|_F^2) / |S2|_F, it is S1 + gamma S2 for k >= 1. If r
    is too small for k, the largest index that can be preserved, at least floor(r), is. For k = 0
    nothing has to be preserved: gamma_1 S1 + gamma_2 S2, gamma_2 = (gamma + r - 1) / r,
    gamma_1 = gamma_2 / gamma, which is nearer to W, and whose spectral norm exceeds W's.

    Args:
        W: (..., rows, columns), real floating point.
        r: the stable rank, at least 1. If W's is not above it, W is returned as it is.
        k: how many singular values to keep, 0 or more.
        method: "power" or "svd".

    Returns:
        (W_hat, k_kept, gamma): W's shape and dtype, an int and a float; for a batch, an int64 and
        a float64 tensor (...). Where nothing has to be done, k_kept = min(k, rank(W)), gamma = 1.
        W_hat is differentiable in W, once, where s_kept > s_{kept + 1}.

    Raises:
        TypeError, ValueError: a wrong W (also one that is not finite), r, k or method.

    Example:
        >>> W_hat, kept, gamma = srn.linalg.nearest_with_stable_rank(torch.eye(5), 2.0)
        >>> kept, round(gamma, 4), round(srn.linalg.stable_rank(W_hat).item(), 4)
        (1, 0.5, 2.0)
    """
    _check_method(method)
    _integer(k, "k", 0)
    if not _number(r, "r") >= 1:
        raise ValueError(f"r must be at least 1, got {r}")
    w, scale = _scaled(W)
    batch, smaller = w.shape[:-2], min(w.shape[-2:])
    r = min(r, 2.0 * smaller)  # beyond every stable rank, but finite
    if w.numel() == 0:
        return _as_returned(W.clone(), torch.zeros(batch), torch.ones(batch))
    found = _top(w, min(max(k, 1), smaller), method, 1000, _TOLERANCE)
    u, s, v = found
    eps = torch.finfo(w.dtype).eps
    squares = s.double().square()
    top = squares[..., 0]
    frobenius_sq = w.detach().double().square().sum((-2, -1))
    acts = frobenius_sq > r * top * (1 + 8 * eps)
    # Algorithm 1 stops at the first i with s_1^2 + ... + s_i^2 > r s_1^2.
    slack = 1e-6 if w.dtype == torch.float32 else 1e-12
    feasible = squares.cumsum(-1) <= (r * top * (1 + slack)).unsqueeze(-1)
    kept = feasible.sum(-1)
    place = torch.arange(s.shape[-1], device=s.device)
    mask = place < kept.unsqueeze(-1)

    if torch.is_grad_enabled() and w.requires_grad:
        s = ((w @ v) * u).sum(-2)
    first = _TopPart.apply(w, u, s.detach(), v, mask, 0.0)
    rest = w - first
    with torch.no_grad():
        length = torch.linalg.matrix_norm(rest, dtype=w.dtype)
        acts &= length > 0
        inverse = 1 / torch.where(acts, length, 1.0)
    # |S2| with its derivative <S2, dW> / |S2|: S2 is orthogonal to what turns.
    length = (rest.detach() * w).sum((-2, -1)) * inverse
    left = r * s[..., 0].square() - (s.square() * mask).sum(-1)
    left = torch.where(left > 4 * eps * s[..., 0].square(), left, 0.0)
    root = torch.where(left > 0, torch.where(left > 0, left, 1.0).sqrt(), 0.0)
    gamma = torch.where(acts, root / torch.where(acts, length, 1.0), 1.0)
    if k == 0:
        # gamma_1 = (1 + sqrt(r - 1) |S2| / s_1) / r is finite at r = 1 too.
        one = (1 + math.sqrt(r - 1) * length / s[..., 0].clamp_min(1e-30)) / r
        two = (gamma + r - 1) / r
        result = one[..., None, None] * first + two[..., None, None] * rest
    else:
        result = first + gamma[..., None, None] * rest
    result = torch.where(acts[..., None, None], result * scale[..., None, None], _matrix(W))
    with torch.no_grad():
        rank = (squares > (eps * max(w.shape[-2:])) ** 2 * top.unsqueeze(-1)).sum(-1)
        kept = torch.where(acts, kept, rank).clamp_max(k)
    return _as_returned(result.to(W.dtype), kept, gamma.detach())


def _as_returned(
    result: Tensor, kept: Tensor, gamma: Tensor
) -> tuple[Tensor, int | Tensor, float | Tensor]:
    if result.dim() == 2:
        return result, int(kept), float(gamma)
    return result, kept.long(), gamma.double()


def spectral_clip(W: Tensor, s: float, *, method: str = "power") -> Tensor:
    """The nearest matrix with spectral norm at most s: singular values min(s_i, s).

    Algorithm 3 of arXiv 1906.04659 (optimal spectral normalisation; the projection on a convex
    set). W: (..., rows, columns), real floating point; s: a positive number, inf leaves W as it
    is; method: "power", whose cost grows with the number of singular values above s, or "svd".
    Returns a tensor of W's shape and dtype, differentiable once where no s_i equals s.

    Raises TypeError or ValueError for a wrong W (also one that is not finite), s or method.

    Example:
        >>> srn.linalg.spectral_clip(torch.diag(torch.tensor([3.0, 1.0])), 2.0).diagonal()
        tensor([2.0000, 1.0000])
    """
    _check_method(method)
    if not _number(s, "s") > 0:
        raise ValueError(f"s must be positive, got {s}")
    w, scale = _scaled(W)
    if w.numel() == 0:
        return W.clone()
    limit = (s / scale.double()).unsqueeze(-1)
    smaller = min(w.shape[-2:])
    size = smaller if method == "svd" else min(_OVERSAMPLING, smaller)
    while True:
        u, values, v = _top(w, size, method, 1000, _TOLERANCE)
        above = values > limit
        if size == smaller or not above[..., -1].any():
            break
        size = min(2 * size, smaller)
    excess = _TopPart.apply(w, u, values, v, above, limit.to(values))
    return (_matrix(W) - excess * scale[..., None, None]).to(W.dtype)
