"""What every provider is: a Runner, declared once; and the two kinds of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import srn_kernels as srn
from benchmarks.cases.workloads import Problem, Workload

MODES = ("forward", "backward", "forward_backward", "evaluation")
KERNELS = "kernels"


class Body(NamedTuple):
    """What is timed, and what has to be done before each call of it."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


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


class StatefulRunner(Runner):
    """Providers that are functions of weights, u and v."""

    float32_state = True  # whatever the weights' dtype is

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        dtype = torch.float32 if self.float32_state else problem.workload.dtype
        self.us = [u.to(dtype, copy=True) for u in problem.us]
        self.vs = [v.to(dtype, copy=True) for v in problem.vs]
        self.target_ranks = problem.target_ranks(1.0 if rank_ratio is None else rank_ratio)
