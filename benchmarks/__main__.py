"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import growth, store, suite, tables, workloads
from benchmarks.providers import PROVIDERS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()
ROOT = Path(__file__).parent.parent

Folder = Annotated[Path, typer.Option("--store", help="Folder of the stored rows.")]
Names = list[str] | None


def _options(
    quick: bool, providers: Names, modes: Names, ratios: list[float] | None, repeats: int | None
) -> suite.Options:
    options = suite.Options()
    if quick:
        quickly = tuple(p for p in PROVIDERS if p != "torch_sn_compiled")
        options = replace(
            options,
            providers=quickly,
            modes=("forward", "forward_backward"),
            repeats=10,
            budget=0.3,
        )
    for flag, names, known in (
        ("--provider", providers, tuple(PROVIDERS)),
        ("--mode", modes, suite.Options.modes),
    ):
        if unknown := set(names or ()) - set(known):
            raise typer.BadParameter(f"{flag} {sorted(unknown)}: choose from {', '.join(known)}")
    if providers:
        options = replace(options, providers=tuple(p for p in PROVIDERS if p in providers))
    if modes:
        options = replace(options, modes=tuple(modes), long_steps=True)
    if ratios:
        if not all(0 < r <= 1 for r in ratios):
            raise typer.BadParameter(f"--rank-ratio {ratios}: each must be in (0, 1]")
        options = replace(options, rank_ratios=tuple(sorted(set(ratios), reverse=True)))
    if repeats:
        options = replace(options, repeats=repeats)
    return options


@contextlib.contextmanager
def _watched(total: int) -> Iterator[suite.Watcher]:
    """A progress bar of this many steps; the exit status is 1 if anything failed."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        watcher = suite.Watcher(
            say=lambda text: progress.update(task, description=text),
            advance=lambda: progress.advance(task),
            complain=lambda text: progress.console.print(f"[red]{text}[/red]"),
        )
        yield watcher
    if watcher.failures:
        raise typer.Exit(1)


def _warn_of_load(load: float) -> None:
    if load > 0.5:
        console.print(f"[yellow]load average {load} at the start: expect noise[/yellow]")


@app.command()
def run(
    quick: Annotated[bool, typer.Option(help="Two workloads, few repeats: a minute.")] = False,
    workload: Annotated[Names, typer.Option(help="Name, part (gpt2_xl/8) or 64x512x256.")] = None,
    provider: Annotated[Names, typer.Option(help=f"Of {', '.join(PROVIDERS)}.")] = None,
    mode: Annotated[Names, typer.Option(help=f"Of {', '.join(suite.Options.modes)}.")] = None,
    rank_ratio: Annotated[list[float] | None, typer.Option(help="1: SN; less: SRN.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's own.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Append the rows to the store.")] = False,
    folder: Folder = store.RESULTS,
) -> None:
    """Measure; every provider is checked against float64 before it is timed."""
    options = _options(quick, provider, mode, rank_ratio, repeats)
    names = workload or list(workloads.QUICK if quick else workloads.CORE)
    try:
        chosen = [workloads.find(name) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if threads:
        torch.set_num_threads(threads)
    base = store.environment()
    rows: list[store.Row] = []
    with _watched(suite.count_steps(names, options)) as watcher:
        for item in chosen:
            found = []
            for part in (suite.run_matrices, suite.run_step):
                try:
                    found += part(item, options, base, watcher)
                except MemoryError as error:
                    watcher.fail(str(error))
            if save:
                store.append(found, folder / store.ROUNDS)
            rows += found
        for grid in tables.grids(rows):
            console.print(grid.rich())
        console.print(tables.caption(rows) if rows else "nothing was measured", highlight=False)
        _warn_of_load(base.load)


@app.command()
def grow(
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    save: Annotated[bool, typer.Option("--save", help="Append the rows to the store.")] = False,
    folder: Folder = store.RESULTS,
) -> None:
    """Measure how the cost grows with parameters, layers, power iterations and threads."""
    options = replace(suite.Options(), repeats=repeats, budget=0.5)
    base = store.environment()
    with _watched(repeats * len(list(growth.points(torch.get_num_threads())))) as watcher:
        rows = growth.run(options, base, watcher)
        if save:
            store.append(rows, folder / store.CURVES)
        for grid in tables.curves(rows):
            console.print(grid.rich())
        _warn_of_load(base.load)


@app.command()
def table(folder: Folder = store.RESULTS) -> None:
    """All tables of the last runs, in Markdown."""
    typer.echo(tables.markdown(store.published(store.load(folder))))


@app.command()
def publish(
    check: Annotated[bool, typer.Option("--check", help="Fail if a document disagrees.")] = False,
    root: Annotated[Path, typer.Option(help="Folder of the documents.")] = ROOT,
    folder: Folder = store.RESULTS,
) -> None:
    """Bring README.md, docs/benchmarks.md and their pictures to what the store says."""
    everything = store.load(folder)
    rows = store.published(everything)
    grown = store.of_last_runs(store.load(folder, store.CURVES))
    wrong = []
    documents = tables.documents(rows, grown, store.repeated(everything))
    for name, block in documents.items():
        try:
            if difference := tables.difference(root / name, block):
                wrong.append(difference)
                if not check:
                    (root / name).write_text(tables.replaced((root / name).read_text(), block))
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    if check:
        for difference in wrong:
            typer.echo(difference)
        raise typer.Exit(1 if wrong else 0)
    from benchmarks import plots

    plots.draw_all(rows, grown, root / "docs")
    console.print("the documents and pictures are those of the store")


@app.command()
def compare(before: str, after: str, folder: Folder = store.RESULTS) -> None:
    """The times of two runs, each named by its commit or its date; a change counts where the
    spreads do not overlap."""
    try:
        console.print(tables.comparison(store.load(folder), before, after).rich())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
