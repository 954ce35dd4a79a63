"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import store, suite, tables, workloads
from benchmarks.providers import PROVIDERS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()

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
            budget=1.0,
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
        options = replace(options, modes=tuple(modes))
    if ratios:
        if not all(0 < r <= 1 for r in ratios):
            raise typer.BadParameter(f"--rank-ratio {ratios}: each must be in (0, 1]")
        options = replace(options, rank_ratios=tuple(sorted(set(ratios), reverse=True)))
    if repeats:
        options = replace(options, repeats=repeats)
    return options


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
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    rows: list[store.Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=suite.count_steps(names, options))
        watcher = suite.Watcher(
            say=lambda text: progress.update(task, description=text),
            advance=lambda: progress.advance(task),
            complain=lambda text: progress.console.print(f"[red]{text}[/red]"),
        )
        for item in chosen:
            found = []
            for part in (suite.run_matrices, suite.run_step):
                try:
                    found += part(item, options, base, watcher)
                except MemoryError as error:
                    watcher.fail(str(error))
            if save:
                store.append(found, folder / "cpu.jsonl")
            rows += found
    for grid in tables.grids(rows):
        console.print(grid.rich())
    console.print(tables.caption(rows) if rows else "nothing was measured", highlight=False)
    if base.load > 0.5:
        console.print(f"[yellow]load average {base.load} at the start: expect noise[/yellow]")
    if watcher.failures:
        raise typer.Exit(1)


@app.command()
def table(
    write: Annotated[Path | None, typer.Option(help="Put the tables into this file.")] = None,
    check: Annotated[Path | None, typer.Option(help="Fail if this file disagrees.")] = None,
    folder: Folder = store.RESULTS,
) -> None:
    """Markdown tables of the newest rows, for the terminal or between a document's markers."""
    block = tables.markdown(store.published(store.load(folder)))
    try:
        if check:
            if difference := tables.difference(check, block):
                typer.echo(difference)
                raise typer.Exit(1)
        elif write:
            write.write_text(tables.replaced(write.read_text(), block))
        else:
            typer.echo(block)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def plot(out: Path, folder: Folder = store.RESULTS) -> None:
    """Draw the newest rows into OUT (png, svg or pdf)."""
    from benchmarks import plots

    try:
        plots.overhead(store.published(store.load(folder)), out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"wrote {out}")


@app.command()
def compare(before: str, after: str, folder: Folder = store.RESULTS) -> None:
    """The times of two commits, side by side; a change counts where the spreads do not overlap."""
    rows = store.load(folder)
    try:
        console.print(tables.comparison(rows, before, after).rich())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
