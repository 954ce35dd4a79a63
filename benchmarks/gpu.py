"""Measurements on a GPU: times against peers and the copy floor, and counted kernel launches.

    python -m benchmarks.gpu measure [--workload NAME ...] [--out FILE]
    python -m benchmarks.gpu launches [--out FILE]
    python -m benchmarks.gpu small        both kernels once, small: for compute-sanitizer

With --device cpu the kernels run in Triton's interpreter (TRITON_INTERPRET=1): a rehearsal of this
program, whose times mean nothing. `make gpu-check` runs all of it, see gpu_check.py.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import srn_kernels as srn
from benchmarks import providers, store, workloads
from benchmarks.oracle import WrongResult, make_oracle
from benchmarks.providers import Functional, Module, Runner, StatefulRunner
from benchmarks.suite import Key, label
from benchmarks.timing import (
    WARM_UPS,
    Body,
    Samples,
    Spread,
    no_garbage_collection,
    share_of_repeats,
    takes_part,
)
from benchmarks.workloads import Problem, Workload

MODES = ("forward", "backward", "evaluation")
RANK_RATIOS = (1.0, 0.7)
KERNELS = ("triton", "cuda")  # backends that are measured where they are live


@dataclass(frozen=True)
class Row:
    """One number; the metric's name ends with its unit."""

    commit: str
    dirty: bool
    date: str
    srn_kernels: str
    torch: str
    triton: str
    python: str
    device: str
    processors: int
    l2_mb: float
    driver: str
    workload: str = ""
    provider: str = ""
    rank_ratio: float | None = None
    mode: str = ""
    metric: str = ""
    p20: float = 0.0
    p50: float = 0.0
    p80: float = 0.0
    repeats: int = 0
    bytes: int = 0
    kind: str = "gpu"

    def of(self, key: Key) -> Row:
        return replace(self, provider=key[0], rank_ratio=key[1])

    with_result = store.Row.with_result

    def with_count(self, metric: str, n: int) -> Row:
        return self.with_result(metric, Spread(n, n, n, 1))


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def environment(device: torch.device, commit: str | None = None) -> Row:
    """A row without a number: when, on what, and with which versions."""
    here = store.environment()
    name, processors, l2_bytes, driver = "interpreter", 0, 0, "none"
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        name, processors, l2_bytes = p.name, p.multi_processor_count, p.L2_cache_size
        driver = _driver()
    return Row(
        commit or here.commit,
        here.dirty,
        here.date,
        here.srn_kernels,
        torch.__version__,
        _triton_version(),
        platform.python_version(),
        name,
        processors,
        l2_bytes / 2**20,
        driver,
    )


# Who is measured.


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


def candidates(device: torch.device) -> dict[str, Candidate]:
    """Ours, for every live backend with kernels, beside the peers and the floor."""
    chosen = {"copy": Candidate(FlatCopy, (None,))}
    for name in ("torch_sn", "torch_sn_legacy", "foreach"):
        chosen[name] = Candidate(providers.PROVIDERS[name].runner, (1.0,))
    chosen["layerwise"] = Candidate(providers.Layerwise, (0.7,))
    for backend in KERNELS:
        module = srn.backends.load(backend)
        if module.unavailable_reason() or device.type not in module.DEVICES:
            continue
        for name, base in (("functional", Functional), ("module", Module)):
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


# How.


class Times(NamedTuple):
    """Seconds: of the device alone; from idle to done, the host's work included; of the host."""

    device: float
    step: float
    host: float


class CudaTimer:
    """Every run starts with an idle device and an L2 full of other, written bytes."""

    def __init__(self) -> None:
        p = torch.cuda.get_device_properties(0)
        self.other = torch.empty(max(2 * p.L2_cache_size, 1 << 28), dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.hertz = 2e9  # of the device's clock, at most

    def _run(self, body: Body, hidden: float) -> tuple[float, float]:
        body.prepare()
        self.other.zero_()
        torch.cuda.synchronize()
        if hidden:
            torch.cuda._sleep(int(hidden * self.hertz))
        self.start.record()
        begin = time.perf_counter()
        body.run()
        host = time.perf_counter() - begin
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3, host

    def __call__(self, body: Body) -> Times:
        step, host = self._run(body, 0.0)
        # While the device sleeps the host issues everything.
        device, _ = self._run(body, 2 * host + 1e-4)
        return Times(device, step, host)


class HostTimer:
    """For rehearsals."""

    def __call__(self, body: Body) -> Times:
        body.prepare()
        begin = time.perf_counter()
        body.run()
        seconds = time.perf_counter() - begin
        return Times(seconds, seconds, seconds)


def measure(
    bodies: Mapping[Key, Body],
    timer: Callable[[Body], Times],
    repeats: int,
    budget: float,
) -> Times:
    """A ``Samples`` for each time; every candidate once a repeat, in changing order."""
    samples = Times(*(Samples({key: [] for key in bodies}) for _ in Times._fields))
    generator = random.Random(0)
    with no_garbage_collection():
        shares = {}
        for key, body in bodies.items():
            seconds = min(sum(timer(body)[:2]) for _ in range(WARM_UPS))
            shares[key] = share_of_repeats(seconds, repeats, budget)
        for repeat in range(repeats):
            for key in generator.sample(list(bodies), len(bodies)):
                part = takes_part(repeat, shares[key], repeats)
                times = timer(bodies[key]) if part else Times(None, None, None)
                for kind, seconds in zip(samples, times, strict=True):
                    kind[key].append(seconds)
    return samples


def result_rows(samples: Times, base: Row) -> Iterator[Row]:
    """Times, and their ratios within each repeat to the floor and to torch's spectral norm."""
    for key in samples.device:
        row = base.of(key)
        for name, kind in zip(Times._fields, samples, strict=True):
            yield row.with_result(f"{name}_ms", kind.spread(key), 1e3)
        floor = samples.device.paired(key, ("copy", None), lambda t, b: t / b)
        if floor and key[0] != "copy":
            yield row.with_result("device_over_copy_x", floor)
        for name in ("torch_sn", "foreach"):
            faster = samples.step.paired(key, (name, 1.0), lambda t, b: b / t)
            if faster and key[0] not in ("copy", name):
                yield row.with_result(f"step_speedup_over_{name}_x", faster)


def run_workload(
    workload: Workload,
    device: torch.device,
    repeats: int,
    budget: float,
    base: Row,
    fail: Callable[[str], None],
) -> Iterator[Row]:
    problem = on_device(workloads.make_problem(workload), device)
    chosen = candidates(device)
    runners = build(problem, chosen, fail)
    timer = CudaTimer() if device.type == "cuda" else HostTimer()
    for mode in MODES:
        taking_part = {k: r for k, r in runners.items() if mode in chosen[k[0]].modes}
        for runner in taking_part.values():
            runner.train(mode != "evaluation")
        samples = measure(
            {key: runner.body(mode) for key, runner in taking_part.items()}, timer, repeats, budget
        )
        # Backward: read G and W, write dL/dW.
        passes = 3 if mode == "backward" else 2
        size = passes * workload.parameters * workloads.FLOAT_BYTES
        row = replace(base, workload=workload.name, mode=mode, bytes=size)
        for made in result_rows(samples, row):
            yield made
            if made.provider == "copy" and made.metric == "device_ms":
                rate = Spread(*(size / (t / 1e3) for t in (made.p80, made.p50, made.p20)), repeats)
                yield made.with_result("copy_gb_per_s", rate, 1e-9)


# Launches.


def count_cuda(body: Callable[[], object]) -> tuple[int, int]:
    """Kernels and copies on the device during ``body``."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        body()
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
    copies = [n for n in names if n.startswith(("Memcpy", "Memset"))]
    others = [n for n in names if not n.startswith(("Memcpy", "Memset", "Activity Buffer"))]
    return len(others), len(copies)


def count_interpreted(body: Callable[[], object]) -> tuple[int, int]:
    """Kernels that the interpreter runs during ``body``; there are no copies to count."""
    from triton.runtime.interpreter import InterpretedFunction

    run, launches = InterpretedFunction.run, []

    def counted(self, *args, **kwargs):
        launches.append(self)
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted
    try:
        body()
    finally:
        InterpretedFunction.run = run
    return len(launches), 0


MIXED = (
    ((40, 27), torch.float32),
    ((64, 96), torch.bfloat16),
    ((1, 96), torch.float16),
    ((16, 8, 3, 3), torch.float32),
    ((20, 200), torch.float32),
)


def mixed_layers(device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Weights of several dtypes, shapes and layouts, and their output dimensions."""
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(device, dtype) for shape, dtype in MIXED]
    weights.append(torch.randn(8, 12, 4, 4).to(device))
    weights.append(torch.randn(12, 8, 3, 3).to(device, memory_format=torch.channels_last))
    return weights, [0] * len(MIXED) + [1, 0]


def steps(device: torch.device, backend: str) -> dict[str, Callable[[], object]]:
    """What must be one launch, by name; their first calls compile."""
    weights, dims = mixed_layers(device)
    shapes = [(w.shape[d], w.numel() // w.shape[d]) for w, d in zip(weights, dims, strict=True)]
    us = [torch.ones(r, device=device) / math.sqrt(r) for r, _ in shapes]
    vs = [torch.ones(c, device=device) / math.sqrt(c) for _, c in shapes]
    ranks = [max(1.0, 0.5 * min(s)) for s in shapes]
    arguments = {"dims": dims, "backend": backend}
    leaves = [w.detach().requires_grad_() for w in weights]
    grads = [torch.randn_like(w) for w in weights]
    kept: list[Tensor] = []

    def normalize(**keywords) -> list[Tensor]:
        return srn.functional.stable_rank_normalize(leaves, us, vs, ranks, **arguments, **keywords)

    def backward() -> None:
        torch.autograd.grad(kept, leaves, grads, retain_graph=True)

    def project() -> None:
        copies = project.copies
        srn.functional.stable_rank_project_(copies, us, vs, ranks, **arguments)

    project.copies = [w.clone() for w in weights]
    model = providers.WeightReader([torch.nn.Parameter(w.flatten(1).float()) for w in weights])
    srn.apply_stable_rank_norm(model, 0.7, backend=backend)
    upstream = [torch.randn_like(p) for p in (layer.weight for layer in model.layers)]
    round_outputs: list[Tensor] = []

    def model_forward() -> None:
        round_outputs[:] = model()

    def model_backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        torch.autograd.backward(round_outputs, upstream, retain_graph=True)

    made = {
        "forward": lambda: kept.__setitem__(slice(None), normalize()),
        "backward": backward,
        "three iterations": lambda: normalize(n_power_iterations=3),
        "evaluation": lambda: normalize(training=False),
        "projection": project,
        "model forward": model_forward,
        "model backward": model_backward,
    }
    for body in made.values():
        body()
        body()
    return made


def launch_rows(device: torch.device, base: Row, fail: Callable[[str], None]) -> Iterator[Row]:
    count = count_cuda if device.type == "cuda" else count_interpreted
    for name, candidate in candidates(device).items():
        if not name.startswith("functional_"):
            continue
        backend = candidate.runner.backend
        for what, body in steps(device, backend).items():
            kernels, copies = count(body)
            row = replace(base, workload="mixed", provider=backend, mode=what)
            yield row.with_count("launches", kernels)
            yield row.with_count("copies", copies)
            # Gradients of a step may lie elsewhere than those of the last one: one table moves.
            if kernels != 1 or copies > 1:
                fail(
                    f"{backend}: {what} took {kernels} kernels and {copies} copies, not one kernel"
                )


def small(device: torch.device) -> None:
    """Every phase of the kernels once, on layers of a few tiles."""
    for name, candidate in candidates(device).items():
        if name.startswith("functional_"):
            steps(device, candidate.runner.backend)
            problem = workloads.make_problem(Workload("small", "", ((96, 1152), (600, 64))))
            build(on_device(problem, device), {name: candidate}, sys.exit)
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("measure", "launches", "small"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workload", nargs="+", default=list(workloads.CORE))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a candidate and mode")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--commit", help="of a tree that came without its repository")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    failures: list[str] = []

    def fail(text: str) -> None:
        failures.append(text)
        print(f"FAILED {text}", flush=True)

    if chosen.what == "small":
        small(device)
        print("ran every phase")
        return 0
    base = environment(device, chosen.commit)
    if not any(name.startswith("functional_") for name in candidates(device)):
        fail(f"no backend with kernels is live: {srn.available_backends()}")
    if chosen.what == "launches":
        parts = [launch_rows(device, base, fail)]
    else:
        parts = [
            run_workload(workloads.find(name), device, chosen.repeats, chosen.budget, base, fail)
            for name in chosen.workload
        ]
    for rows in parts:
        for row in rows:
            print(
                f"{row.workload} {row.mode}: {label((row.provider, row.rank_ratio))} "
                f"{row.metric} {row.p50:.4g} ({row.p20:.4g} to {row.p80:.4g})",
                flush=True,
            )
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
