"""Layers of a kernel call without their values: kept as JSON, made anew, checked in float64."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.oracle import relative_error, rounding
from srn_kernels.maths.matrix import matrix, state_dtype, state_layout
from srn_kernels.maths.scalars import STATS, Stats
from srn_kernels.maths.top_one import TOP_ONE

ALIGNMENT = 16  # bytes, of the widest load
GAIN = 1.25  # of the layers that have one


@dataclass(frozen=True)
class LayerCase:
    """One layer: everything that chooses its way through the kernels, but the values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    other_strides: tuple[int, ...]  # of W_hat and G
    dim: int
    dtype: str
    other: str
    misaligned: tuple[int, int, int] = (0, 0, 0)  # bytes beyond a multiple of 16: W, W_hat, v
    iterations: int = 1
    target_rank: float = math.inf
    eps: float = 1e-12
    gain: str = ""  # the dtype of its gain, if it has one
    sigma_max: float = 0.0
    through: bool = True

    @classmethod
    def of(
        cls,
        weight: Tensor,
        other: Tensor,
        v: Tensor | None,
        dim: int,
        iterations: int = 1,
        target_rank: float | None = None,
        eps: float = 1e-12,
        gain: Tensor | None = None,
        sigma_max: float = 0.0,
        through: bool = True,
    ) -> LayerCase:
        tensors = (weight, other, v)
        return cls(
            tuple(weight.shape),
            weight.stride(),
            other.stride(),
            dim,
            str(weight.dtype).removeprefix("torch."),
            str(other.dtype).removeprefix("torch."),
            tuple(0 if t is None else t.data_ptr() % ALIGNMENT for t in tensors),
            iterations,
            0.5 * min(cls.matrix(weight.shape, dim)) if target_rank is None else target_rank,
            eps,
            "" if gain is None else str(gain.dtype).removeprefix("torch."),
            sigma_max,
            through,
        )

    @staticmethod
    def matrix(shape: Sequence[int], dim: int) -> tuple[int, int]:
        return shape[dim], math.prod(shape) // shape[dim]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def resized(self, shape: tuple[int, ...]) -> LayerCase:
        """Another shape, dense in the same order of dimensions."""

        def dense(strides: tuple[int, ...]) -> tuple[int, ...]:
            made, step = [0] * len(shape), 1
            for i in sorted(range(len(shape)), key=lambda i: (strides[i], -i)):
                made[i], step = step, step * shape[i]
            return tuple(made)

        values = {**asdict(self), "shape": shape}
        return LayerCase(
            **{**values, **{k: dense(values[k]) for k in ("strides", "other_strides")}}
        )

    def __str__(self) -> str:
        return (
            f"{self.shape} {self.dtype} to {self.other}, dim {self.dim}, strides {self.strides}, "
            f"{self.iterations} iterations, misaligned by {self.misaligned}"
        )


def of_layers(
    gains: Sequence[Tensor] = (),
    gained: Sequence[int] = (),
    sigma_max: Sequence[float] = (),
    through: Sequence[bool] = (),
) -> Iterator[tuple[Tensor | None, float, bool]]:
    """gain, sigma_max and through of each layer, from the lists of a backend's verbs."""
    found = (gains[place] if place >= 0 else None for place in gained)
    return zip(
        found if gained else itertools.repeat(None),
        sigma_max or itertools.repeat(0.0),
        through or itertools.repeat(True),
        strict=False,
    )


def as_json(cases: Sequence[LayerCase]) -> list[dict[str, Any]]:
    return [asdict(case) for case in cases]


def from_json(layers: Sequence[dict[str, Any]]) -> list[LayerCase]:
    return [
        LayerCase(**{k: tuple(v) if isinstance(v, list) else v for k, v in layer.items()})
        for layer in layers
    ]


def write_cases(path: Path, cases: Sequence[LayerCase], note: str = "") -> None:
    """At once, so that a process that dies leaves the last file whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"note": note, "layers": as_json(cases)}))
    partial.replace(path)


def read_cases(path: Path) -> tuple[list[LayerCase], str]:
    made = json.loads(path.read_text())
    return from_json(made["layers"]), made["note"]


def _empty(
    shape: Sequence[int], strides: Sequence[int], dtype: str, misaligned: int, device: torch.device
) -> Tensor:
    kind = getattr(torch, dtype)
    skip = misaligned // kind.itemsize
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.empty(skip + reach, dtype=kind, device=device).as_strided(shape, strides, skip)


def check_round(cases: Sequence[LayerCase], backend: ModuleType, device: torch.device) -> str:
    """A forward and a backward of one call; what is wrong with them, or nothing."""
    generator = torch.Generator().manual_seed(0)

    def random(x: Tensor) -> Tensor:
        return x.copy_(torch.randn(x.shape, generator=generator))

    weights, outs, us, vs, grads, results = [], [], [], [], [], []
    for c in cases:
        rows, columns = c.matrix(c.shape, c.dim)
        state = str(state_dtype(getattr(torch, c.dtype))).removeprefix("torch.")
        w_off, out_off, v_off = c.misaligned
        weights.append(random(_empty(c.shape, c.strides, c.dtype, w_off, device)))
        for made in (outs, grads):
            made.append(_empty(c.shape, c.other_strides, c.other, out_off, device))
        results.append(_empty(c.shape, c.strides, c.dtype, w_off, device))
        random(grads[-1])
        us.append(random(_empty((rows,), (1,), state, 0, device)))
        vs.append(random(_empty((columns,), (1,), state, v_off, device)))
    starts = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
    offsets, size = state_layout([c.matrix(c.shape, c.dim) for c in cases])
    round_state = torch.empty(size, dtype=us[0].dtype, device=device)
    stats = torch.empty(len(cases), len(STATS), dtype=torch.float64, device=device)
    kinds = [getattr(torch, c.gain) for c in cases if c.gain]
    gains = [torch.full((1,), GAIN, dtype=kind, device=device) for kind in kinds]
    grad_gains = [torch.empty_like(x) for x in gains]
    places = itertools.count()
    gained = [next(places) if c.gain else -1 for c in cases]
    asked = [c.iterations for c in cases]
    # -1 repeats a round.
    for iterations in [[abs(n) for n in asked]] + [[-1] * len(asked)] * (min(asked) < 0):
        backend.normalize(
            *(weights, us, vs, outs, round_state, stats, offsets),
            *([c.target_rank for c in cases], iterations),
            *([c.dim for c in cases], [c.eps for c in cases]),
            *(gains, gained, [c.sigma_max for c in cases], [c.through for c in cases]),
        )
    backend.normalize_backward(
        *(grads, weights, round_state, stats, results, range(len(cases)), offsets),
        *([c.dim for c in cases], grad_gains, gained),
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    for i, c in enumerate(cases):
        leaf = weights[i].double().requires_grad_()
        u, v = (x.double() for x in starts[i])
        steps = abs(c.iterations)
        wanted = TOP_ONE.normalize_layer(leaf, u, v, c.target_rank, steps, c.eps, c.dim)
        seen = Stats(*wanted.stats)
        sigma = wanted.u @ (matrix(leaf, c.dim) @ wanted.v)
        gain = leaf.new_full((), GAIN if c.gain else 1.0).requires_grad_()
        held = sigma if c.through else sigma.detach()
        bound = sigma / (held / c.sigma_max).clamp_min(1.0) if c.sigma_max else 1.0
        scaled = wanted.weight * (gain * bound)
        grad, by_gain = torch.autograd.grad(scaled, (leaf, gain), grads[i].double())
        spectrum = float(seen.frobenius_sq.sqrt() / seen.sigma.abs())
        compared = [
            ("W_hat", outs[i], relative_error(outs[i], scaled)),
            ("dL/dW", results[i], relative_error(results[i], grad)),
        ]
        if c.gain:
            found, size = grad_gains[gained[i]], grads[i].double().norm() * (scaled / gain).norm()
            compared.append(("dL/dgain", found, float((found - by_gain).abs() / size)))
        for what, found, error in compared:
            allowed = rounding(c.matrix(c.shape, c.dim), spectrum, us[i].dtype, found.dtype)
            if not error <= allowed:
                return f"layer {i}, {what} is off by {error:.1e}, {allowed:.1e} is allowed: {c}"
    return ""
