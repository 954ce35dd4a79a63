"""Who is timed: every provider is a Runner, declared once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import spectral_norm

import srn_kernels as srn
from benchmarks.timing import Body
from benchmarks.workloads import Problem, Workload
from srn_kernels.backends import cpu

MODES = ("forward", "backward", "forward_backward", "evaluation")
KERNELS = "kernels"


class Runner:
    """One provider on one problem; the methods named in MODES are what is timed.

    Results die inside the timed call, as they do within a training step. The parameters share the
    problem's memory, and have gradients of their own.
    """

    updates_v_first = False  # torch's legacy hook: v = W^T u, then u = W v
    allowance = 0.0  # a relative error of a peer that is known, and not ours to mend
    half_allowance = 0.05  # of peers that compute in a half-precision weight's own dtype
    countable = True  # its operators pass the dispatcher one by one

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        self.problem = problem
        self.rank_ratio = rank_ratio
        self.training = True
        self.parameters = [nn.Parameter(w) for w in problem.weights]
        self.pending: Sequence[Tensor] = ()

    def outputs(self) -> Sequence[Tensor]:
        """All normalised weights, after one power iteration each when training."""
        raise NotImplementedError

    def train(self, training: bool) -> None:
        self.training = training

    def forward(self) -> None:
        self.outputs()

    def prepare_backward(self) -> None:
        self.pending = self.outputs()

    def gradients(self, outputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """dL/dW of every weight, from the problem's dL/dW_hat."""
        torch.autograd.backward(outputs, self.problem.upstream)
        grads = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return grads

    def backward(self) -> None:
        outputs, self.pending = self.pending, ()
        self.gradients(outputs)

    def forward_backward(self) -> None:
        self.prepare_backward()
        self.backward()

    def evaluation(self) -> None:
        with torch.no_grad():
            self.outputs()

    def body(self, mode: str) -> Body:
        """One of MODES, to be timed."""
        prepare = {"prepare": self.prepare_backward} if mode == "backward" else {}
        return Body(getattr(self, mode), **prepare)


@dataclass(frozen=True)
class Provider:
    """A declared provider: what it is, and what it can do.

    It sits out workloads of more than ``most_layers``, and serves the last wanted rank ratio alone
    where there are more than ``most_parameters``, so that a run ends in ten minutes.
    """

    name: str
    title: str
    runner: type[Runner]
    spectral: bool
    stable_rank: bool
    modes: tuple[str, ...]
    needs_kernels: bool
    most_layers: int | None
    most_parameters: int | None

    def ratios(self, wanted: Sequence[float], workload: Workload) -> list[float | None]:
        """Those of the wanted rank ratios that it serves; [None] for a floor."""
        if len(workload.shapes) > (self.most_layers or len(workload.shapes)):
            return []
        if not (self.spectral or self.stable_rank):
            return [None]
        served = [r for r in wanted if (self.spectral if r == 1 else self.stable_rank)]
        long = workload.parameters > (self.most_parameters or workload.parameters)
        return served[-1:] if long else served

    def unavailable_reason(self) -> str | None:
        return srn.available_backends()["cpu"] if self.needs_kernels else None


PROVIDERS: dict[str, Provider] = {}


def provider(
    name: str,
    title: str,
    *,
    spectral: bool = True,
    stable_rank: bool = False,
    modes: tuple[str, ...] = MODES,
    needs_kernels: bool = False,
    most_layers: int | None = None,
    most_parameters: int | None = None,
) -> Callable[[type[Runner]], type[Runner]]:
    """Declares the decorated Runner."""

    def declare(runner: type[Runner]) -> type[Runner]:
        PROVIDERS[name] = Provider(
            name,
            title,
            runner,
            spectral,
            stable_rank,
            modes,
            needs_kernels,
            most_layers,
            most_parameters,
        )
        return runner

    return declare


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


class Layer(nn.Linear):
    """A layer reduced to its weight: a call costs the hooks and nothing else."""

    def __init__(self, weight: nn.Parameter) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = weight

    def forward(self) -> Tensor:
        return self.weight


class WeightReader(nn.Module):
    """A model that calls each of its layers once."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(w) for w in weights)

    def forward(self) -> list[Tensor]:
        return [layer() for layer in self.layers]


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


class ModelRunner(Runner):
    """Providers that live in modules."""

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        self.model = WeightReader(self.parameters)
        self.wrap()
        with torch.no_grad():
            for layer, u, v in zip(self.model.layers, problem.us, problem.vs, strict=True):
                for state, start in zip(self.state(layer), (u, v), strict=True):
                    state.copy_(start)
        self.call: Callable[[], Sequence[Tensor]] = self.model

    def wrap(self) -> None:
        """Normalises every layer of ``self.model``."""
        raise NotImplementedError

    def state(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        return layer.weight_u, layer.weight_v

    def train(self, training: bool) -> None:
        super().train(training)
        self.model.train(training)

    def outputs(self) -> Sequence[Tensor]:
        return self.call()


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


class StatefulRunner(Runner):
    """Providers that are functions of weights, u and v."""

    float32_state = True  # whatever the weights' dtype is

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        dtype = torch.float32 if self.float32_state else problem.workload.dtype
        self.us = [u.to(dtype, copy=True) for u in problem.us]
        self.vs = [v.to(dtype, copy=True) for v in problem.vs]
        self.target_ranks = problem.target_ranks(1.0 if rank_ratio is None else rank_ratio)


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


@provider("reference", "srn_kernels reference", stable_rank=True, most_parameters=2**25)
class Reference(StatefulRunner):
    half_allowance = 0.0

    def outputs(self) -> Sequence[Tensor]:
        return srn.reference.stable_rank_normalize(
            self.parameters,
            self.us,
            self.vs,
            self.target_ranks,
            n_power_iterations=self.problem.n_power_iterations,
            training=self.training,
        )


@provider(KERNELS, "srn_kernels, kernels alone", stable_rank=True, needs_kernels=True)
class Kernels(StatefulRunner):
    """Two calls into memory that stays: what everything around the kernels is measured against."""

    half_allowance = 0.0

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        weights, n = problem.weights, len(problem.weights)
        shapes = tuple(tuple(w.shape) for w in weights)
        ranks = map(srn.functional.effective_rank, self.target_ranks, *zip(*shapes, strict=True))
        target_ranks = tuple(ranks)
        dtypes, names = tuple(w.dtype for w in weights), tuple(map(str, range(n)))
        self.plans = {
            training: srn.functional.make_plan(
                shapes,
                target_ranks,
                (problem.n_power_iterations if training else 0,) * n,
                (0,) * n,
                (1e-12,) * n,
                dtypes,
                names,
                "cpu",
                "frozen",
            )
            for training in (True, False)
        }
        self.outs = [torch.empty_like(w) for w in weights]
        self.grads = [torch.empty_like(w) for w in weights]
        self.round_state = torch.empty(self.plans[True].state_size)
        self.stats = torch.empty(n, len(srn.reference.STATS), dtype=torch.float64)

    def outputs(self) -> Sequence[Tensor]:
        plan = self.plans[self.training]
        cpu.normalize(
            self.problem.weights,
            self.us,
            self.vs,
            self.outs,
            self.round_state,
            self.stats,
            plan.offsets,
            plan.target_ranks,
            plan.iterations,
            plan.dims,
            plan.eps,
        )
        return self.outs

    def gradients(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        plan = self.plans[True]
        cpu.normalize_backward(
            self.problem.upstream,
            self.problem.weights,
            self.round_state,
            self.stats,
            self.grads,
            range(len(self.grads)),
            plan.offsets,
            plan.dims,
        )
        return self.grads


@provider("functional", "srn_kernels functional", stable_rank=True, needs_kernels=True)
class Functional(StatefulRunner):
    half_allowance = 0.0
    backend = "cpu"

    def outputs(self) -> Sequence[Tensor]:
        return srn.functional.stable_rank_normalize(
            self.parameters,
            self.us,
            self.vs,
            self.target_ranks,
            n_power_iterations=self.problem.n_power_iterations,
            training=self.training,
            backend=self.backend,
        )


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
