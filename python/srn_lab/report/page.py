"""index.html and metrics.json of a round: one self-contained page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from srn_lab.experiments.claims import verdicts
from srn_lab.experiments.results import Results
from srn_lab.experiments.store import Row
from srn_lab.experiments.verdicts import Verdict
from srn_lab.files import write_atomically, write_json
from srn_lab.report.figures import pictures
from srn_lab.report.tables import Table, claims_table, experiment_table, missing_table


def write_page(out: Path, results: Results, failures: Mapping[str, str]) -> dict[str, Path]:
    """Write both files into ``out``; ``failures`` are the units that raised, by slot."""
    found = verdicts(results)
    return {
        "page": write_atomically(out / "index.html", render(out, results, found, failures)),
        "metrics": write_json(out / "metrics.json", metrics(results, found, failures)),
    }


def metrics(results: Results, found: list[Verdict], failures: Mapping[str, str]) -> dict:
    """The document of metrics.json."""
    return {
        "preset": results.preset.name,
        "claims": [verdict.to_dict() for verdict in found],
        "rows": [asdict(row) for row in results.rows],
        "failures": dict(failures),
    }


def render(out: Path, results: Results, found: list[Verdict], failures: Mapping[str, str]) -> str:
    """The page. Sample grids are taken from ``out``/work, where their runs left them."""
    environment = Environment(
        loader=PackageLoader("srn_lab.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = []
    for experiment in results.experiments:
        rows = [
            row
            for slot in results.of_experiment[experiment.name]
            for row in results.slots.get(slot, {}).values()
        ]
        sections.append(
            {
                "experiment": experiment,
                "table": experiment_table(experiment, results),
                "pictures": [(p.caption, _embedded(p.png)) for p in pictures(experiment, results)],
                "samples": _samples(out, rows) if experiment.name in _SHOWN else [],
                "configurations": _configurations(rows),
                "missing": results.missing(experiment.name),
            }
        )
    template = environment.get_template("page.html.jinja")
    return template.render(
        preset=results.preset,
        verdicts=[v.to_dict() for v in found],
        counts=_counts(found),
        claims=_plain(claims_table(found)),
        sections=sections,
        incomplete=missing_table(results),
        environments=environments(results.rows),
        failures=failures,
        rows=len(results.rows),
    )


_SHOWN = ("fig2a", "fig2b", "table2", "table3", "conversion")


def _counts(found: list[Verdict]) -> dict[str, int]:
    return {
        name: sum(v.verdict == name for v in found)
        for name in ("supported", "not supported", "undecided")
    }


def _plain(table: Table) -> Table:
    lines = [[cell.strip("*") for cell in line] for line in table.lines]
    return Table(table.title, table.header, lines, table.note)


def _embedded(png: bytes) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(png).decode())


def _samples(out: Path, rows: list[Row]) -> list[tuple[str, Markup]]:
    found = []
    for row in rows:
        path = out / "work" / row.key / "samples.png"
        if row.seed == 0 and path.is_file():
            found.append((row.slot.split("/", 1)[1], _embedded(path.read_bytes())))
    return found


def _configurations(rows: list[Row]) -> list[tuple[str, str]]:
    """One configuration a slot, that of its first seed."""
    shown = {}
    for row in sorted(rows, key=lambda row: row.seed):
        shown.setdefault(row.slot, json.dumps(row.unit, indent=1))
    return list(shown.items())


def environments(rows: list[Row]) -> list[str]:
    """What the rows were made with, each once: versions, commit, hardware, the number of rows."""
    counted: dict[str, int] = {}
    for row in rows:
        e = row.environment
        packages = ", ".join(f"{name} {v}" for name, v in e["packages"].items() if v)
        commit = (e["commit"] or "unknown")[:10] + (" with changes" if e["dirty"] else "")
        text = f"{e['gpu'] or e['cpu']}, Python {e['python']}, {packages}; commit {commit}"
        counted[text] = counted.get(text, 0) + 1
    return [f"{count} rows: {text}" for text, count in counted.items()]
