"""The commands that remake the paper's experiments and publish their rows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from srn_lab.cli import options
from srn_lab.cli.options import one_clear_error, print_paths
from srn_lab.experiments.catalogue import EXPERIMENTS, select
from srn_lab.experiments.claims import verdicts
from srn_lab.experiments.presets import PRESETS, Preset
from srn_lab.experiments.results import Results
from srn_lab.experiments.runner import Workplace, missing, run_units
from srn_lab.experiments.store import Store
from srn_lab.experiments.units import key
from srn_lab.report.document import disagreement
from srn_lab.report.document import publish as publish_document
from srn_lab.report.page import write_page
from srn_lab.report.tables import claims_table
from srn_lab.training.engine import is_main, leave_together, wait_for_everyone

CHECKOUT = Path(__file__).parents[3]
COMMITTED = CHECKOUT / "benchmarks" / "results" / "paper" / "cpu.jsonl"
DOCUMENTS = tuple(CHECKOUT / "docs" / name for name in ("paper.md", "choosing.md"))

_Preset = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]


def paper(
    preset: _Preset = "cpu",
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated: {', '.join(EXPERIMENTS)}. [default: all]"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="In place of the preset's number.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 1,
    out: options.Out = Path("out/paper"),
    store: Annotated[
        Path | None, typer.Option(help="File of the rows. [default: OUT/rows.jsonl]")
    ] = None,
    root: Annotated[str, typer.Option(help="Folder of CIFAR and CelebA.")] = "data",
    download: Annotated[bool, typer.Option(help="Fetch what is missing, where possible.")] = False,
    inception_weights: Annotated[
        str | None, typer.Option(help="File of Inception's weights, preset gpu.")
    ] = None,
) -> None:
    """Remake the paper's experiments; what has a row already is not run again."""
    console = Console(quiet=not is_main())
    with one_clear_error():
        chosen = _preset(preset, root, inception_weights)
        experiments = select(only or [])
        workplace = Workplace(out, store or out / "rows.jsonl", download)
        units = [unit for experiment in experiments for unit in experiment.units(chosen, seeds)]
        todo = missing(units, workplace)
        wait_for_everyone()  # before the first process adds rows
        known = len({key(unit) for unit in units} - {key(unit) for unit in todo})
        console.print(f"{len(todo)} units to run, {known} have rows in {workplace.store}")
        failures = run_units(todo, workplace, jobs=jobs, console=console)
        leave_together()
        if not is_main():
            return
        rows = Store(workplace.store).rows()
        results = Results(chosen, rows, seeds=seeds, experiments=experiments)
        raised = {f"{f.unit.slot}, seed {f.unit.seed}": f.reason for f in failures}
        files = write_page(out, results, raised)
    _print_claims(results, console)
    print_paths(files, console)
    for name, reason in raised.items():
        console.print(f"error: {name}: {reason}", style="red", markup=False, soft_wrap=True)
    if raised:
        raise typer.Exit(1)


def publish(
    rows: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Rows to commit first.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Only say whether the documents agree.")] = False,
) -> None:
    """Make docs/paper.md and docs/choosing.md from the committed rows of preset cpu."""
    with one_clear_error():
        for document in DOCUMENTS:
            if not document.is_file():
                raise ValueError(f"publish works in a checkout; {document} does not exist")
        if rows is not None and rows.resolve() != COMMITTED.resolve():
            COMMITTED.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(rows, COMMITTED)
        results = Results(PRESETS["cpu"], Store(COMMITTED).rows())
        if check:
            different = [text for d in DOCUMENTS if (text := disagreement(d, results))]
            print("\n".join(different), end="")
            if different:
                raise typer.Exit(1)
            return
        written = {d.stem: publish_document(d, results) for d in DOCUMENTS}
    print_paths(written, Console())


def _preset(name: str, root: str, inception_weights: str | None) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name]
    return replace(
        preset,
        data={role: replace(spec, root=root) for role, spec in preset.data.items()},
        labels={role: replace(spec, root=root) for role, spec in preset.labels.items()},
        measures=replace(preset.measures, inception_weights=inception_weights),
    )


def _print_claims(results: Results, console: Console) -> None:
    from rich.table import Table

    found = claims_table(verdicts(results))
    table = Table(title="Claims", title_justify="left")
    for name in ("claim", "verdict", "effect", "95 %", "seeds"):
        table.add_column(name)
    for line in found.lines:
        table.add_row(line[0], line[3].strip("*"), line[4], line[5], line[7])
    console.print(table)
