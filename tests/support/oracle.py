"""Float64 oracle by dense formulas, the weights that tests share, and bounds on rounding errors.

Nothing here uses ``srn_kernels.reference``: E = u v^T and R = W / sigma - E are formed explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SPECTRAL, STABLE_RANK, PASS_THROUGH, NON_FINITE = range(4)


def matrix_of(weight: Tensor, dim: int) -> Tensor:
    """The float64 matrix of a weight: row i is ``weight.select(dim, i)``."""
    order = [dim % weight.dim(), *(d for d in range(weight.dim()) if d != dim % weight.dim())]
    return weight.detach().permute(order).reshape(weight.shape[dim], -1).double()


def state_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class Layer(NamedTuple):
    """One normalised matrix, all in float64."""

    w: Tensor
    u: Tensor
    v: Tensor
    sigma: float
    frobenius_sq: float
    q: float
    gamma: float
    branch: int
    w_hat: Tensor

    @property
    def outer(self) -> Tensor:
        return torch.outer(self.u, self.v)

    @property
    def rest(self) -> Tensor:
        return self.w / self.sigma - self.outer


def iterate(w: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """u, v after power iterations; unit and of either sign of sigma where ``iterations`` is 0."""
    u, v = u.double(), v.double()
    if iterations == 0:
        u, v = u / u.norm(), v / v.norm()
        return u, v
    for _ in range(iterations):
        s = w @ v
        t = w.T @ s
        if s.norm() == 0 or not bool(s.isfinite().all()):
            return u, v
        u, v = s / s.norm(), t / t.norm()
    return u, v


def normalized(w: Tensor, u: Tensor, v: Tensor, rank: float, eps: float = 1e-12) -> Layer:
    """W_hat for given unit vectors by the definition, q as the squared norm of R itself."""
    u, v = u.double(), v.double()
    sigma, frobenius_sq = float(u @ w @ v), float(w.square().sum())
    if not math.isfinite(sigma) or not math.isfinite(frobenius_sq):
        nan = float("nan")
        return Layer(w, u, v, sigma, frobenius_sq, nan, nan, NON_FINITE, torch.full_like(w, nan))
    if abs(sigma) <= eps:
        return Layer(w, u, v, sigma, frobenius_sq, 0.0, 1.0, PASS_THROUGH, w)
    e = torch.outer(u, v)
    r = w / sigma - e
    q = float(r.square().sum())
    if q <= rank - 1:
        return Layer(w, u, v, sigma, frobenius_sq, q, 1.0, SPECTRAL, w / sigma)
    gamma = math.sqrt((rank - 1) / q)
    return Layer(w, u, v, sigma, frobenius_sq, q, gamma, STABLE_RANK, e + gamma * r)


def gradient(layer: Layer, g: Tensor) -> Tensor:
    """dL/dW for constant u and v, in its geometric form: G without its parts along E and R."""
    if layer.branch == PASS_THROUGH:
        return g
    e, r = layer.outer, layer.rest
    if layer.branch == SPECTRAL:
        return (g - (g * layer.w).sum() / layer.sigma * e) / layer.sigma
    if layer.gamma == 0:
        return torch.zeros_like(g)
    along_e, along_r = (g * e).sum(), (g * r).sum() / layer.q
    return layer.gamma / layer.sigma * (g - along_e * e - along_r * r)


# Bounds. ``unit`` is half the distance from 1 to the next number of a format.


def unit_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def spacing(dtype: torch.dtype) -> float:
    """The distance between subnormal numbers: the error that underflow may add."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def summed(n: int, unit: float) -> float:
    """Relative error of a sum of n terms: 8 standard deviations of n random roundings."""
    return 8 * math.sqrt(n) * unit


class Bounds:
    """First-order bounds on what arithmetic with ``unit`` does to a layer's numbers.

    A matrix-vector product is off by e |W|_F for unit vectors (e: the error of a sum), and a
    normalised vector by twice its relative error.
    """

    def __init__(self, layer: Layer, unit: float) -> None:
        rows, columns = layer.w.shape
        self.layer, self.unit = layer, unit
        self.frobenius = math.sqrt(layer.frobenius_sq)
        self.row_error, self.column_error = summed(columns, unit), summed(rows, unit)
        if layer.branch >= PASS_THROUGH:
            self.sigma = self.q = self.gamma = 0.0
            return
        # sigma^ - u^T W v: two products, each off by e |W|_F.
        both = self.row_error + self.column_error
        self.sigma = 2 * both * self.frobenius / abs(layer.sigma)
        # q + 1 = |W|_F^2 / sigma^2, gamma ~ q^-1/2.
        self.q = (layer.q + 1) * (2 * self.sigma + self.row_error)
        active = layer.branch == STABLE_RANK
        self.gamma = layer.gamma * self.q / (2 * layer.q) if active else 0.0

    def w_hat(self, out: torch.dtype) -> Tensor:
        """Of each element of gamma W / sigma + (1 - gamma) E, rounded to ``out``."""
        layer, unit = self.layer, self.unit
        rounding = unit_of(out) * layer.w_hat.abs() + spacing(out)
        if layer.branch >= PASS_THROUGH:
            return rounding
        scaled = self.gamma + layer.gamma * (self.sigma + 4 * unit)
        along = self.gamma + 4 * unit
        return layer.w.abs() / abs(layer.sigma) * scaled + layer.outer.abs() * along + rounding

    def gradient(self, g: Tensor, out: torch.dtype) -> Tensor:
        """Of each element of gamma / sigma (G - d / q W / sigma + (d / q - <G, E>) E)."""
        layer, unit = self.layer, self.unit
        expected = gradient(layer, g).abs()
        rounding = unit_of(out) * expected + spacing(out)
        if layer.branch == PASS_THROUGH or layer.gamma == 0:
            return rounding
        w, e, q = (layer.w / layer.sigma).abs(), layer.outer.abs(), layer.q
        error = summed(layer.w.shape[1], unit)
        along_e = error * float((g.abs() * e).sum())
        along_w = error * float((g.abs() * w).sum())
        along_w += abs(float((g * layer.w).sum() / layer.sigma)) * self.sigma
        weight_part = outer_part = weight_error = 0.0
        outer_error = along_w
        if layer.branch == STABLE_RANK:
            weight_part = abs(float((g * layer.rest).sum())) / q
            outer_part = weight_part
            weight_error = (along_w + along_e) / q + weight_part * self.q / q
            outer_error = weight_error + along_w + along_e
        outer_part += abs(float((g * layer.w).sum() / layer.sigma)) + float((g.abs() * e).sum())
        parts = 4 * unit * (g.abs() + weight_part * w + outer_part * e)
        parts = parts + weight_error * w + outer_error * e
        common = self.gamma / layer.gamma + self.sigma + 4 * unit
        return layer.gamma / abs(layer.sigma) * parts + common * expected + rounding


def iteration_bounds(
    w: Tensor, u: Tensor, v: Tensor, iterations: int, unit: float
) -> tuple[float, float]:
    """How far rounding may move u and v: each product adds e |W|_F and passes on |W|_2 times."""
    rows, columns = w.shape
    if iterations == 0:
        return 4 * unit, 4 * unit
    frobenius, dv, du = float(w.norm()), 0.0, 0.0
    gram = (w @ w.T if rows <= columns else w.T @ w) / frobenius**2
    # |W|_2 <= (sum of s_i^16)^(1/16), and close to it.
    largest = frobenius * float((gram @ gram @ gram @ gram).norm()) ** (1 / 8)
    v = v.double()
    for _ in range(iterations):
        s = w @ v
        ds = largest * dv + summed(columns, unit) * frobenius
        du = 2 * ds / float(s.norm()) + 2 * unit
        t = w.T @ (s / s.norm())
        dt = largest * du + summed(rows, unit) * frobenius
        dv = 2 * dt / float(t.norm()) + 2 * unit
        v = t / t.norm()
    return du, dv


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """Compared in float64; a NaN or an infinity fails."""
    excess = (actual.detach().double() - expected).abs() - bound
    worst = excess.max().item() if excess.numel() else -1.0
    assert worst <= 0, f"{what}: beyond its bound by {worst:.3g}"


def assert_forward(
    weight: Tensor,
    dim: int,
    before: tuple[Tensor, Tensor],
    rank: float,
    iterations: int,
    out: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    stats: Tensor | None = None,
    eps: float = 1e-12,
    what: str = "layer",
) -> Layer:
    """A backend's u, v against the oracle's iteration, its W_hat against the oracle at its u, v."""
    w = matrix_of(weight, dim)
    # The oracle rounds in float64 too: twice the error where the backend computes in float64.
    unit = unit_of(state_dtype(weight)) * (2 if weight.dtype == torch.float64 else 1)
    expected_u, expected_v = iterate(w, *before, iterations)
    layer = normalized(w, u, v, rank if min(w.shape) > 1 else math.inf, eps)
    if layer.branch < PASS_THROUGH:
        du, dv = iteration_bounds(w, *before, iterations, unit)
        assert_within(u, expected_u, du, f"{what}: u")
        assert_within(v, expected_v, dv, f"{what}: v")
    bounds = Bounds(layer, unit)
    assert_within(matrix_of(out, dim), layer.w_hat, bounds.w_hat(out.dtype), f"{what}: W_hat")
    assert out.shape == weight.shape
    if stats is not None:
        sigma, frobenius_sq, q, gamma, a, b, branch, *_ = stats.tolist()
        assert branch == layer.branch, f"{what}: branch"
        scale = max(abs(layer.sigma), 1e-300)
        pairs = [
            ("frobenius_sq", frobenius_sq, layer.frobenius_sq, layer.frobenius_sq),
            ("b", b, 1 - layer.gamma, 1.0),
        ]
        relative = bounds.row_error + bounds.gamma + 4 * unit
        if layer.branch < PASS_THROUGH:
            pairs += [
                ("sigma", sigma, layer.sigma, scale),
                ("q", q, layer.q, layer.q + 1),
                ("gamma", gamma, layer.gamma, 1.0),
                ("a", a, layer.gamma / layer.sigma, 1 / scale),
            ]
            relative += bounds.sigma + bounds.q / (layer.q + 1)
        for name, got, want, size in pairs:
            assert abs(got - want) <= relative * size, f"{what}: {name} = {got}, expected {want}"
    return layer


def assert_gradient(layer: Layer, grad_out: Tensor, grad: Tensor, dim: int, what: str) -> None:
    """A backend's dL/dW against the oracle at the same u and v."""
    unit = unit_of(state_dtype(grad)) * (2 if grad.dtype == torch.float64 else 1)
    g = matrix_of(grad_out, dim)
    bound = Bounds(layer, unit).gradient(g, grad.dtype)
    assert_within(matrix_of(grad, dim), gradient(layer, g), bound, f"{what}: dL/dW")


# Weights.

SMALL = [(1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (27, 63), (63, 27), (5, 1000), (1000, 5), (40, 16)]
LARGE = [(12, 13824), (2048, 20), (300, 2500)]  # wide; tall; many slabs, so many tiles


def _kernel(columns: int) -> tuple[int, int]:
    """(channels, k) with channels k^2 = columns."""
    return next((columns // k**2, k) for k in (3, 2, 1) if columns % k**2 == 0)


def _conv(rows: int, columns: int, dim: int, memory_format: torch.memory_format) -> Tensor:
    channels, k = _kernel(columns)
    shape = (rows, channels) if dim == 0 else (channels, rows)
    return torch.randn(*shape, k, k).to(memory_format=memory_format)


def _conv3d(rows: int, columns: int) -> Tensor:
    channels, k = _kernel(columns)
    return torch.randn(rows, channels, k, k, 1).to(memory_format=torch.channels_last_3d)


def _permuted(rows: int, columns: int) -> Tensor:
    channels, k = _kernel(columns)
    return torch.randn(k, channels, rows, k).permute(2, 3, 1, 0)


# Each: (rows, columns) -> weight, and its output dimension.
LAYOUTS = {
    "linear": (lambda r, c: torch.randn(r, c), 0),
    "transposed": (lambda r, c: torch.randn(c, r), 1),
    "conv-transpose": (lambda r, c: _conv(r, c, 1, torch.contiguous_format), 1),
    "channels-last": (lambda r, c: _conv(r, c, 0, torch.channels_last), 0),
    "channels-last-transpose": (lambda r, c: _conv(r, c, 1, torch.channels_last), 1),
    "channels-last-3d": (_conv3d, 0),
    "last-dim": (lambda r, c: torch.randn(*_kernel(c), _kernel(c)[1], r), -1),
    "permuted": (_permuted, 0),
}
NOT_DENSE = {
    "slice": (lambda r, c: torch.randn(r + 2, 2 * c)[1:-1, ::2], 0),
    "transposed-slice": (lambda r, c: torch.randn(c, r + 3)[:, 3:], 1),
    "expanded": (lambda r, c: torch.randn(r, 1).expand(r, c), 0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make_weight(layout: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """A random weight whose matrix has ``shape``, in a memory layout, and its output dimension."""
    make, dim = {**LAYOUTS, **NOT_DENSE}[layout]
    return make(*shape).to(dtype), dim


def make_state(weight: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Random unit u and v for a weight."""
    rows = weight.shape[dim]
    parts = torch.randn(rows), torch.randn(weight.numel() // rows)
    u, v = (torch.nn.functional.normalize(x.double(), dim=0) for x in parts)
    return u.to(state_dtype(weight)), v.to(state_dtype(weight))


def target_ranks(shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Every kind of target in turn: low, middling, 1, none."""
    kinds = (0.1, 0.5, 0.0, math.inf)
    return [
        max(1.0, kinds[i % 4] * min(s)) if kinds[i % 4] < math.inf else math.inf
        for i, s in enumerate(shapes)
    ]


class Guarded:
    """A NaN-filled tensor like another, inside a larger storage whose ends must stay untouched."""

    PAD = 37  # odd: the tensor is not aligned

    def __init__(self, like: Tensor, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or like.dtype
        span = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        self.storage = torch.full((span + 2 * self.PAD,), float("nan"), dtype=dtype)
        self.tensor = self.storage.as_strided(like.shape, like.stride(), self.PAD)

    def assert_filled(self, what: str) -> None:
        assert not self.tensor.isnan().any(), f"{what}: not written everywhere"
        ends = torch.cat([self.storage[: self.PAD], self.storage[-self.PAD :]])
        assert ends.isnan().all(), f"{what}: written outside its elements"
