"""Rounds of the Triton backend's own verbs, and their comparison with the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import oracle
import torch
from torch import Tensor

from srn_kernels import ops
from srn_kernels.backends import triton as backend
from srn_kernels.reference import round_vectors

INTERPRETED = "cpu" in backend.DEVICES
DEVICE = "cpu" if INTERPRETED else "cuda"


class Round(NamedTuple):
    """The arguments of one normalize call."""

    weights: list[Tensor]
    dims: list[int]
    us: list[Tensor]
    vs: list[Tensor]
    ranks: list[float]
    outs: list[Tensor]
    round_state: Tensor
    stats: Tensor
    offsets: list[int]

    @classmethod
    def make(
        cls,
        weights: Sequence[tuple[Tensor, int]],
        out_dtypes: Sequence[torch.dtype | None] | None = None,
        ranks: Sequence[float] | None = None,
    ) -> Round:
        tensors = [w.to(DEVICE) for w, _ in weights]
        dims = [d % w.dim() for w, d in weights]
        shapes = [(w.shape[d], w.numel() // w.shape[d]) for w, d in zip(tensors, dims, strict=True)]
        states = [oracle.make_state(w.cpu(), d) for w, d in zip(tensors, dims, strict=True)]
        offsets, size = ops.state_layout(shapes)
        ranks = ranks or oracle.target_ranks(shapes)
        return cls(
            tensors,
            dims,
            [u.to(DEVICE) for u, _ in states],
            [v.to(DEVICE) for _, v in states],
            [math.inf if min(s) == 1 else r for r, s in zip(ranks, shapes, strict=True)],
            [
                nan_like(w, d)
                for w, d in zip(tensors, out_dtypes or [None] * len(tensors), strict=True)
            ],
            torch.full((size,), math.nan, device=DEVICE),
            torch.full((len(tensors), 8), math.nan, dtype=torch.float64, device=DEVICE),
            offsets,
        )

    def normalize(self, iterations: int | Sequence[int], eps: float = 1e-12) -> None:
        n = len(self.weights)
        backend.normalize(
            self.weights,
            self.us,
            self.vs,
            self.outs,
            self.round_state,
            self.stats,
            self.offsets,
            self.ranks,
            [iterations] * n if isinstance(iterations, int) else iterations,
            self.dims,
            [eps] * n,
        )

    def gradients(self, grads: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        results = [nan_like(self.weights[i]) for i in rows]
        backend.normalize_backward(
            grads,
            [self.weights[i] for i in rows],
            self.round_state,
            self.stats,
            results,
            rows,
            [self.offsets[i] for i in rows],
            [self.dims[i] for i in rows],
        )
        return results

    def vectors(self, i: int) -> tuple[Tensor, Tensor]:
        return round_vectors(self.round_state, self.offsets[i], self.weights[i], self.dims[i])

    def copy(self) -> Round:
        """Its own weights, state and outputs, with the same values."""
        cloned = [
            [t.clone() for t in x] if isinstance(x, list) and isinstance(x[0], Tensor) else x
            for x in self
        ]
        return Round(*cloned[:6], self.round_state.clone(), self.stats.clone(), self.offsets)


def nan_like(w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_strided(w.shape, w.stride(), dtype=dtype or w.dtype, device=w.device).fill_(
        math.nan
    )


def check_round(
    made: Round, iterations: int | Sequence[int] = 1, eps: float = 1e-12, skip_gradient: int = -1
) -> list[oracle.Layer]:
    """Forward and backward of all layers against the oracle."""
    before = made.copy()
    made.normalize(iterations, eps)
    layers = []
    for i, w in enumerate(made.weights):
        n = iterations if isinstance(iterations, int) else iterations[i]
        u, v = made.vectors(i)
        assert torch.equal(w, before.weights[i])
        moved = (u, v) if n > 0 else (before.us[i], before.vs[i])
        assert torch.equal(made.us[i], moved[0])
        assert torch.equal(made.vs[i], moved[1])
        what = f"layer {i} {tuple(w.shape)} {w.dtype} -> {made.outs[i].dtype}, rank {made.ranks[i]}"
        layer = forward_layer(made, before, i, n, eps, what)
        layers.append(layer)
    rows = [i for i in range(len(layers)) if i != skip_gradient]
    grads = [torch.randn_like(made.outs[i]) for i in rows]
    for i, g, result in zip(rows, grads, made.gradients(grads, rows), strict=True):
        gradient_layer(layers[i], g, result, made.dims[i], f"layer {i} {tuple(result.shape)}")
    return layers


def forward_layer(
    made: Round, before: Round, i: int, n: int, eps: float, what: str
) -> oracle.Layer:
    out = made.outs[i]
    u, v = made.vectors(i)
    args = (before.weights[i].cpu(), made.dims[i], (before.us[i].cpu(), before.vs[i].cpu()))
    return oracle.assert_forward(
        *args,
        made.ranks[i],
        n,
        out.cpu(),
        u.cpu(),
        v.cpu(),
        stats=made.stats[i].cpu(),
        eps=eps,
        what=what,
    )


def gradient_layer(layer: oracle.Layer, g: Tensor, result: Tensor, dim: int, what: str) -> None:
    oracle.assert_gradient(layer, g.cpu(), result.cpu(), dim, what)
