"""The correctness gate: no provider is timed before its results agree with float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.runner import Runner
from benchmarks.cases.workloads import Problem
from srn_kernels.maths.scalars import Stats
from srn_kernels.maths.top_one import TOP_ONE

SAFETY = 8.0
EPS = torch.finfo(torch.float32).eps


class WrongResult(AssertionError):
    """A provider's numbers are not those of the equations."""


def relative_error(result: Tensor, want: Tensor) -> float:
    """In the precision of ``want``."""
    # A target rank of 1 has a gradient of 0.
    want = want.detach()
    return float((result.detach().to(want.dtype) - want).norm() / want.norm().clamp_min(EPS))


def rounding(
    shape: tuple[int, int], spectrum: float, state: torch.dtype, result: torch.dtype
) -> float:
    """The relative error to allow a (rows, columns) layer; ``spectrum``: |W|_F / sigma.

    The rounding of sums in the dtype of u and v is about its eps times the norms of a dot
    product's two vectors, that is eps |W|_F / sigma relative to sigma, and up to sqrt(n) eps for a
    sum of n squares. Each result is rounded once.
    """
    sums = SAFETY * torch.finfo(state).eps * (max(shape) ** 0.5 + spectrum)
    return sums + torch.finfo(result).eps / 2


@dataclass(frozen=True)
class Oracle:
    """W_hat and dL/dW of one step in float64 (kept in float32), and the errors to allow."""

    outputs: list[Tensor]
    grads: list[Tensor]
    tolerances: list[float]

    def check(self, name: str, what: str, results: Sequence[Tensor], allowance: float) -> None:
        """Raises :class:`WrongResult` naming the layer that is furthest off."""
        wanted = self.grads if what == "gradient" else self.outputs
        if len(results) != len(wanted):
            raise WrongResult(f"{name}: {len(results)} results for {len(wanted)} layers")
        for i, (result, want) in enumerate(zip(results, wanted, strict=True)):
            error = relative_error(result, want)
            allowed = max(self.tolerances[i], allowance)
            if not error <= allowed:
                raise WrongResult(
                    f"{name}: {what} of layer {i}, shape {tuple(want.shape)}, is off by "
                    f"{error:.1e} relative, {allowed:.1e} is allowed"
                )


def make_oracle(problem: Problem, rank_ratio: float, v_first: bool = False) -> Oracle:
    """One training step from the problem's u and v, layer by layer in float64.

    ``v_first`` starts the power iteration with v, which is the same step on W^T.
    """
    outputs, grads, tolerances = [], [], []
    for i, target_rank in enumerate(problem.target_ranks(rank_ratio)):
        dim = 1 if v_first else 0
        u, v = problem.us[i].double(), problem.vs[i].double()
        weight = problem.weights[i].double().requires_grad_()
        target_rank = target_rank if min(weight.shape) > 1 else float("inf")
        first, second = (v, u) if v_first else (u, v)
        steps = problem.n_power_iterations
        layer = TOP_ONE.normalize_layer(weight, first, second, target_rank, steps, 1e-12, dim)
        (grad,) = torch.autograd.grad(layer.weight, weight, problem.upstream[i].double())
        outputs.append(layer.weight.detach().float())
        grads.append(grad.float())
        seen = Stats(*layer.stats)
        spectrum = float(seen.frobenius_sq.sqrt() / seen.sigma)
        dtype = problem.workload.dtype
        tolerances.append(rounding(tuple(weight.shape), spectrum, torch.float32, dtype))
    return Oracle(outputs, grads, tolerances)


def check_runner(name: str, runner: Runner, oracle: Oracle, modes: Sequence[str]) -> None:
    """The runner's first step, and an evaluation after it, which must give the same W_hat."""
    half = runner.problem.workload.dtype != torch.float32
    allowance = max(runner.allowance, runner.half_allowance if half else 0.0)
    runner.train(True)
    outputs = runner.outputs()
    oracle.check(name, "output", outputs, allowance)
    if {"backward", "forward_backward"} & set(modes):
        oracle.check(name, "gradient", runner.gradients(outputs), allowance)
    del outputs
    if "evaluation" in modes:
        runner.train(False)
        with torch.no_grad():
            oracle.check(name, "evaluation output", runner.outputs(), allowance)
        runner.train(True)
