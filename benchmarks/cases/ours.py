"""srn_kernels in each of its forms: reference, kernels alone, functional, modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import srn_kernels as srn
from benchmarks.cases.runner import KERNELS, ModelRunner, StatefulRunner, provider
from benchmarks.cases.workloads import Problem
from srn_kernels.backends import cpu
from srn_kernels.maths.matrix import state_layout
from srn_kernels.maths.scalars import STATS


class _Function(StatefulRunner):
    """The public function of one of the two modules that have it."""

    half_allowance = 0.0

    def call(self, function: Callable[..., Sequence[Tensor]], **keywords: str) -> Sequence[Tensor]:
        return function(
            self.parameters,
            self.us,
            self.vs,
            self.target_ranks,
            n_power_iterations=self.problem.n_power_iterations,
            training=self.training,
            **keywords,
        )


@provider("reference", "srn_kernels reference", stable_rank=True, most_parameters=2**25)
class Reference(_Function):
    def outputs(self) -> Sequence[Tensor]:
        return self.call(srn.reference.stable_rank_normalize)


@provider(KERNELS, "srn_kernels, kernels alone", stable_rank=True, needs_kernels=True)
class Kernels(StatefulRunner):
    """Two calls into memory that stays: what everything around the kernels is measured against."""

    half_allowance = 0.0

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        weights, n = problem.weights, len(problem.weights)
        self.outs = [torch.empty_like(w) for w in weights]
        self.grads = [torch.empty_like(w) for w in weights]
        self.offsets, size = state_layout([tuple(w.shape) for w in weights])
        self.round_state = torch.empty(size)
        self.stats = torch.empty(n, len(STATS), dtype=torch.float64)
        # A vector's stable rank is 1 already.
        ranks = zip(weights, self.target_ranks, strict=True)
        self.ranks = [math.inf if min(w.shape) == 1 else rank for w, rank in ranks]
        self.dims, self.eps = [0] * n, [1e-12] * n

    def outputs(self) -> Sequence[Tensor]:
        iterations = self.problem.n_power_iterations if self.training else 0
        cpu.normalize(
            self.problem.weights,
            self.us,
            self.vs,
            self.outs,
            self.round_state,
            self.stats,
            self.offsets,
            self.ranks,
            [iterations] * len(self.outs),
            self.dims,
            self.eps,
        )
        return self.outs

    def gradients(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        cpu.normalize_backward(
            self.problem.upstream,
            self.problem.weights,
            self.round_state,
            self.stats,
            self.grads,
            range(len(self.grads)),
            self.offsets,
            self.dims,
        )
        return self.grads


@provider("functional", "srn_kernels functional", stable_rank=True, needs_kernels=True)
class Functional(_Function):
    backend = "cpu"

    def outputs(self) -> Sequence[Tensor]:
        return self.call(srn.functional.stable_rank_normalize, backend=self.backend)


@provider("module", "srn_kernels", stable_rank=True, needs_kernels=True)
class Module(ModelRunner):
    """What people use: one call on a model, hooks included."""

    half_allowance = 0.0
    backend = "cpu"

    def wrap(self) -> None:
        srn.apply_stable_rank_norm(
            self.model,
            self.rank_ratio,
            n_power_iterations=self.problem.n_power_iterations,
            backend=self.backend,
        )
