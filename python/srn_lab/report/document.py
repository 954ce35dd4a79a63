"""The documents that the committed rows make, between two markers; a test compares them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from srn_lab.experiments.catalogue import EXPERIMENTS
from srn_lab.experiments.claims import verdicts
from srn_lab.experiments.results import Results
from srn_lab.files import write_atomically
from srn_lab.report.page import environments
from srn_lab.report.tables import claims_table, experiment_table, missing_table, name_of

BEGIN, END = "<!-- paper:begin -->", "<!-- paper:end -->"
COMMAND = "python -m srn_lab publish"


def section(results: Results) -> str:
    """The part that the rows make."""
    found = verdicts(results)
    counts = {
        name: sum(v.verdict == name for v in found)
        for name in ("supported", "not supported", "undecided")
    }
    judged = ", ".join(f"{count} {name}" for name, count in counts.items())
    parts = [f"{len(results.rows)} rows of preset `{results.preset.name}`; {judged}."]
    parts.append(claims_table(found).markdown())
    incomplete = missing_table(results)
    if incomplete is not None:
        parts.append(incomplete.markdown())
    for experiment in results.experiments:
        table = experiment_table(experiment, results)
        if table is not None:
            parts.append(table.markdown())
    parts.append("**Made with**")
    parts.append("\n".join(f"- {text}" for text in environments(results.rows)))
    parts.append(f"Made by `{COMMAND}`.")
    return "\n\n".join(parts)


def choice(results: Results) -> str:
    """The rows from which docs/choosing.md advises: what c did to one GAN."""
    experiment = EXPERIMENTS["fig2a"]
    table = experiment_table(experiment, results)
    parts = [] if table is None else [table.markdown()]
    lacking = results.missing(experiment.name)
    if lacking:
        counts = ", ".join(f"{name_of(s)} {have} of {want}" for s, (have, want) in lacking.items())
        parts.append(f"Not all rows are there: {counts}.")
    return "\n\n".join([*parts, f"Made by `{COMMAND}`."])


_SECTIONS: dict[str, Callable[[Results], str]] = {"paper.md": section, "choosing.md": choice}


def written(document: Path, results: Results) -> str:
    """The document with its section made anew. ValueError where the markers are missing."""
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{_SECTIONS[document.name](results)}\n{END}{after}"


def publish(document: Path, results: Results) -> Path:
    """Write the section into ``document``."""
    return write_atomically(document, written(document, results))


def disagreement(document: Path, results: Results) -> str:
    """The difference between ``document`` and what the rows make of it; empty where none is."""
    lines = difflib.unified_diff(
        document.read_text().splitlines(),
        written(document, results).splitlines(),
        str(document),
        "rows",
        lineterm="",
    )
    return "\n".join(lines)
