"""What the options of a layer cost: ``python -m benchmarks options --help``.

A forward and backward of a round over a workload's matrices, with each option in turn, beside
plain stable rank normalisation in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import srn_kernels as srn
from benchmarks import arguments
from benchmarks.cases import workloads
from benchmarks.measure import store, timing

RATIO = 0.5
OPTIONS: dict[str, dict[str, Any]] = {
    "srn": {},
    "gradient=exact": {"gradient": "exact"},
    "sigma_max": {"sigma_max": 0.95},
    "sigma_max, constant": {"sigma_max": 0.95, "grad_through_sigma": False},
    "gain": {"gain": True},
    "sigma_max and gain": {"sigma_max": 0.95, "gain": True},
    "preserve=0": {"preserve": 0},
    "preserve=2": {"preserve": 2},
    "preserve=4": {"preserve": 4},
}
RESULTS = "options.jsonl"
PROJECTION = "project_after_step"
console = Console()


class Matrices(nn.Module):
    """A model that is nothing but its weights: forward is a round and one read of each W_hat."""

    def __init__(self, problem: workloads.Problem) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for w in problem.weights:
            layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(w.clone())
            self.layers.append(layer)
        self.upstream = problem.upstream

    def forward(self) -> list[torch.Tensor]:
        return [layer.weight for layer in self.layers]


def make_body(problem: workloads.Problem, keywords: dict[str, Any]) -> Callable[[], None]:
    model = srn.apply_stable_rank_norm(Matrices(problem), RATIO, **keywords)

    def body() -> None:
        for p in model.parameters():
            p.grad = None
        torch.autograd.backward(model(), model.upstream)

    return body


def make_projection(problem: workloads.Problem) -> Callable[[], None]:
    model = Matrices(problem)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return srn.project_after_step(optimizer, model, RATIO).project


def run(
    workload: arguments.Workloads = None,
    option: Annotated[
        list[str] | None, typer.Option(help=f"Beside srn; else all of {', '.join(OPTIONS)}.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    budget: Annotated[float, typer.Option(help="Seconds for one option.")] = 3.0,
    threads: arguments.Threads = None,
    save: arguments.Save = False,
    folder: arguments.Folder = store.RESULTS,
) -> None:
    """Measure every option, paired with plain SRN."""
    if unknown := set(option or ()) - {*OPTIONS, PROJECTION}:
        raise typer.BadParameter(f"no option {', '.join(sorted(unknown))}", param_hint="--option")
    arguments.use_threads(threads)
    base = store.environment()
    for name in workload or ["sngan_cifar_resnet_D", "real_esrgan_unet_D"]:
        problem = workloads.make_problem(workloads.find(name))
        chosen = {"srn", *(option or [*OPTIONS, PROJECTION])}
        made = {name: make_body(problem, keys) for name, keys in OPTIONS.items() if name in chosen}
        if PROJECTION in chosen:
            made[PROJECTION] = make_projection(problem)
        bodies = {name: timing.Body(run) for name, run in made.items()}
        samples = timing.measure(bodies, repeats=repeats, budget=budget)
        table, rows = Table("option", "ms", "times plain SRN", title=name), []
        for measured in bodies:
            row = replace(
                base,
                workload=name,
                provider=measured,
                rank_ratio=RATIO,
                mode="forward_backward_module",
            )
            ratio = samples.paired(measured, "srn", lambda time, base: time / base)
            rows.append(row.with_result("time_ms", samples.spread(measured), 1e3))
            rows.append(row.with_result("time_over_srn_x", ratio))
            table.add_row(measured, f"{rows[-2].p50:.3g}", f"{rows[-1].p50:.3g}")
        console.print(table)
        if save:
            store.append(rows, folder / RESULTS)
