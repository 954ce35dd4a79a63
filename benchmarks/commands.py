"""The commands of ``python -m benchmarks``: measure on a CPU, and publish the store."""

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

from benchmarks.arguments import Folder, Names, Save, Threads, use_threads
from benchmarks.cases import workloads
from benchmarks.cases.providers import PROVIDERS
from benchmarks.gpu import commands as gpu
from benchmarks.measure import busy, groups, growth, linalg, options, store, suite
from benchmarks.report import documents, picture, tables

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.command("linalg")(linalg.run)
app.command("options")(options.run)
console = Console()


def _options(
    quick: bool, providers: Names, modes: Names, ratios: list[float] | None, repeats: int | None
) -> suite.Options:
    chosen = suite.Options()
    if quick:
        quickly = tuple(p for p in PROVIDERS if p != "torch_sn_compiled")
        chosen = replace(
            chosen,
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
        chosen = replace(chosen, providers=tuple(p for p in PROVIDERS if p in providers))
    if modes:
        chosen = replace(chosen, modes=tuple(modes), long_steps=True)
    if ratios:
        if not all(0 < r <= 1 for r in ratios):
            raise typer.BadParameter(f"--rank-ratio {ratios}: each must be in (0, 1]")
        chosen = replace(chosen, rank_ratios=tuple(sorted(set(ratios), reverse=True)))
    if repeats:
        chosen = replace(chosen, repeats=repeats)
    return chosen


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
    threads: Threads = None,
    save: Save = False,
    folder: Folder = store.RESULTS,
) -> None:
    """Measure; every provider is checked against float64 before it is timed."""
    wanted = _options(quick, provider, mode, rank_ratio, repeats)
    names = workload or list(workloads.QUICK if quick else workloads.CORE)
    try:
        chosen = [workloads.find(name) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    use_threads(threads)
    base = store.environment()
    rows: list[store.Row] = []
    with _watched(suite.count_steps(names, wanted)) as watcher:
        for item in chosen:
            found = []
            for part in (suite.run_matrices, suite.run_step):
                try:
                    found += part(item, wanted, base, watcher)
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
    save: Save = False,
    folder: Folder = store.RESULTS,
) -> None:
    """Measure how the cost grows with parameters, layers, power iterations and threads."""
    wanted = replace(suite.Options(), repeats=repeats, budget=0.5)
    base = store.environment()
    with _watched(repeats * len(list(growth.points(torch.get_num_threads())))) as watcher:
        rows = growth.run(wanted, base, watcher)
        if save:
            store.append(rows, folder / store.CURVES)
        for grid in tables.curves(rows):
            console.print(grid.rich())
        _warn_of_load(base.load)


@app.command("busy")
def busy_command(
    workload: Annotated[Names, typer.Option(help="Name, part (gpt2_xl/8) or 64x512x256.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 40,
    budget: Annotated[float, typer.Option(help="Seconds for a provider in a case.")] = 5.0,
    save: Save = False,
    folder: Folder = store.RESULTS,
) -> None:
    """Measure beside other processes that want the same cores: minutes, most of them torch's."""
    wanted = replace(suite.Options(), repeats=repeats, budget=budget)
    names, base, rows = workload or list(busy.WORKLOADS), store.environment(), []
    with _watched(busy.count_steps(names, wanted)) as watcher:
        for found in busy.run(names, wanted, base, watcher):
            rows += found
            if save:
                store.append(found, folder / store.BUSY)
        console.print(tables.busy(rows).rich())
        _warn_of_load(base.load)


@app.command()
def table(folder: Folder = store.RESULTS) -> None:
    """All tables of the last runs, in Markdown."""
    typer.echo(documents.markdown(store.published(store.load(folder))))
    for grid in tables.curves(store.of_last_runs(store.load(folder, store.CURVES))):
        typer.echo("\n" + grid.markdown())


@app.command()
def publish(
    check: Annotated[bool, typer.Option("--check", help="Fail if a document disagrees.")] = False,
    root: Annotated[Path, typer.Option(help="Folder of the documents.")] = store.ROOT,
    folder: Folder = store.RESULTS,
) -> None:
    """Bring README.md, docs/benchmarks.md and their pictures to what the store says."""
    everything = store.load(folder)
    rows = store.published(everything)
    grown, beside = (
        store.of_last_runs(store.load(folder, name)) for name in (store.CURVES, store.BUSY)
    )
    wrong = []
    blocks = documents.blocks(rows, grown, store.repeated(everything), beside)
    for (page, name), block in blocks.items():
        try:
            if difference := documents.difference(root / page, block, name):
                wrong.append(difference)
                if not check:
                    documents.write(root / page, block, name)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    image, drawn = root / documents.PICTURE, picture.savings(rows)
    if drawn and not (image.exists() and image.read_text() == drawn):
        wrong.append(f"{documents.PICTURE} is not what the store gives")
        if not check:
            image.write_text(drawn)
    if check:
        for difference in wrong:
            typer.echo(difference)
        raise typer.Exit(1 if wrong else 0)
    from benchmarks.report import plots

    plots.draw_all(rows, grown, beside, root / "docs")
    console.print("the documents and pictures are those of the store")


@app.command("groups")
def groups_command(
    repeats: Annotated[int, typer.Option(min=1)] = 50,
    budget: Annotated[float, typer.Option(help="Seconds for a number of groups.")] = 20.0,
    save: Annotated[bool, typer.Option("--save", help="Keep the rows, and publish them.")] = False,
) -> None:
    """Measure what groups=n costs a round; --save brings docs/distributed.md to it."""
    rows = groups.run(repeats, budget, store.environment())
    typer.echo(documents.groups_block(rows))
    if save:
        store.append(rows, store.RESULTS / groups.RESULTS)
        documents.write(documents.GROUPS, documents.groups_block(rows))


@app.command()
def compare(before: str, after: str, folder: Folder = store.RESULTS) -> None:
    """The times of two runs, each named by its commit or its date; a change counts where the
    spreads do not overlap."""
    try:
        console.print(tables.comparison(store.load(folder), before, after).rich())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command(
    "gpu",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def gpu_command(context: typer.Context) -> None:
    """On a GPU machine: the plan behind make gpu-check, and its parts; gpu --help."""
    raise typer.Exit(gpu.main(context.args))
