"""The power method of srn_kernels.linalg against SVDs: ``python -m benchmarks linalg --help``.

On every shape of workloads.json, as a Gaussian matrix and as after training (a nearly flat
spectrum), the top singular values in float32 are compared with those of the same matrix in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import arguments
from benchmarks.cases import workloads
from benchmarks.measure import store, timing
from srn_kernels import linalg

TOP = 4  # singular values
LARGE = 2**20  # elements: timed once
RELATIVE_ERROR = 1e-4
RESULTS = "linalg.jsonl"
MODE = f"top_{TOP}_singular"
console = Console()


def distinct_shapes(names: list[str]) -> list[tuple[int, int]]:
    found = {shape for name in names for shape in workloads.find(name).shapes}
    return sorted(found, key=lambda shape: (shape[0] * shape[1], shape))


def make_matrix(kind: str, rows: int, columns: int) -> Tensor:
    """float32, from a seed of its own."""
    if kind == "trained":
        single = workloads.Workload("", "", ((rows, columns),))
        return workloads.make_problem(single).weights[0]
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def top_values(w: Tensor, k: int) -> Tensor:
    """The largest singular values in float64, to about its roundoff times the first."""
    if w.numel() <= LARGE:
        return torch.linalg.svdvals(w.double())[:k]
    w = w.double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return torch.linalg.eigvalsh(gram).flip(0)[:k].sqrt()


def timed(function: Callable[[], object], repeats: int) -> timing.Spread:
    """With one call and no warm-up for repeats = 1."""
    if repeats == 1:
        start = time.perf_counter()
        function()
        return _exact(time.perf_counter() - start)
    samples = timing.measure({"": timing.Body(function)}, repeats=repeats, budget=1.0)
    return samples.spread("")


def _exact(value: float) -> timing.Spread:
    return timing.Spread(value, value, value, 1)


def measure(
    kind: str, rows: int, columns: int, repeats: int, base: store.Row
) -> tuple[list[store.Row], str | None]:
    """Rows of one matrix, and what is wrong with its result if anything is."""
    w = make_matrix(kind, rows, columns)
    k = min(TOP, rows, columns)
    expected = top_values(w, k)
    repeats = 1 if w.numel() > LARGE else repeats
    found = linalg.top_singular(w, k)
    error = (found.S.double() - expected).abs()
    relative, residual = float((error / expected).max()), float((found.residual / found.S[0]).max())
    wrong = None
    if relative > RELATIVE_ERROR:
        wrong = f"{kind} {rows}x{columns}: off by {relative:.2g}, relative"
    elif (error > found.residual).any():
        wrong = f"{kind} {rows}x{columns}: the error {error.tolist()} exceeds its certified bound"
    base = replace(base, workload=f"{rows}x{columns}/{kind}", mode=MODE, bytes=4 * rows * columns)
    power, svd = replace(base, provider="power"), replace(base, provider="svd")
    made = [
        power.with_result("time_ms", timed(lambda: linalg.top_singular(w, k), repeats), 1e3),
        svd.with_result("time_ms", timed(lambda: torch.linalg.svdvals(w), repeats), 1e3),
        power.with_result("iterations", _exact(found.iterations)),
        power.with_result("relative_error", _exact(relative)),
        power.with_result("relative_residual", _exact(residual)),
    ]
    return made, wrong


def run(
    workload: arguments.Workloads = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: arguments.Threads = None,
    save: arguments.Save = False,
    folder: arguments.Folder = store.RESULTS,
) -> None:
    """Measure; fails if a value is off by more than 1e-4 or beyond its certified residual."""
    arguments.use_threads(threads)
    base, rows, failures = store.environment(), [], []
    shapes = distinct_shapes(workload or list(workloads.load()))
    table = Table("shape", "kind", "iterations", "power ms", "svd ms", "error", "residual")
    for shape in track(shapes, console=console, transient=True):
        for kind in ("gaussian", "trained"):
            made, wrong = measure(kind, *shape, repeats, base)
            values = [row.p50 for row in made]
            table.add_row(
                f"{shape[0]}x{shape[1]}",
                kind,
                f"{values[2]:.0f}",
                *(f"{v:.3g}" for v in (values[0], values[1], values[3], values[4])),
            )
            rows += made
            failures += [wrong] if wrong else []
    console.print(table)
    if save:
        store.append(rows, folder / RESULTS)
    for failure in failures:
        console.print(f"[red]{failure}[/red]")
    if failures:
        raise typer.Exit(1)
