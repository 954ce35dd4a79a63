"""What the documents show: blocks of Markdown from the store, between two markers each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import groups
from benchmarks.measure.store import ROOT, Row
from benchmarks.report import tables

MAIN = "benchmarks"  # the block of most documents
PICTURE = "docs/savings.svg"  # the README's
COMMAND = "make bench BENCH_ARGS=--save && python -m benchmarks publish"
GROUPS = ROOT / "docs" / "distributed.md"


def markdown(rows: Sequence[Row]) -> str:
    """All tables, as they belong between the markers."""
    if not rows:
        return "No measurement is stored yet."
    parts = [grid.markdown() for grid in tables.grids(rows)]
    note = "Bold: the fastest that gives SN, or SRN. "
    return "\n\n".join([*parts, note + tables.caption(rows), f"Made by `{COMMAND}`."])


def brief(rows: Sequence[Row]) -> str:
    """The README's block: one table, and where its figures were measured."""
    grid = tables.savings(rows)
    if not grid.lines:
        return "No measurement is stored yet."
    chosen = [r for r in rows if r.workload in tables.BRIEF_WORKLOADS]
    return "\n\n".join([grid.markdown(), tables.caption(chosen), f"Made by `{COMMAND}`."])


def blocks(
    rows: Sequence[Row], grown: Sequence[Row], pairs: Sequence[tuple[Row, Row]] = ()
) -> dict[str, str]:
    """What belongs between the markers of each document."""
    full = markdown(rows)
    if (twice := tables.repeatability(pairs)).lines:
        first, second = pairs[0]
        runs = f"Commit {first.commit}, {first.date} and {second.date}."
        full = "\n\n".join([full, twice.markdown(), runs])
    if grown:
        parts = [grid.markdown() for grid in tables.curves(grown)]
        made = "Made by `python -m benchmarks grow --save && python -m benchmarks publish`."
        full = "\n\n".join([full, *parts, tables.caption(grown), made])
    return {"README.md": brief(rows), "docs/benchmarks.md": full}


def markers(name: str) -> tuple[str, str]:
    """Of a block in a document."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def replaced(document: str, block: str, name: str = MAIN) -> str:
    """The document with the block between its markers; ValueError if they are not there once."""
    begin, end = markers(name)
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"the document must have {begin} and {end}, once each")
    head, rest = document.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{block}\n{end}{tail}"


def write(path: Path, block: str, name: str = MAIN) -> None:
    """Puts the block into the document."""
    path.write_text(replaced(path.read_text(), block, name))


def difference(path: Path, block: str, name: str = MAIN) -> str:
    """A unified diff from the document to what the store says; empty if they agree."""
    now = path.read_text()
    lines = difflib.unified_diff(
        now.splitlines(), replaced(now, block, name).splitlines(), str(path), "store", lineterm=""
    )
    return "\n".join(lines)


def groups_block(rows: Sequence[Row]) -> str:
    """The block of docs/distributed.md: one run."""
    lines = []
    for n in groups.GROUPS:
        time, over = (r for r in rows if r.provider == f"groups={n}")
        times = f"{over.p50:.2f} ({over.p20:.2f} to {over.p80:.2f})"
        lines.append([time.provider, tables.number(time.p50), times])
    header = ["", "ms", "times one group (20th to 80th percentile)"]
    grid = tables.Grid("A round of 11 layers, forward and backward", header, lines)
    made = "Made by `python -m benchmarks groups --save`."
    return "\n\n".join([grid.markdown(), tables.caption(rows), made])
