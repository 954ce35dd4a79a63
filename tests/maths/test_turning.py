"""Derivatives of the matrix functions, and the linear system of turning vectors behind them."""

from __future__ import annotations

import pytest
import torch
from spectra import spectrum

from srn_kernels import linalg
from srn_kernels.maths import turning

METHODS = ("power", "svd")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 4)])
def test_gradients_against_finite_differences(method: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for r, k in ((1.0, 1), (1.4, 0), (1.5, 1), (2.1, 3), (9.0, 2)):
        assert torch.autograd.gradcheck(
            lambda w, r=r, k=k: linalg.nearest_with_stable_rank(w, r, k, method=method)[0],
            (w,),
            rtol=1e-6,
            atol=1e-8,
        )
    for limit in (0.5, 1.5, 2.5):
        assert torch.autograd.gradcheck(
            lambda w, s=limit: linalg.spectral_clip(w, s, method=method), (w,), rtol=1e-6, atol=1e-8
        )
    # Signs of u and v are arbitrary, but do not change with a small step.
    assert torch.autograd.gradcheck(
        lambda w: tuple(linalg.top_singular(w, 3, tol=1e-13)), (w,), rtol=1e-6, atol=1e-8
    )
    assert torch.autograd.gradcheck(linalg.stable_rank, (w,), rtol=1e-6, atol=1e-8)


def test_gradients_with_repeated_values_are_those_of_the_spectral_function() -> None:
    """s_1 = s_2 kept together, and equal values among the rest: W_hat is differentiable there."""
    w = spectrum([2, 2, 1, 1, 0.5], 6, 5).requires_grad_()
    for method in METHODS:
        assert torch.autograd.gradcheck(
            lambda w, m=method: linalg.spectral_clip(w, 1.5, method=m), (w,), rtol=1e-6, atol=1e-8
        )
        g = torch.randn_like(w)
        for k in (1, 2):  # k = 1 cuts through a repeated value: bounded, not meaningful
            x, _, _ = linalg.nearest_with_stable_rank(w, 2.2, k, method=method)
            (grad,) = torch.autograd.grad(x, w, g)
            assert grad.isfinite().all()


def test_second_derivatives_are_refused() -> None:
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, _, _ = linalg.nearest_with_stable_rank(w, 1.3)
    (grad,) = torch.autograd.grad(x.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_turning_solves_its_equations_and_stays_bounded() -> None:
    w = spectrum([3.0, 2.9, 2.0, 1.0], 7, 5)
    for k in (1, 2):
        u, s, vt = torch.linalg.svd(w)
        u, s, v = u[:, :k], s[:k], vt[:k].T
        a, b = torch.randn(7, k).double(), torch.randn(5, k).double()
        x, y = (t / s for t in turning.turning(w, u, s, v, a, b))
        a, b = a - u @ (u.T @ a), b - v @ (v.T @ b)
        torch.testing.assert_close(s * x - w @ y, a, rtol=0, atol=1e-9)
        torch.testing.assert_close(s * y - w.T @ x, b, rtol=0, atol=1e-9)
        assert max((u.T @ x).abs().max(), (v.T @ y).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", turning.ACCURACY)
def test_turning_stays_bounded_where_it_is_not_determined(dtype: torch.dtype) -> None:
    gap = turning.ACCURACY[dtype].gap
    cases = [torch.eye(6, 4)]  # every singular value is 1
    cases += [
        spectrum([1.0, 1.0 - tiny, *torch.linspace(0.9, 0.1, 20)], 40, 30) for tiny in (0, 1e-9)
    ]
    for case in cases:
        w = case.to(dtype)
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        random = [
            torch.nn.functional.normalize(torch.randn(n, 1, dtype=dtype), dim=0) for n in w.shape
        ]
        for u1, v1 in ((u[:, :1], vt[:1].T), random):  # not converged: the system is indefinite
            sigma = (u1.T @ w @ v1)[0].abs()
            a, b = (torch.randn(n, 1, dtype=dtype) for n in w.shape)
            x, y = turning.turning(w, u1, sigma, v1, a, b)
            side = (a.norm() + b.norm()) * (1 + s[0] / sigma)
            assert x.norm() + y.norm() <= 3 * side * (1 + s[0] / sigma) / gap
            assert turning.turning(w, u1, sigma, v1, 0 * a, 0 * b)[0].norm() == 0
