"""Who is measured on a GPU: the floor, the peers, and ours on every live backend with kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import srn_kernels as srn
from benchmarks.cases import ours, peers
from benchmarks.cases.providers import PROVIDERS
from benchmarks.cases.runner import Runner, StatefulRunner
from benchmarks.cases.workloads import Problem
from benchmarks.measure.oracle import WrongResult, make_oracle
from benchmarks.measure.suite import Key, label

MODES = ("forward", "backward", "evaluation")
RANK_RATIOS = (1.0, 0.7)
KERNELS = ("cuda", "triton")  # backends that are measured where they are live


class FlatCopy(Runner):
    """The floor: the same bytes in one tensor, one kernel each way."""

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        self.weight = torch.cat([w.reshape(-1) for w in problem.weights])
        self.upstream = torch.cat([g.reshape(-1) for g in problem.upstream])
        self.out, self.grad = torch.empty_like(self.weight), torch.empty_like(self.weight)

    def outputs(self) -> Sequence[Tensor]:
        self.out.copy_(self.weight)
        return [self.out]

    def prepare_backward(self) -> None:
        pass

    def backward(self) -> None:
        torch.add(self.weight, self.upstream, out=self.grad)


class Graphed(StatefulRunner):
    """The functional round as a CUDA graph: no host work but the replay."""

    backend = "triton"

    def __init__(self, problem: Problem, rank_ratio: float | None) -> None:
        super().__init__(problem, rank_ratio)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            self.round()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.static = self.round()
        for old, new in ((problem.us, self.us), (problem.vs, self.vs)):
            for a, b in zip(old, new, strict=True):
                b.copy_(a)

    def round(self) -> list[Tensor]:
        return srn.functional.stable_rank_normalize(
            self.problem.weights, self.us, self.vs, self.target_ranks, backend=self.backend
        )

    def outputs(self) -> Sequence[Tensor]:
        self.graph.replay()
        return self.static


class Candidate(NamedTuple):
    runner: type[Runner]
    ratios: tuple[float | None, ...]
    modes: tuple[str, ...] = MODES


def live_kernels(device: torch.device) -> list[str]:
    """The backends with kernels that serve a device."""
    found = []
    for name in KERNELS:
        module = srn.backends.load(name)
        if module.unavailable_reason() is None and device.type in module.DEVICES:
            found.append(name)
    return found


def candidates(device: torch.device, backends: Sequence[str]) -> dict[str, Candidate]:
    """Ours on these backends, beside the peers and the floor."""
    chosen = {"copy": Candidate(FlatCopy, (None,))}
    for name in ("torch_sn", "torch_sn_legacy", "foreach"):
        chosen[name] = Candidate(PROVIDERS[name].runner, (1.0,))
    chosen["layerwise"] = Candidate(peers.Layerwise, (0.7,))
    for backend in backends:
        for name, base in (("functional", ours.Functional), ("module", ours.Module)):
            made = type(f"{base.__name__}_{backend}", (base,), {"backend": backend})
            chosen[f"{name}_{backend}"] = Candidate(made, RANK_RATIOS)
        if device.type == "cuda":
            made = type(f"Graphed_{backend}", (Graphed,), {"backend": backend})
            chosen[f"graph_{backend}"] = Candidate(made, (0.7,), ("forward",))
    return chosen


def on_device(problem: Problem, device: torch.device) -> Problem:
    moved = {
        name: [t.to(device) for t in getattr(problem, name)]
        for name in ("weights", "upstream", "us", "vs")
    }
    return replace(problem, **moved)


def build(
    problem: Problem, chosen: Mapping[str, Candidate], fail: Callable[[str], None]
) -> dict[Key, Runner]:
    """The runners whose first step agrees with float64; the others are reported."""
    runners: dict[Key, Runner] = {}
    oracles = {}
    for name, candidate in chosen.items():
        for ratio in candidate.ratios:
            key = (name, ratio)
            try:
                runner = candidate.runner(problem, ratio)
                if ratio is not None:
                    order = ratio, runner.updates_v_first
                    if order not in oracles:
                        oracles[order] = make_oracle(problem, *order)
                    outputs = runner.outputs()
                    oracles[order].check(label(key), "output", outputs, runner.allowance)
                    if "backward" in candidate.modes:
                        torch.autograd.backward(outputs, problem.upstream)
                        grads = [p.grad for p in runner.parameters]
                        oracles[order].check(label(key), "gradient", grads, runner.allowance)
                        for parameter in runner.parameters:
                            parameter.grad = None
            except (WrongResult, RuntimeError) as error:
                fail(f"{problem.workload.name}: {label(key)}: {error}")
                continue
            runners[key] = runner
    return runners
