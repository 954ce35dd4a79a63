"""Rounds with soft bounds and gains, by any backend's own verbs, against their definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import gpu_rounds
import oracle
import torch
from oracle import NON_FINITE, PASS_THROUGH
from torch import Tensor

from srn_kernels.maths.scalars import Stats


class Scaling(NamedTuple):
    gain: float | None = None
    dtype: torch.dtype = torch.float32  # of the gain
    sigma_max: float = 0.0
    through: bool = True


SCALINGS = [
    Scaling(),
    Scaling(1.75),
    Scaling(sigma_max=0.5),
    Scaling(sigma_max=0.5, through=False),
    Scaling(sigma_max=1e6),
    Scaling(-0.75, torch.bfloat16, 0.5, False),
    Scaling(0.0, sigma_max=0.5),
    Scaling(2.5, torch.float64, 1e6, False),
    Scaling(1.5, torch.float16, 0.5),
]
LAYOUTS = ("linear", "conv-transpose", "channels-last")
SHAPES = [(27, 63), (40, 16), (1, 7), (130, 36), (5, 400)]


class Expected(NamedTuple):
    """The factor of a layer and its derivatives by the definition, and bounds on their errors."""

    layer: oracle.Layer
    bounds: oracle.Bounds
    factor: float
    by_gain: float
    by_sigma: float
    error: float  # of by_gain; the factor's is |gain| times it

    @classmethod
    def of(cls, layer: oracle.Layer, scaling: Scaling, unit: float) -> Expected:
        bounds = oracle.Bounds(layer, unit)
        gain = 1.0 if scaling.gain is None else scaling.gain
        by_gain, by_sigma, error = 1.0, 0.0, 0.0
        s = scaling.sigma_max
        if s > 0 and layer.branch < PASS_THROUGH:
            by_gain, by_sigma, error = layer.sigma, 1.0, abs(layer.sigma) * bounds.sigma
            if layer.sigma > s:
                by_gain, by_sigma, error = s, 0.0 if scaling.through else s / layer.sigma, 0.0
        return cls(layer, bounds, gain * by_gain, by_gain, gain * by_sigma, error)

    def check_forward(self, out: Tensor, stats: Stats, dim: int, what: str) -> None:
        layer, unit = self.layer, self.bounds.unit
        assert stats.branch == layer.branch, what
        if layer.branch == NON_FINITE:
            assert out.isnan().all(), what
            return
        f, gain = abs(self.factor), abs(self.factor / self.by_gain)
        size = layer.w_hat.abs()
        bound = f * self.bounds.w_hat(torch.float64) + (gain * self.error + 4 * unit * f) * size
        bound = bound + oracle.unit_of(out.dtype) * f * size + oracle.spacing(out.dtype)
        got = oracle.matrix_of(out, dim)
        oracle.assert_within(got, self.factor * layer.w_hat, bound, f"{what}: W_hat")
        relative = self.bounds.sigma + 8 * unit
        for name in ("factor", "by_gain", "by_sigma"):
            found, want = float(getattr(stats, name)), getattr(self, name)
            assert abs(found - want) <= relative * abs(want), f"{what}: {name} {found}, not {want}"

    def check_backward(
        self, g: Tensor, grad: Tensor, by_gain: Tensor | None, dim: int, what: str
    ) -> None:
        layer, unit = self.layer, self.bounds.unit
        if layer.branch == NON_FINITE:
            assert grad.isnan().all(), what
            return
        g, f = oracle.matrix_of(g, dim), abs(self.factor)
        inner, plain = float((g * layer.w_hat).sum()), oracle.gradient(layer, g)
        inner_error = float((g.abs() * self.bounds.w_hat(torch.float64)).sum())
        along = f * self.bounds.gradient(g, torch.float64) + 4 * unit * f * plain.abs()
        expected = self.factor * plain
        if layer.branch < PASS_THROUGH:
            error = oracle.summed(layer.w.shape[1], unit) + 4 * unit
            parts = layer.gamma * (layer.w / layer.sigma).abs()
            parts = parts + (1 - layer.gamma) * layer.outer.abs()
            inner_error += error * float((g.abs() * parts).sum())
            turn = inner_error + abs(inner) * (self.bounds.sigma + 4 * unit)
            along = along + abs(self.by_sigma) * turn * layer.outer.abs()
            gain = abs(self.factor / self.by_gain)
            along = along + gain * self.error * plain.abs()
            expected = expected + inner * self.by_sigma * layer.outer
        bound = along + oracle.unit_of(grad.dtype) * expected.abs() + oracle.spacing(grad.dtype)
        oracle.assert_within(oracle.matrix_of(grad, dim), expected, bound, f"{what}: dL/dW")
        if by_gain is not None:
            want = inner * self.by_gain
            bound = inner_error * abs(self.by_gain) + abs(inner) * self.error
            bound += (8 * unit + 2 * oracle.unit_of(by_gain.dtype)) * abs(want)
            bound += oracle.spacing(by_gain.dtype)
            assert abs(float(by_gain) - want) <= bound, f"{what}: dL/dgain"


def make_layers(dtype: torch.dtype) -> tuple[list[tuple[Tensor, int]], list[Scaling]]:
    """Every scaling with every shape, layouts and target ranks in turn, and two broken weights."""
    weights, scalings = [], []
    for i, shape in enumerate(SHAPES):
        for k, scaling in enumerate(SCALINGS):
            kind = torch.bfloat16 if (i + k) % 5 == 3 and dtype == torch.float32 else dtype
            weights.append(oracle.make_weight(LAYOUTS[(i + k) % 3], shape, kind))
            scalings.append(scaling)
    zero, broken = torch.zeros(6, 9, dtype=dtype), torch.ones(6, 9, dtype=dtype)
    broken[2, 3] = math.nan
    weights += [(zero, 0), (broken, 0)]
    return weights, scalings + [Scaling(3.0, sigma_max=0.5)] * 2


def check_scaled_rounds(backend: ModuleType, dtype: torch.dtype) -> None:
    """Training, evaluation with sigma of both signs, and a round repeated with other gains."""
    torch.manual_seed(0)
    weights, scalings = make_layers(dtype)
    out_dtypes = [torch.bfloat16 if i % 7 == 2 else None for i in range(len(weights))]
    made = gpu_rounds.Round.make(weights, out_dtypes, backend=backend)
    gains = [
        torch.full((1,), s.gain, dtype=s.dtype, device=made.weights[0].device)
        for s in scalings
        if s.gain is not None
    ]
    places = iter(range(len(gains)))
    gained = [-1 if s.gain is None else next(places) for s in scalings]
    _run(made, scalings, gains, gained, 1)
    for x in made.us[::2]:
        x.neg_()
    _run(made, scalings, gains, gained, 0)
    kept = [out.clone() for out in made.outs]
    _run(made, scalings, gains, gained, -1)
    if backend.DEVICES is not None:  # the reference forms a W + b u v^T in another order
        for out, before in zip(made.outs, kept, strict=True):
            assert torch.equal(out.nan_to_num(), before.nan_to_num())
    for gain in gains:
        gain.mul_(2)
    doubled = [s._replace(gain=None if s.gain is None else 2 * s.gain) for s in scalings]
    _run(made, doubled, gains, gained, -1)


def _run(
    made: gpu_rounds.Round,
    scalings: Sequence[Scaling],
    gains: Sequence[Tensor],
    gained: Sequence[int],
    iterations: int,
) -> None:
    bounds, through = [s.sigma_max for s in scalings], [s.through for s in scalings]
    made.normalize(iterations, scalings=(gains, gained, bounds, through))
    unit = oracle.unit_of(made.us[0].dtype) * (2 if made.us[0].dtype == torch.float64 else 1)
    layers = []
    for i, (w, scaling) in enumerate(zip(made.weights, scalings, strict=True)):
        what = f"layer {i} {tuple(w.shape)} {w.dtype}, {iterations} iterations, {scaling}"
        u, v = made.vectors(i)
        layer = oracle.normalized(oracle.matrix_of(w, made.dims[i]), u, v, made.ranks[i])
        layers.append((Expected.of(layer, scaling, unit), what))
        stats = Stats(*made.stats[i].tolist())
        layers[-1][0].check_forward(made.outs[i], stats, made.dims[i], what)
    # One gain of three is frozen.
    rows = [i for i in range(len(layers)) if i % 6 != 4]
    learns = [i for i in rows if gained[i] >= 0 and i % 3 != 1]
    grad_gains = [torch.full_like(gains[gained[i]], math.nan) for i in learns]
    wanted = [learns.index(i) if i in learns else -1 for i in rows]
    grads = [torch.randn_like(made.outs[i]) for i in rows]
    results = made.gradients(grads, rows, (grad_gains, wanted))
    for i, g, result, place in zip(rows, grads, results, wanted, strict=True):
        expected, what = layers[i]
        by_gain = grad_gains[place] if place >= 0 else None
        expected.check_backward(g, result, by_gain, made.dims[i], what)
