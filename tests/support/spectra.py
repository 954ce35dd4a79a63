"""Matrices with chosen singular values, and what is known of theirs."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def values(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x.double())


def svd_rounding(w: Tensor) -> float:
    """How far ``values`` may be off, as numpy and MATLAB bound it for a rank: n eps s_1."""
    return max(w.shape) * torch.finfo(torch.float64).eps * float(values(w)[0])


def srank(x: Tensor) -> float:
    s = values(x)
    return float((s / s[0]).square().sum())


def spectrum(s: list[float] | Tensor, rows: int, columns: int, dtype=torch.float64) -> Tensor:
    """A matrix with these singular values and random singular vectors."""
    s = torch.as_tensor(s, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(rows, len(s), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, len(s), dtype=torch.float64)).Q
    return ((u * s) @ v.T).to(dtype)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, str]:
    """Rank-deficient, repeated singular values, extreme aspect ratios, extreme scales."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    low, high = (-20, 20) if dtype == torch.float64 else (-11, 18)
    scale = 10.0 ** draw(st.integers(low, high))
    smaller = draw(st.integers(1, 12))
    larger = draw(st.sampled_from([smaller, smaller + 3, 64, 900]))
    rank = draw(st.integers(1, smaller))
    # A gap of 2 % or none at all, anywhere in the spectrum.
    steps = draw(st.lists(st.sampled_from([1.0, 0.98, 0.7, 0.1]), min_size=rank, max_size=rank))
    s = scale * np.cumprod([1.0, *steps[1:]])
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = (smaller, larger) if draw(st.booleans()) else (larger, smaller)
    return spectrum(s, *shape, dtype), str(s)
