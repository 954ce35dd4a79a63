"""What the documents show: blocks of Markdown from the store, between two markers each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import groups
from benchmarks.measure.store import ROOT, Row
from benchmarks.report import tables

MAIN = "benchmarks"  # the block of most documents
NOTHING = "No measurement is stored yet."
PICTURE = "docs/savings.svg"  # the README's
COMMAND = "make bench BENCH_ARGS=--save && python -m benchmarks publish"
BUSY_COMMAND = "python -m benchmarks busy --save && python -m benchmarks publish"
GROUPS = ROOT / "docs" / "distributed.md"


def markdown(rows: Sequence[Row]) -> str:
    """All tables of rounds and steps, as ``python -m benchmarks table`` shows them."""
    if not rows:
        return NOTHING
    parts = [grid.markdown() for grid in tables.grids(rows)]
    note = "Bold: the fastest that gives SN, or SRN. "
    return "\n\n".join([*parts, note + tables.caption(rows), f"Made by `{COMMAND}`."])


def _readme(rows: Sequence[Row], busy: Sequence[Row]) -> str:
    grid = tables.savings(rows, busy)
    if not grid.lines:
        return NOTHING
    chosen = [
        r
        for r in (*rows, *busy)
        if r.workload in tables.BRIEF_WORKLOADS
        and r.mode in ("forward_backward", "step")
        and r not in tables.without_clocks(rows)
    ]
    return "\n\n".join([grid.markdown(), tables.caption(chosen), f"Made by `{COMMAND}`."])


def _saves(rows: Sequence[Row], busy: Sequence[Row]) -> str:
    if not rows:
        return NOTHING
    parts, steps = [], [r for r in rows if r.mode == "step"]
    for grid, source, made in (
        (tables.step(rows), [r for r in steps if r not in tables.without_clocks(rows)], COMMAND),
        (tables.busy(busy), busy, BUSY_COMMAND),
        (tables.brief(rows), [r for r in rows if r.mode == "forward_backward"], COMMAND),
    ):
        if grid.lines:
            parts += [grid.markdown(), tables.caption(source), f"Made by `{made}`."]
    return "\n\n".join(parts)


def _peers(rows: Sequence[Row]) -> str:
    grid, wins, places = tables.where_peers_win(rows)
    if not places:
        return NOTHING
    said = f"In {wins} of {places} places (workload, mode, SN or a rank ratio) a peer is quicker"
    if not wins:
        return said + "."
    shown = replace(grid, lines=grid.lines[:8])
    more = f"; the {len(shown.lines)} widest are shown" if wins > len(shown.lines) else ""
    return "\n\n".join([said + more + ".", shown.markdown(), f"Made by `{COMMAND}`."])


def _curves(grown: Sequence[Row]) -> str:
    if not grown:
        return NOTHING
    made = "Made by `python -m benchmarks grow --save && python -m benchmarks publish`."
    return "\n\n".join([tables.caption(grown), made])


def _repeatability(pairs: Sequence[tuple[Row, Row]]) -> str:
    grid = tables.repeatability(pairs)
    if not grid.lines:
        return NOTHING
    first, second = pairs[0]
    runs = f"Commit {first.commit}, {first.date} and {second.date}."
    return "\n\n".join([grid.markdown(), runs])


def blocks(
    rows: Sequence[Row],
    grown: Sequence[Row],
    pairs: Sequence[tuple[Row, Row]] = (),
    busy: Sequence[Row] = (),
) -> dict[tuple[str, str], str]:
    """What belongs into each document between the markers of each name."""
    page = "docs/benchmarks.md"
    return {
        ("README.md", MAIN): _readme(rows, busy),
        (page, "saves"): _saves(rows, busy),
        (page, "peers"): _peers(rows),
        (page, "curves"): _curves(grown),
        (page, "repeatability"): _repeatability(pairs),
    }


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
