"""Singular triples by power iteration: against SVDs, with the residual that certifies them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import matrices, quick, spectrum, svd_rounding, values
from torch import Tensor

from srn_kernels import linalg


@quick
@given(matrices(), st.integers(1, 12), st.sampled_from([1, 2, 9, 1000]))
def test_the_certified_residual_holds(case: tuple[Tensor, str], k: int, iterations: int) -> None:
    w, _ = case
    k = min(k, *w.shape)
    found = linalg.top_singular(w, k, iterations=iterations)
    u, s, v = (t.double() for t in found)
    expected = values(w)[:k]
    assert found.iterations <= iterations
    # The residual bounds the rounding of the one side, that of the SVD is the other's.
    other = svd_rounding(w)
    assert ((s - expected).abs() <= found.residual.double() + other).all()
    # It is what it says, recomputed in float64, which rounds too.
    w64 = w.double()
    for a, b in ((w64 @ v, u * s), (w64.T @ u, v * s)):
        assert ((a - b).norm(dim=0) <= found.residual.double() + other).all()
    unit = 1e-12 if w.dtype == torch.float64 else 1e-5
    for basis in (u, v):
        assert (basis.T @ basis - torch.eye(k)).abs().max() <= unit
    assert (s.diff() <= 1e-6 * s[0]).all()
    if found.converged:
        torch.testing.assert_close(s, expected, rtol=0, atol=float(1e-5 * expected[0]))


WORKLOADS = Path(__file__).parents[2] / "benchmarks" / "cases" / "workloads.json"


def _scaled_down() -> list[tuple[int, int]]:
    """Every shape of the workloads, both sides over 8 but at least 1."""
    records = json.loads(WORKLOADS.read_text()).values()
    shapes = {(rows, columns) for record in records for rows, columns, _ in record["layers"]}
    small = {(max(1, -(-rows // 8)), max(1, -(-columns // 8))) for rows, columns in shapes}
    return sorted(s for s in small if s[0] * s[1] <= 100_000)


@pytest.mark.parametrize("kind", ["gaussian", "flat"])
def test_power_method_against_svd_on_workload_shapes(kind: str) -> None:
    for rows, columns in _scaled_down():
        w = torch.randn(rows, columns)
        if kind == "flat":  # as after training: all values near 1, hardly a gap
            w = w * (0.1 / (rows**0.5 + columns**0.5)) + torch.eye(rows, columns)
        k = min(4, rows, columns)
        found = linalg.top_singular(w, k)
        expected = values(w)[:k]
        error = (found.S.double() - expected).abs()
        assert (error <= 1e-4 * expected).all(), (rows, columns)
        assert (error <= found.residual + svd_rounding(w)).all(), (rows, columns)
        assert found.converged, (rows, columns)


def test_power_is_deterministic_and_never_decomposes_w(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(300, 200)
    first = linalg.top_singular(w, 3)
    torch.manual_seed(123)
    decompose = torch.linalg.svd

    def small_only(a: Tensor, *arguments, **keywords):
        assert max(a.shape) <= 8 * (8 + 4)
        return decompose(a, *arguments, **keywords)

    monkeypatch.setattr(torch.linalg, "svd", small_only)
    again = linalg.top_singular(w, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    linalg.nearest_with_stable_rank(w, 5.0, 2)
    top = float(first.S[0])
    linalg.spectral_clip(w, 0.99 * top)
    with pytest.raises(AssertionError):
        linalg.nearest_with_stable_rank(w, 5.0, 2, method="svd")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_power_space_of_a_low_rank_matrix_runs_out(dtype: torch.dtype) -> None:
    """Then the block Krylov space has no further directions, and zero columns to orthogonalise."""
    for rows, columns in ((120, 80), (80, 120), (64, 64)):
        for s in ([1.0], [1.0, 1.0, 0.5], [1.0, 0.1, 1e-3, 1e-3]):
            for w in (spectrum(s, rows, columns, dtype), torch.eye(rows, columns, dtype=dtype)):
                for k in (1, 4):
                    found = linalg.top_singular(w, k)
                    assert found.converged
                    error = (found.S.double() - values(w)[:k]).abs()
                    assert (error <= found.residual + svd_rounding(w)).all()
                    for basis in (found.U, found.V):
                        off = basis.T @ basis - torch.eye(k, dtype=dtype)
                        assert off.abs().max() <= 50 * torch.finfo(dtype).eps


def test_iterations_and_tolerance_are_kept() -> None:
    w = spectrum(torch.linspace(1, 0.99, 200), 220, 200)
    few, many = linalg.top_singular(w, 2, iterations=3), linalg.top_singular(w, 2, tol=1e-9)
    assert few.iterations == 3
    assert not few.converged
    assert many.converged
    assert few.residual.max() > many.residual.max()
    # tol, and the rounding that the residual always holds: 4 |W|_F + sqrt(n) s_1 = 74 s_1 eps
    assert float(many.residual.max()) <= 1.1e-9 * float(many.S[0])
    _, s, _ = many  # a plain triple
    torch.testing.assert_close(s, values(w)[:2], rtol=0, atol=2 * svd_rounding(w))
    assert linalg.top_singular(w.half(), 2).S.dtype == torch.float32


def test_agreement_where_the_gap_is_one_percent() -> None:
    for rows, columns in [(60, 500), (400, 30), (90, 90)]:
        tail = torch.linspace(0.98, 0.5, min(rows, columns) - 3)
        w = spectrum([1.0, 0.999, 0.99, *tail], rows, columns)
        for k, r in ((3, 6.0), (0, 4.0)):
            power = linalg.nearest_with_stable_rank(w, r, k)
            svd = linalg.nearest_with_stable_rank(w, r, k, method="svd")
            if k:  # at k = 0 the gap below s_1 is a tenth of a percent
                torch.testing.assert_close(power[0], svd[0], rtol=0, atol=1e-7)
            assert power[1:] == (svd[1], pytest.approx(svd[2], rel=1e-4))
