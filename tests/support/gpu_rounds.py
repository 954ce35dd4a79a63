"""Rounds of a GPU backend's own verbs, their comparison with the float64 oracle, and edge cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import oracle
import torch
from torch import Tensor

from benchmarks.cases import workloads
from srn_kernels.core import ops
from srn_kernels.maths.matrix import round_vectors
from srn_kernels.maths.scalars import NON_FINITE, PASS_THROUGH, STATS, Stats


def device_of(backend: ModuleType) -> str:
    """Where a backend's tests make their tensors: interpreted or emulated kernels serve the CPU."""
    return "cpu" if backend.DEVICES is None or "cpu" in backend.DEVICES else "cuda"


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
    backend: ModuleType

    @classmethod
    def make(
        cls,
        weights: Sequence[tuple[Tensor, int]],
        out_dtypes: Sequence[torch.dtype | None] | None = None,
        ranks: Sequence[float] | None = None,
        *,
        backend: ModuleType,
    ) -> Round:
        device = device_of(backend)
        tensors = [w.to(device) for w, _ in weights]
        dtype = oracle.state_dtype(tensors[0])
        dims = [d % w.dim() for w, d in weights]
        shapes = [(w.shape[d], w.numel() // w.shape[d]) for w, d in zip(tensors, dims, strict=True)]
        states = [oracle.make_state(w.cpu(), d) for w, d in zip(tensors, dims, strict=True)]
        offsets, size = ops.state_layout(shapes)
        ranks = ranks or oracle.target_ranks(shapes)
        return cls(
            tensors,
            dims,
            [u.to(device) for u, _ in states],
            [v.to(device) for _, v in states],
            [math.inf if min(s) == 1 else r for r, s in zip(ranks, shapes, strict=True)],
            [
                nan_like(w, d)
                for w, d in zip(tensors, out_dtypes or [None] * len(tensors), strict=True)
            ],
            torch.full((size,), math.nan, dtype=dtype, device=device),
            torch.full((len(tensors), len(STATS)), math.nan, dtype=torch.float64, device=device),
            offsets,
            backend,
        )

    def normalize(
        self,
        iterations: int | Sequence[int],
        eps: float = 1e-12,
        scalings: tuple[Sequence, ...] = (),  # gains, gained, sigma_max, through
    ) -> None:
        n = len(self.weights)
        self.backend.normalize(
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
            *scalings,
        )

    def gradients(
        self,
        grads: Sequence[Tensor],
        rows: Sequence[int],
        gains: tuple[Sequence, ...] = (),  # grad_gains, gained
    ) -> list[Tensor]:
        results = [nan_like(self.weights[i]) for i in rows]
        self.backend.normalize_backward(
            grads,
            [self.weights[i] for i in rows],
            self.round_state,
            self.stats,
            results,
            rows,
            [self.offsets[i] for i in rows],
            [self.dims[i] for i in rows],
            *gains,
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
        state, stats = self.round_state.clone(), self.stats.clone()
        return Round(*cloned[:6], state, stats, self.offsets, self.backend)


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


# Weights.

SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (1, 300), (300, 1), (63, 27), (16, 1100), (60, 260)]


def scaled_down(name: str) -> list[tuple[int, int]]:
    """Every distinct shape of a workload, sides over 24, small sides as they are."""

    def side(n: int) -> int:
        return n if n <= 32 else max(32, n // 24)

    return [(side(r), side(c)) for r, c in dict.fromkeys(workloads.load()[name].shapes)]


def edge_weights() -> dict[str, tuple[Tensor, float]]:
    """The edge cases of the design: a weight and its target rank."""
    broken, infinite = torch.randn(24, 40), torch.randn(24, 40)
    broken[20, 3], infinite[2, 39] = math.nan, math.inf
    u, v = torch.randn(24), torch.randn(40)
    return {
        "rank one target": (torch.randn(24, 40), 1.0),
        "target above": (torch.randn(24, 40), 24.0),
        "spectral": (torch.randn(24, 40), math.inf),
        "rank one weight": (torch.outer(u, v), 3.0),
        "zero": (torch.zeros(24, 40), 3.0),
        "vanishing": (torch.randn(24, 40) * 1e-15, 3.0),
        "nan": (broken, 3.0),
        "infinite": (infinite, 3.0),
        "row": (torch.randn(1, 40), 1.0),
        "column": (torch.randn(40, 1), 1.0),
    }


def check_edge_cases(backend: ModuleType, iterations: int) -> None:
    """Every row of the design's table, forward and backward."""
    cases = edge_weights()
    made = Round.make(
        [(w, 0) for w, _ in cases.values()],
        ranks=[rank for _, rank in cases.values()],
        backend=backend,
    )
    before = made.copy()
    made.normalize(iterations)
    grads = [torch.randn_like(w) for w in made.weights]
    results = made.gradients(grads, range(len(grads)))
    for i, name in enumerate(cases):
        branch = Stats(*made.stats[i].tolist()).branch
        if name in ("nan", "infinite"):
            assert branch == NON_FINITE, name
            assert made.outs[i].isnan().all(), name
            assert results[i].isnan().all(), name
        elif name in ("zero", "vanishing"):
            assert branch == PASS_THROUGH, name
            assert torch.equal(made.outs[i], made.weights[i]), name
            assert torch.equal(results[i], grads[i]), name
        else:
            n = iterations
            if name == "rank one weight":
                continue
            layer = forward_layer(made, before, i, n, 1e-12, name)
            gradient_layer(layer, grads[i], results[i], 0, name)
        if branch >= PASS_THROUGH:
            assert torch.equal(made.us[i], before.us[i]), name
            assert torch.equal(made.vs[i], before.vs[i]), name
            if iterations:
                assert torch.equal(made.vectors(i)[0], before.us[i]), name
                assert torch.equal(made.vectors(i)[1], before.vs[i]), name
    # F / sigma^2 - 1 cancels where W has rank one: W_hat is W / sigma either way.
    at = list(cases).index("rank one weight")
    if iterations:
        norm = torch.linalg.matrix_norm(made.outs[at].double(), 2).item()
        assert abs(norm - 1) < 1e-5
    at = list(cases).index("rank one target")
    assert not results[at].any()


def check_range(backend: ModuleType, scale: float) -> None:
    """Sums of squares far from 1 stay finite, and no layer passes through."""
    shapes = [(40, 160), (63, 27), (16, 1100)]
    made = Round.make([(torch.randn(s) * scale, 0) for s in shapes], backend=backend)
    layers = check_round(made, 2, eps=0.0)
    assert all(x.branch < PASS_THROUGH for x in layers)
    check_round(made, 0, eps=0.0)


def check_evaluation_with_shrunk_and_negative_vectors(backend: ModuleType) -> None:
    """Evaluation normalises u and v that are no unit vectors, and uses sigma with its sign."""
    weights = [(torch.randn(40, 96), 0), (torch.randn(20, 27), 0)]
    made = Round.make(weights, backend=backend)
    for weight, dim, u, v in zip(made.weights, made.dims, made.us, made.vs, strict=True):
        w = oracle.matrix_of(weight.cpu(), dim)
        sigma = float(u.cpu().double() @ w @ v.cpu().double())
        u *= -0.6 if sigma > 0 else 0.6
        v *= 0.3
    check_round(made, 0)
    assert (Stats(*made.stats.unbind(-1)).sigma < 0).all()


def check_a_repeated_round(backend: ModuleType) -> None:
    """iterations = -1 gives the same bits from the round's own state, whatever u and v hold."""
    weights = [oracle.make_weight(k, (36, 144), torch.float32) for k in oracle.LAYOUTS]
    made = Round.make(weights, backend=backend)
    made.normalize(1)
    first, kept = [o.clone() for o in made.outs], made.round_state.clone()
    for t in (*made.us, *made.vs, *made.outs):
        t.fill_(math.nan)
    made.normalize(-1)
    assert all(torch.equal(a, b) for a, b in zip(first, made.outs, strict=True))
    assert torch.equal(made.round_state.nan_to_num(), kept.nan_to_num())
