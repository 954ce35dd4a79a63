"""The kernels alone, without autograd and modules: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import srn_kernels as srn
from benchmarks.cases import workloads
from benchmarks.cases.workloads import Problem
from srn_kernels.core import ops
from srn_kernels.maths.matrix import state_layout
from srn_kernels.maths.scalars import STATS

pytestmark = pytest.mark.skipif(
    srn.available_backends()["cpu"] is not None, reason="the cpu backend is not live"
)
RATIOS = pytest.mark.parametrize("rank_ratio", [1.0, 0.7], ids=["sn", "srn"])


class Call(NamedTuple):
    """One round's tensors and constants, in reused memory."""

    problem: Problem
    outs: list[Tensor]
    round_state: Tensor
    stats: Tensor
    offsets: list[int]

    @property
    def layers(self) -> int:
        return len(self.outs)

    def normalize(self, rank_ratio: float) -> tuple:
        p, n = self.problem, self.layers
        # iterations, dims, eps; no gain or soft bound
        constants = ([1] * n, [0] * n, [1e-12] * n, [], [], [], [], "stable_rank", "cpu")
        ranks = p.target_ranks(rank_ratio)
        state = (self.round_state, self.stats, self.offsets)
        return (p.weights, p.us, p.vs, self.outs, *state, ranks, *constants)

    def backward(self) -> tuple:
        p, n = self.problem, self.layers
        state = (self.round_state, self.stats, self.outs, list(range(n)), self.offsets)
        # The statistics hold ranks and eps already.
        rest = ([0] * n, [], [], [], p.target_ranks(1.0), [1e-12] * n)
        return (p.upstream, p.weights, *state, *rest, "frozen", "stable_rank", "cpu")


@pytest.fixture(scope="module", params=workloads.CORE)
def call(request: pytest.FixtureRequest) -> Iterator[Call]:
    problem = workloads.make_problem(workloads.find(request.param))
    offsets, size = state_layout(problem.workload.shapes)
    stats = torch.zeros(len(problem.weights), len(STATS), dtype=torch.float64)
    outs = [torch.zeros_like(w) for w in problem.weights]
    yield Call(problem, outs, torch.zeros(size), stats, offsets)


def bench_copy(benchmark, call: Call) -> None:
    """The floor of a forward."""
    benchmark.group = call.problem.workload.name
    benchmark(torch._foreach_copy_, call.outs, call.problem.weights)


@RATIOS
def bench_normalize(benchmark, call: Call, rank_ratio: float) -> None:
    benchmark.group = call.problem.workload.name
    benchmark(ops.normalize, *call.normalize(rank_ratio))


@RATIOS
def bench_backward(benchmark, call: Call, rank_ratio: float) -> None:
    benchmark.group = call.problem.workload.name
    ops.normalize(*call.normalize(rank_ratio))
    benchmark(ops.normalize_backward, *call.backward())


@RATIOS
def bench_project(benchmark, call: Call, rank_ratio: float) -> None:
    """In place, on copies of the weights."""
    benchmark.group = call.problem.workload.name
    p, n = call.problem, call.layers
    torch._foreach_copy_(call.outs, p.weights)
    ranks = p.target_ranks(rank_ratio)
    benchmark(ops.project, call.outs, p.us, p.vs, ranks, [1] * n, [0] * n, [1e-12] * n, "cpu")
