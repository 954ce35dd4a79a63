"""Theorem 1 and Algorithms 1 and 3, against SVDs and brute-force optimisation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from spectra import matrices, quick, srank, values
from torch import Tensor

from srn_kernels import linalg

METHODS = ("power", "svd")


def algorithm_1(w: np.ndarray, r: float, k: int) -> tuple[np.ndarray, int]:
    """The paper's loop, literally."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    part, beta, eta, kept = np.zeros_like(w), (w**2).sum(), 0.0, 0
    for i in range(k):
        if r >= (s[i] ** 2 + eta) / s[0] ** 2:
            part = part + s[i] * np.outer(u[:, i], vt[i])
            eta, beta, kept = eta + s[i] ** 2, beta - s[i] ** 2, kept + 1
        else:
            break
    return part + math.sqrt((r * s[0] ** 2 - eta) / beta) * (w - part), kept


# --- Theorem 1 and Algorithm 1 -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_worked_example_of_the_identity(method: str) -> None:
    eye, half = torch.eye(3, dtype=torch.float64), 0.5**0.5
    expected = {
        0: ([(1 + 2**0.5) / 2] + [(1 + half) / 2] * 2, (1 - half), 0, half),
        1: ([1, half, half], 2**0.5 - 1, 1, half),
        2: ([1, 1, 0], 1.0, 2, 0.0),  # rank truncation
        3: ([1, 1, 0], 1.0, 2, 0.0),  # 3 cannot be kept
    }
    for k, (s, distance, kept, gamma) in expected.items():
        x, got_kept, got_gamma = linalg.nearest_with_stable_rank(eye, 2.0, k, method=method)
        assert (got_kept, type(got_kept)) == (kept, int)
        assert got_gamma == pytest.approx(gamma, abs=1e-12)
        assert float((x - eye).norm()) == pytest.approx(distance, abs=1e-12)
        torch.testing.assert_close(
            values(x), torch.tensor(s, dtype=torch.float64), rtol=0, atol=1e-12
        )
    assert 1 - half == pytest.approx(0.292893, abs=5e-7)


def _brute_force(w: np.ndarray, r: float, k: int, generator: np.random.Generator) -> float:
    """The smallest |X - W|_F^2 that SLSQP finds among X with stable rank r and k values kept."""
    kept = np.linalg.svd(w, compute_uv=False)[:k]

    def constraints(x: np.ndarray) -> np.ndarray:
        s = np.linalg.svd(x.reshape(w.shape), compute_uv=False)
        return np.append(s[:k] - kept, (s**2).sum() - r * s[0] ** 2)

    def jacobian(x: np.ndarray) -> np.ndarray:
        x = x.reshape(w.shape)
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        outer = [np.outer(u[:, i], vt[i]) for i in range(max(k, 1))]
        return np.stack(
            [*(o.ravel() for o in outer[:k]), (2 * x - 2 * r * s[0] * outer[0]).ravel()]
        )

    best = math.inf
    for _ in range(8):
        start = w + 0.5 * generator.standard_normal(w.shape)
        found = minimize(
            lambda x: ((x - w.ravel()) ** 2).sum(),
            start.ravel(),
            jac=lambda x: 2 * (x - w.ravel()),
            constraints={"type": "eq", "fun": constraints, "jac": jacobian},
            method="SLSQP",
            options={"maxiter": 200, "ftol": 1e-14},
        )
        if found.success and np.abs(constraints(found.x)).max() < 1e-8:
            best = min(best, float(found.fun))
    return best


@pytest.mark.parametrize("k", [0, 1, 2])
def test_brute_force_finds_nothing_nearer(k: int) -> None:
    generator = np.random.default_rng(k)
    reached = 0
    for shape in [(2, 2), (3, 3), (3, 4), (4, 3), (5, 3), (3, 2)]:
        if min(shape) <= k:
            continue
        w = generator.standard_normal(shape)
        s = np.linalg.svd(w, compute_uv=False)
        least, most = (s[: max(k, 1)] ** 2).sum() / s[0] ** 2, (s**2).sum() / s[0] ** 2
        r = least + generator.uniform(0.2, 0.8) * (most - least)
        x, kept, _ = linalg.nearest_with_stable_rank(torch.from_numpy(w), r, k)
        assert kept == k
        distance = float((x - torch.from_numpy(w)).square().sum())
        best = _brute_force(w, r, k, generator)
        # The constraints hold to 1e-8, and the distance changes by its gradient times that.
        assert best >= distance - 1e-6 * (1 + distance)
        reached += best <= distance + 1e-6 * (1 + distance)
    assert reached >= 2  # the optimiser is no straw man: it gets there


@pytest.mark.parametrize("method", METHODS)
def test_distances_identities_and_algorithm_1(method: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(generator.integers(2, 9, 2))
        w = generator.standard_normal(shape)
        s = np.linalg.svd(w, compute_uv=False)
        r = float(generator.uniform(1, (s**2).sum() / s[0] ** 2))
        tw = torch.from_numpy(w)
        distances = []
        for k in range(min(shape) + 2):
            x, kept, gamma = linalg.nearest_with_stable_rank(tw, r, k, method=method)
            distances.append(float((x - tw).norm()))
            assert srank(x) == pytest.approx(r, rel=1e-9)
            assert 0 <= gamma <= 1
            if k == 0:
                assert float(values(x)[0]) >= s[0] * (1 - 1e-12)
                continue
            expected, expected_kept = algorithm_1(w, r, k)
            assert kept == expected_kept
            assert kept == k or kept >= math.floor(r)
            np.testing.assert_allclose(x.numpy(), expected, atol=1e-8 * s[0])
            np.testing.assert_allclose(values(x)[:kept].numpy(), s[:kept], rtol=1e-9)
        # |W - W_hat_0|^2 = |W - W_hat_1|^2 / r, and the distance grows with k.
        assert distances[0] ** 2 == pytest.approx(distances[1] ** 2 / r, rel=1e-8, abs=1e-14)
        assert all(a <= b * (1 + 1e-8) + 1e-12 for a, b in itertools.pairwise(distances))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("w", "r", "k", "kept"),
    [
        (torch.diag(torch.tensor([1.0, 0.9, 0.1])), 2.5, 1, 1),  # the bare formula scales S2 up
        (torch.diag(torch.tensor([1.0, 0.9, 0.1])), math.inf, 2, 2),
        (torch.ones(4, 3), 1.0, 1, 1),  # rank 1
        (torch.ones(4, 3), 1.0, 3, 1),
        (torch.arange(1.0, 6.0).reshape(1, 5), 1.0, 1, 1),  # a vector
        (torch.arange(1.0, 6.0).reshape(5, 1), 3.0, 0, 0),
        (torch.zeros(3, 4), 1.0, 2, 0),
        (torch.zeros(0, 4), 1.0, 2, 0),
        (torch.eye(3), 3.0, 2, 2),  # exactly the stable rank it has
    ],
)
def test_a_stable_rank_low_enough_changes_nothing(
    method: str, w: Tensor, r: float, k: int, kept: int
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, got, gamma = linalg.nearest_with_stable_rank(w.to(dtype), r, k, method=method)
        assert torch.equal(x, w.to(dtype))
        assert x.dtype == dtype
        assert (got, gamma) == (kept, 1.0)


def test_r_equal_to_one_is_the_top_term_and_ties_truncate() -> None:
    w = torch.randn(4, 6, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(w)
    for k in (0, 1, 3):
        x, kept, gamma = linalg.nearest_with_stable_rank(w, 1, k)
        torch.testing.assert_close(x, s[0] * torch.outer(u[:, 0], vt[0]))
        assert (kept, gamma) == (min(k, 1), 0.0)
    r = float((s[:2] ** 2).sum() / s[0] ** 2)
    x, kept, gamma = linalg.nearest_with_stable_rank(w, r, 4)
    assert (kept, gamma) == (2, pytest.approx(0, abs=1e-5))
    torch.testing.assert_close(values(x)[:2], s[:2])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_matrices(method: str) -> None:
    w = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    w[0, 1] = 0
    w[1, 2] = torch.ones(6, 4)
    for k in range(4):
        x, kept, gamma = linalg.nearest_with_stable_rank(w, 1.8, k, method=method)
        assert x.shape == w.shape
        assert kept.shape == gamma.shape == (2, 3)
        clipped = linalg.spectral_clip(w, 1.5, method=method)
        for i in np.ndindex(2, 3):
            single, one_kept, one_gamma = linalg.nearest_with_stable_rank(
                w[i], 1.8, k, method=method
            )
            torch.testing.assert_close(x[i], single, atol=1e-9, rtol=1e-9)
            assert int(kept[i]) == one_kept
            assert float(gamma[i]) == pytest.approx(one_gamma, abs=1e-9)
            single = linalg.spectral_clip(w[i], 1.5, method=method)
            torch.testing.assert_close(clipped[i], single, atol=1e-9, rtol=1e-9)
    assert linalg.stable_rank(w).shape == (2, 3)
    assert float(linalg.stable_rank(w)[0, 1]) == 0


# --- properties over random matrices -------------------------------------------------------------


# Errors of W_hat from a computed decomposition, relative to s_1, for each arithmetic.
_RELATIVE = {torch.float64: 1e-8, torch.float32: 2e-5}


@quick
@given(matrices(), st.floats(0, 1), st.integers(0, 4))
def test_properties_of_the_nearest_matrix(case: tuple[Tensor, str], share: float, k: int) -> None:
    w, s = case
    top, tolerance = float(values(w)[0]), _RELATIVE[w.dtype]
    r = 1 + share * (srank(w) - 1)
    x, kept, gamma = linalg.nearest_with_stable_rank(w, r, k)
    oracle, oracle_kept, _ = linalg.nearest_with_stable_rank(w.double(), r, k, method="svd")
    assert x.dtype == w.dtype
    assert x.isfinite().all()
    assert 0 <= gamma <= 1
    assert srank(x) <= max(r, 1) * (1 + 50 * tolerance) + 1e-6
    if k > 0:
        assert float(values(x)[0]) == pytest.approx(top, rel=tolerance * 10)
    # Where r is just above what keeping l values takes, rounding decides between l and l - 1 ...
    if kept == oracle_kept:
        # ... and with repeated values at the cut any of their vectors may be kept: the distance is
        # unique, W_hat is not.
        distance = float((x.double() - w.double()).norm()) / top
        expected = float((oracle - w.double()).norm()) / top
        assert distance == pytest.approx(expected, abs=30 * tolerance), s


@quick
@given(matrices(), st.floats(0.05, 1.5))
def test_properties_of_the_clip(case: tuple[Tensor, str], share: float) -> None:
    w, _ = case
    s = values(w)
    limit = share * float(s[0])
    expected = linalg.spectral_clip(w.double(), limit, method="svd")
    torch.testing.assert_close(
        values(expected), s.clamp_max(limit), rtol=1e-9, atol=1e-12 * float(s[0])
    )
    x = linalg.spectral_clip(w, limit)
    assert x.dtype == w.dtype
    # A singular vector is only as good as its gap; min(s_i, limit) does not mind.
    error = (x.double() - expected).norm() / s[0]
    assert error <= (1e-7 if w.dtype == torch.float64 else 1e-4)


# --- Algorithm 3 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_clip_is_the_projection_on_a_convex_set(method: str) -> None:
    w = torch.randn(4, 5, dtype=torch.float64)
    for limit in (0.3, 1.0, 2.0):
        x = linalg.spectral_clip(w, limit, method=method)
        torch.testing.assert_close(values(x), values(w).clamp_max(limit))
        # x is the projection if and only if <W - x, y - x> <= 0 for every feasible y.
        for _ in range(200):
            y = torch.randn(4, 5, dtype=torch.float64)
            y = y * limit / values(y)[0]
            assert float(((w - x) * (y - x)).sum()) <= 1e-12
        scaled = w * min(1.0, limit / float(values(w)[0]))  # the usual normalisation
        assert float((w - x).norm()) <= float((w - scaled).norm()) + 1e-12
    assert torch.equal(linalg.spectral_clip(w, math.inf, method=method), w)
    assert torch.equal(linalg.spectral_clip(w, 1e3, method=method), w)
    assert linalg.spectral_clip(torch.zeros(0, 3), 1.0, method=method).shape == (0, 3)
    assert not linalg.spectral_clip(torch.zeros(2, 3), 1.0, method=method).any()


# --- wrong arguments -----------------------------------------------------------------------------

_W = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: linalg.nearest_with_stable_rank(_W, 0.9), ValueError, "r must be at least 1"),
        (lambda: linalg.nearest_with_stable_rank(_W, math.nan), ValueError, "r must be"),
        (lambda: linalg.nearest_with_stable_rank(_W, "2"), TypeError, "r must be a number"),
        (lambda: linalg.nearest_with_stable_rank(_W, 2, -1), ValueError, "k must be at least 0"),
        (lambda: linalg.nearest_with_stable_rank(_W, 2, 1.5), TypeError, "k must be an int"),
        (lambda: linalg.nearest_with_stable_rank(_W, 2, method="qr"), ValueError, "method must be"),
        (lambda: linalg.nearest_with_stable_rank(_W[0], 2), ValueError, "W must have two dim"),
        (lambda: linalg.nearest_with_stable_rank(_W.int(), 2), TypeError, "W must be a floating"),
        (lambda: linalg.nearest_with_stable_rank(_W * 1j, 2), TypeError, "W must be real"),
        (lambda: linalg.nearest_with_stable_rank(_W / 0, 2), ValueError, "not finite"),
        (lambda: linalg.spectral_clip(_W, 0), ValueError, "s must be positive"),
        (lambda: linalg.spectral_clip(_W, -1.0), ValueError, "s must be positive"),
        (lambda: linalg.spectral_clip(_W, math.nan), ValueError, "s must be positive"),
        (lambda: linalg.spectral_clip(_W, True), TypeError, "s must be a number"),
        (lambda: linalg.spectral_clip([[1.0]], 1), TypeError, "W must be"),
        (lambda: linalg.spectral_clip(_W, 1, method=None), ValueError, "method must be"),
        (lambda: linalg.top_singular(_W, 0), ValueError, "k must be at least 1"),
        (lambda: linalg.top_singular(_W, 4), ValueError, "k must be at most"),
        (lambda: linalg.top_singular(_W, 1, iterations=0), ValueError, "iterations must be"),
        (lambda: linalg.top_singular(_W, 1, tol=-1e-3), ValueError, "tol must be"),
        (lambda: linalg.top_singular(_W, 1, tol=math.nan), ValueError, "tol must be"),
        (lambda: linalg.top_singular(_W * math.nan, 1), ValueError, "not finite"),
        (lambda: linalg.top_singular(_W[:0], 1), ValueError, "k must be at most"),
        (lambda: linalg.stable_rank(_W * math.inf), ValueError, "not finite"),
        (lambda: linalg.stable_rank(_W[0]), ValueError, "two dimensions"),
        (lambda: linalg.stable_rank(3.0), TypeError, "floating-point"),
    ],
)
def test_wrong_arguments_are_named(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
