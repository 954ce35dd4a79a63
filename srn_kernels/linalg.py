"""Functions of a matrix; so far the stable rank."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_rank(W: Tensor) -> Tensor:
    """|W|_F^2 / |W|_2^2, between 1 and rank(W) (arXiv 1906.04659, Definition 3.1).

    W: (..., rows, columns), real or complex floating point. Returns (...), real, differentiable;
    0 for a zero matrix. Raises TypeError or ValueError for anything else.
    """
    if not isinstance(W, Tensor) or not (W.is_floating_point() or W.is_complex()):
        raise TypeError(f"W must be a floating-point tensor, got {getattr(W, 'dtype', type(W))}")
    if W.dim() < 2:
        raise ValueError(f"W must have two dimensions or more, got shape {tuple(W.shape)}")
    if W.dtype in (torch.float16, torch.bfloat16):
        W = W.float()
    s = torch.linalg.svdvals(W)
    top = s[..., :1]
    safe = torch.where(top > 0, top, 1.0)
    return (s / safe).square().sum(-1)


def nearest_with_stable_rank(
    W: Tensor, r: float, k: int = 1, *, method: str = "power"
) -> tuple[Tensor, int, float]:
    """The nearest matrix with stable rank r that keeps the top k singular values (Theorem 1)."""
    raise NotImplementedError("nearest_with_stable_rank is not available yet")


def spectral_clip(W: Tensor, s: float, *, method: str = "power") -> Tensor:
    """The nearest matrix with spectral norm at most s (Algorithm 3)."""
    raise NotImplementedError("spectral_clip is not available yet")


def top_singular(
    W: Tensor, k: int, *, iterations: int = 1000, tol: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The top k singular triples by block power iteration."""
    raise NotImplementedError("top_singular is not available yet")
