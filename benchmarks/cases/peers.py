"""The floors, and what people use today instead of srn_kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.cases.runner import ModelRunner, Runner, StatefulRunner, WeightReader, provider
from benchmarks.cases.workloads import Problem


@provider("copy", "copy of the same bytes", spectral=False)
class Copy(Runner):
    """The floor: read W, write W_hat; read dL/dW_hat and W, write dL/dW. Memory is reused."""

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        self.outs = [torch.empty_like(w) for w in problem.weights]
        self.grads = [torch.empty_like(w) for w in problem.weights]

    def outputs(self) -> Sequence[Tensor]:
        for out, weight in zip(self.outs, self.problem.weights, strict=True):
            out.copy_(weight)
        return self.outs

    def backward(self) -> None:
        for grad, weight, upstream in zip(
            self.grads, self.problem.weights, self.problem.upstream, strict=True
        ):
            torch.add(weight, upstream, out=grad)


class Untouched(torch.autograd.Function):
    """Hands weights through, and gradients back in memory of their own."""

    @staticmethod
    def forward(ctx, *weights):
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx, *grads):
        return tuple(torch.empty_like(g) for g in grads)


@provider("plain", "not normalised", spectral=False)
class Plain(Runner):
    """What calling a model and a backward cost by themselves: nothing is read or written."""

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        self.model = WeightReader(self.parameters)

    def outputs(self) -> Sequence[Tensor]:
        return Untouched.apply(*self.model())


@provider("torch_sn", "torch spectral norm")
class TorchSN(ModelRunner):
    def wrap(self) -> None:
        for layer in self.model.layers:
            spectral_norm(layer, n_power_iterations=self.problem.n_power_iterations)

    def state(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        return layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v


@provider("torch_sn_legacy", "torch spectral norm, legacy hook")
class TorchSNLegacy(ModelRunner):
    updates_v_first = True

    def wrap(self) -> None:
        for layer in self.model.layers:
            nn.utils.spectral_norm(layer, n_power_iterations=self.problem.n_power_iterations)


@provider(
    "torch_sn_compiled",
    "torch spectral norm, torch.compile",
    modes=("forward", "backward", "forward_backward"),
    most_layers=16,  # compiling takes a second or two a layer
)
class TorchSNCompiled(TorchSN):
    """Compiled as one graph; compilation happens in the correctness gate, before any timing.

    For weights of few columns the compiled backward recomputes u from the buffer of v that the
    forward has overwritten: one iteration ahead, which vanishes as u and v converge.
    """

    allowance = 1e-2
    countable = False

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        self.call = torch.compile(self.model, fullgraph=True, dynamic=False)


class ForeachSpectralNorm(torch.autograd.Function):
    """All layers in one node: two products with W a layer, the rest in torch._foreach calls."""

    @staticmethod
    def forward(ctx, iterations, us, vs, *weights):
        new_us, new_vs = us, vs
        for _ in range(iterations):
            new_us = [torch.mv(w, v) for w, v in zip(weights, new_vs, strict=True)]
            torch._foreach_div_(new_us, torch._foreach_norm(new_us))
            new_vs = [torch.mv(w.T, u) for w, u in zip(weights, new_us, strict=True)]
            sigmas = torch._foreach_norm(new_vs)  # u^T W v = |W^T u|
            torch._foreach_div_(new_vs, sigmas)
        if iterations:
            torch._foreach_copy_(us, new_us)
            torch._foreach_copy_(vs, new_vs)
        else:
            sigmas = [torch.dot(u, torch.mv(w, v)) for w, u, v in zip(weights, us, vs, strict=True)]
        ctx.save_for_backward(*weights, *new_us, *new_vs, *sigmas)
        return tuple(torch._foreach_div(weights, sigmas))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        n = len(grads)
        weights, us, vs, sigmas = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(4))
        results = torch._foreach_div(grads, sigmas)
        inner = [torch.dot(g.view(-1), w.view(-1)) for g, w in zip(grads, weights, strict=True)]
        factors = torch._foreach_div(torch._foreach_div(inner, sigmas), sigmas)
        for result, factor, u, v in zip(results, factors, us, vs, strict=True):
            result.addr_(u * factor, v, alpha=-1)
        return (None, None, None, *results)


@provider("foreach", "spectral norm by hand, torch._foreach")
class Foreach(StatefulRunner):
    """The strong baseline: what an expert writes in an afternoon without a kernel."""

    float32_state = False

    def outputs(self) -> Sequence[Tensor]:
        iterations = self.problem.n_power_iterations if self.training else 0
        return ForeachSpectralNorm.apply(iterations, self.us, self.vs, *self.parameters)


@provider("layerwise", "SRN layer by layer", spectral=False, stable_rank=True)
class Layerwise(StatefulRunner):
    """The obvious code for one layer at a time, which asks the host which branch to take.

    Its float32 norm of millions of squares is the least accurate number of the suite.
    """

    allowance = 1e-3
    float32_state = False

    def outputs(self) -> Sequence[Tensor]:
        states = zip(self.parameters, self.us, self.vs, self.target_ranks, strict=True)
        return [self.layer(*state) for state in states]

    def layer(self, weight: Tensor, u: Tensor, v: Tensor, target_rank: float) -> Tensor:
        if self.training:
            with torch.no_grad():
                for _ in range(self.problem.n_power_iterations):
                    u.copy_(normalize(torch.mv(weight, v), dim=0))
                    v.copy_(normalize(torch.mv(weight.T, u), dim=0))
        u, v = u.clone(), v.clone()
        weight = weight / torch.dot(u, torch.mv(weight, v))
        top = torch.outer(u, v)
        rest = weight - top
        norm, limit = rest.norm(), max(target_rank - 1, 0) ** 0.5
        if min(weight.shape) == 1 or norm <= limit:
            return weight
        return top + rest * (limit / norm)
