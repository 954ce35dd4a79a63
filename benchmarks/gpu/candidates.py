"""Who is measured on a GPU: the floor, the peers, and ours on every live backend with kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import srn_kernels as srn
from benchmarks.cases import ours
from benchmarks.cases.providers import PROVIDERS
from benchmarks.cases.runner import Runner, StatefulRunner
from benchmarks.cases.workloads import Problem, Workload
from benchmarks.measure.oracle import WrongResult, check_runner, make_oracle
from benchmarks.measure.suite import Key, label

MODES = ("forward", "backward", "evaluation")
RANK_RATIOS = (1.0, 0.7)
PEERS = ("torch_sn", "torch_sn_legacy", "torch_sn_compiled", "foreach", "layerwise")
KERNELS = ("cuda", "triton", "cpu")  # measured where they serve; cpu in rehearsals alone


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


def candidates(
    device: torch.device, backends: Sequence[str], workload: Workload
) -> dict[str, Candidate]:
    """Ours on these backends, beside the peers and the floor."""
    chosen = {"copy": Candidate(FlatCopy, (None,))}
    for name in PEERS:
        declared = PROVIDERS[name]
        if ratios := declared.ratios(RANK_RATIOS, workload):
            modes = tuple(m for m in MODES if m in declared.modes)
            chosen[name] = Candidate(declared.runner, tuple(ratios), modes)
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
                    check_runner(label(key), runner, oracles[order], candidate.modes)
            except (WrongResult, RuntimeError) as error:
                fail(f"{problem.workload.name}: {label(key)}: {error}")
                continue
            runners[key] = runner
    return runners
