"""Runs workloads: build every provider, gate it, time it beside the others, make rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.cases import steps, workloads
from benchmarks.cases.providers import KERNELS, MODES, PROVIDERS, Provider, Runner
from benchmarks.cases.workloads import Problem, Workload
from benchmarks.measure import counting, memory, spent
from benchmarks.measure.oracle import WrongResult, check_runner, make_oracle
from benchmarks.measure.store import Row
from benchmarks.measure.timing import Samples, Spread, measure, spread

Key = tuple[str, float | None]  # provider, rank ratio

STEP = "step"  # the mode of whole models


@dataclass(frozen=True)
class Options:
    """What to run, and how long."""

    providers: tuple[str, ...] = tuple(PROVIDERS)
    modes: tuple[str, ...] = (*MODES, STEP)
    rank_ratios: tuple[float, ...] = (1.0, 0.7)
    n_power_iterations: int = 1
    long_steps: bool = False  # steps of seconds too
    repeats: int = 30
    budget: float = 1.0  # seconds for one provider in one mode

    def wanted(self, workload: Workload) -> list[tuple[Provider, float | None]]:
        """The providers, with their rank ratios, that this workload is not too long for."""
        chosen = [PROVIDERS[name] for name in self.providers]
        return [
            (provider, ratio)
            for provider in chosen
            for ratio in provider.ratios(self.rank_ratios, workload)
        ]


@dataclass
class Watcher:
    """Told how a run goes; the command line shows it."""

    say: Callable[[str], None] = lambda text: None
    advance: Callable[[], None] = lambda: None
    complain: Callable[[str], None] = lambda text: None
    failures: int = 0

    def fail(self, text: str) -> None:
        self.failures += 1
        self.complain(text)


def label(key: Key) -> str:
    name, ratio = key
    return name if ratio is None else f"{name}@{ratio:g}"


def _over(time: float, base: float) -> float:
    return time / base


def _speedup(time: float, base: float) -> float:
    return base / time


def _added_ms(time: float, base: float) -> float:
    return 1e3 * (time - base)


def comparisons(key: Key) -> list[tuple[str, Key, Callable[[float, float], float]]]:
    """(metric, base, function of both times) of one candidate."""
    _, ratio = key
    return [
        ("added_ms", ("plain", None), _added_ms),
        ("time_over_copy_x", ("copy", None), _over),
        ("time_over_kernels_x", (KERNELS, ratio), _over),
        ("speedup_over_torch_sn_x", ("torch_sn", 1.0), _speedup),
        ("speedup_over_layerwise_x", ("layerwise", ratio), _speedup),
        ("speedup_over_reference_x", ("reference", ratio), _speedup),
    ]


def make_rows(samples: Samples[Key], base: Row) -> list[Row]:
    """The time of every candidate, and its ratios to those of the bases that ran beside it."""
    rows = []
    for key in samples:
        row = replace(base, provider=key[0], rank_ratio=key[1])
        rows.append(row.with_result("time_ms", samples.spread(key), 1e3))
        for metric, other, function in comparisons(key):
            if other != key and (result := samples.paired(key, other, function)):
                rows.append(row.with_result(metric, result))
    return rows


def gated(problem: Problem, options: Options, watcher: Watcher) -> dict[Key, Runner]:
    """Builds the providers; those with a wrong result are reported and left out."""
    runners: dict[Key, Runner] = {}
    oracles = {}
    for declared, ratio in options.wanted(problem.workload):
        key = (declared.name, ratio)
        if reason := declared.unavailable_reason():
            watcher.complain(f"{label(key)} is not available: {reason}")
            continue
        watcher.say(f"{problem.workload.name}: checking {label(key)}")
        runner = declared.runner(problem, ratio)
        if ratio is not None:
            order = ratio, runner.updates_v_first
            if order not in oracles:
                oracles[order] = make_oracle(problem, *order)
            try:
                check_runner(label(key), runner, oracles[order], declared.modes)
            except WrongResult as error:
                watcher.fail(str(error))
                continue
        runners[key] = runner
    return runners


def run_matrices(
    workload: Workload, options: Options, base: Row, watcher: Watcher, seed: int = 0
) -> list[Row]:
    """All modes but whole models' steps. Raises MemoryError if it would not fit."""
    modes = [m for m in options.modes if m in MODES]
    # Weights, gradients, copies, float64 results for every rank ratio, and what is in flight.
    mebibytes = (12 + 2 * len(options.rank_ratios)) * workload.parameters * 4 / 2**20
    if mebibytes > (there := memory.available_mebibytes()):
        raise MemoryError(
            f"{workload.name} needs about {mebibytes:.0f} MiB, {there:.0f} MiB are available; "
            f"try a part of it, {workload.name}/8"
        )
    if not modes:
        return []
    iterations = options.n_power_iterations
    base = replace(base, n_power_iterations=iterations)
    runners = gated(workloads.make_problem(workload, seed, iterations), options, watcher)
    rows = []
    for mode in modes:
        chosen = {k: r for k, r in runners.items() if mode in PROVIDERS[k[0]].modes}
        for runner in chosen.values():
            runner.train(mode != "evaluation")
        watcher.say(f"{workload.name}: {mode}")
        samples: Samples[Key] = measure(
            {key: runner.body(mode) for key, runner in chosen.items()},
            repeats=options.repeats,
            budget=options.budget,
            step=watcher.advance,
        )
        size = workloads.floor_bytes(workload, mode)
        row = replace(base, workload=workload.name, mode=mode, bytes=size)
        rows += make_rows(samples, row)
        if mode == "forward_backward":
            rows += memory_rows(chosen, row)
            rows += count_rows(chosen, row)
            rows += host_rows(chosen, workload, options, row)
    return rows


def _normalizing(runners: dict[Key, Runner], base: Row) -> Iterator[tuple[Runner, Row]]:
    for (name, ratio), runner in runners.items():
        if ratio is not None:
            yield runner, replace(base, provider=name, rank_ratio=ratio)


def memory_rows(runners: dict[Key, Runner], base: Row) -> list[Row]:
    """Peak memory of a forward and backward beyond weights and dL/dW_hat, where it can be told."""
    repeats = 3 if base.bytes < 2**28 else 1  # all of it is touched anew each time
    gc.collect()
    rows = []
    for runner, row in _normalizing(runners, base):
        peaks = [memory.peak_mebibytes(runner.forward_backward) for _ in range(repeats)]
        if None not in peaks:
            rows.append(row.with_result("peak_memory_mib", spread(peaks)))
    return rows


def count_rows(runners: dict[Key, Runner], base: Row) -> list[Row]:
    """Operators of a forward and backward, and the bytes of their tensors over the floor."""
    rows = []
    for runner, row in _normalizing(runners, base):
        if runner.countable:
            found = counting.count(runner.forward_backward)
            over = found.bytes / base.bytes
            rows.append(row.with_result("operators", Spread(*[float(found.operators)] * 3, 1)))
            rows.append(row.with_result("bytes_over_floor_x", Spread(over, over, over, 1)))
    return rows


def host_rows(
    runners: dict[Key, Runner], workload: Workload, options: Options, base: Row
) -> list[Row]:
    """What the calls cost beside the bytes: the time with every matrix shrunk to 4 x 4."""
    twin = replace(workload, shapes=((4, 4),) * len(workload.shapes))
    problem = workloads.make_problem(twin, n_power_iterations=options.n_power_iterations)
    bodies = {
        key: type(runner)(problem, key[1]).body(base.mode)
        for key, runner in runners.items()
        if (key[1] is not None or key[0] == "plain") and runner.countable
    }
    samples: Samples[Key] = measure(bodies, repeats=options.repeats, budget=options.budget)
    return [
        replace(base, provider=key[0], rank_ratio=key[1]).with_result(
            "host_ms", samples.spread(key), 1e3
        )
        for key in samples
    ]


def has_step(name: str, options: Options) -> bool:
    """Whether a run times the step of this workload's model."""
    return name in steps.MODELS and (options.long_steps or not steps.MODELS[name].long)


def run_step(workload: Workload, options: Options, base: Row, watcher: Watcher) -> list[Row]:
    """The training step of the workload's model: plain, and with each spectral normalisation."""
    if STEP not in options.modes or not has_step(workload.name, options):
        return []
    keys: list[Key] = [("plain", None)]
    for declared, ratio in replace(options, rank_ratios=(1.0,)).wanted(workload):
        if (
            declared.name != "plain"
            and declared.name in steps.STEP_PROVIDERS
            and not declared.unavailable_reason()
        ):
            keys.append((declared.name, ratio))
    if len(keys) == 1:
        return []
    watcher.say(f"{workload.name}: {STEP}")
    made = {key: steps.make_step(steps.MODELS[workload.name], steps.How(*key)) for key in keys}
    plain = made.pop(keys[0])
    candidates = {key: (step, key[0]) for key, step in made.items()}
    samples, costs = spent.measure(plain, keys[0], candidates, advance=watcher.advance)
    base = replace(base, workload=workload.name, mode=STEP)
    rows = [
        row
        for row in make_rows(samples, base)
        if row.metric in ("time_ms", "speedup_over_torch_sn_x")
    ]
    for key, cost in costs.items():
        row = replace(base, provider=key[0], rank_ratio=key[1])
        rows += [
            row.with_interval("spent_ms", cost.summed, 1e3),
            row.with_interval("spent_percent", cost.share),
            row.with_interval("difference_ms", cost.difference, 1e3),
        ]
    return rows


def count_steps(names: Sequence[str], options: Options) -> int:
    """How often a run will call ``Watcher.advance``."""
    matrices = sum(mode in MODES for mode in options.modes)
    whole = sum(has_step(name, options) for name in names) if STEP in options.modes else 0
    return options.repeats * matrices * len(names) + whole * spent.STEPS
