"""Tables from the store: for the terminal, and in Markdown between two markers of a document."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from tabulate import tabulate

from benchmarks.providers import MODES, PROVIDERS
from benchmarks.store import Row, newest
from benchmarks.workloads import CORE

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
COMMAND = "python -m benchmarks run --save && python -m benchmarks table --write README.md"
MODE_TITLES = {
    "forward": "Forward, training",
    "forward_backward": "Forward and backward",
    "evaluation": "Forward, evaluation",
    "step": "Training step of the discriminator",
}

Line = tuple[str, float | None]  # provider, rank ratio


@dataclass(frozen=True)
class Grid:
    """A titled table of text."""

    title: str
    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        body = tabulate(self.lines, self.header, tablefmt="github", disable_numparse=True)
        return f"**{self.title}**\n\n{body}"

    def rich(self) -> Table:
        table = Table(title=self.title)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for line in self.lines:
            table.add_row(*line)
        return table


def provider_title(line: Line) -> str:
    name, ratio = line
    title = PROVIDERS[name].title if name in PROVIDERS else f"{name}, not normalised"
    if ratio is None:
        return title
    if name in PROVIDERS and PROVIDERS[name].stable_rank:
        title += ", SN" if ratio == 1 else f", SRN {ratio:g}"
    return title


def number(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:#.3g}"


def _ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    return sorted(set(names), key=lambda n: (order.index(n) if n in order else len(order), n))


def _lines(rows: Iterable[Row]) -> list[Line]:
    order = ["plain", *PROVIDERS]
    # Plain spectral normalisation first, then by rank ratio from weak to strong.
    return sorted(
        {(r.provider, r.rank_ratio) for r in rows},
        key=lambda line: (
            -(2.0 if line[1] is None else line[1]),
            order.index(line[0]) if line[0] in order else len(order),
            line[0],
        ),
    )


def _grid(title: str, rows: Sequence[Row], cell: Callable[[dict[str, Row]], str | None]) -> Grid:
    """Providers down, workloads across; ``cell`` gets the metrics of one place."""
    columns = _ordered((r.workload for r in rows), CORE)
    places: dict[tuple[Line, str], dict[str, Row]] = {}
    for r in rows:
        places.setdefault(((r.provider, r.rank_ratio), r.workload), {})[r.metric] = r
    lines = []
    for line in _lines(rows):
        cells = [cell(places.get((line, column), {})) for column in columns]
        if any(cells):
            lines.append([provider_title(line), *(c or "" for c in cells)])
    return Grid(title, ["", *columns], lines)


def _fastest(rows: Iterable[Row]) -> set[Row]:
    """The fastest that normalises, a workload and kind (SN or a rank ratio)."""
    best: dict[tuple[str, float], Row] = {}
    for row in rows:
        if row.metric == "time_ms" and row.rank_ratio is not None:
            place = row.workload, row.rank_ratio
            if place not in best or row.p50 < best[place].p50:
                best[place] = row
    return set(best.values())


def grids(rows: Sequence[Row]) -> list[Grid]:
    """All tables that the rows have something for."""
    made = []
    for mode in MODES:
        chosen = [r for r in rows if r.mode == mode]
        fastest = _fastest(chosen)

        def time(metrics: dict[str, Row], fastest: set[Row] = fastest) -> str | None:
            if "time_ms" not in metrics:
                return None
            row = metrics["time_ms"]
            text = number(row.p50)
            if "time_over_copy_x" in metrics:
                text += f" ({number(metrics['time_over_copy_x'].p50)}x)"
            return f"**{text}**" if row in fastest else text

        made.append(_grid(f"{MODE_TITLES[mode]}: ms (multiples of the copy)", chosen, time))

    def metric(name: str) -> Callable[[dict[str, Row]], str | None]:
        return lambda metrics: f"{number(metrics[name].p50)}" if name in metrics else None

    both = [r for r in rows if r.mode == "forward_backward"]
    for base in ("torch_sn", "layerwise", "reference"):
        title = f"Forward and backward: times faster than {PROVIDERS[base].title}"
        made.append(_grid(title, both, metric(f"speedup_over_{base}_x")))
    made.append(
        _grid(
            "Forward and backward: peak memory in MiB beyond weights and their incoming gradients",
            both,
            metric("peak_memory_mib"),
        )
    )

    def step(metrics: dict[str, Row]) -> str | None:
        if "time_ms" not in metrics:
            return None
        text = number(metrics["time_ms"].p50)
        if "share_of_step_percent" in metrics:
            share = metrics["share_of_step_percent"]
            text += f" ({share.p50:.1f} %, {share.p20:.1f} to {share.p80:.1f})"
        return text

    steps = [r for r in rows if r.mode == "step"]
    title = f"{MODE_TITLES['step']}: ms (share of normalisation, 20th to 80th percentile)"
    made.append(_grid(title, steps, step))
    return [grid for grid in made if grid.lines]


def caption(rows: Sequence[Row]) -> str:
    """Where and when the rows were measured; one line for each distinct place."""
    places: dict[tuple, list[Row]] = {}
    for row in rows:
        commit = row.commit + (" with local changes" if row.dirty else "")
        place = (*row.machine, row.torch, row.python, commit, row.date[:10])
        places.setdefault(place, []).append(row)
    lines = []
    for (cpu, cores, threads, isa, torch, python, commit, date), group in places.items():
        times = [r.repeats for r in group if r.metric == "time_ms"]
        lines.append(
            f"{cpu}, {cores} cores, {threads} threads, {isa}; torch {torch}, Python {python}; "
            f"commit {commit}, {date}; medians of {min(times)} to {max(times)} paired repeats."
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The block that belongs between the markers."""
    if not rows:
        return "No measurement is stored yet."
    parts = [grid.markdown() for grid in grids(rows)]
    note = "Bold: the fastest of its kind. "
    return "\n\n".join([*parts, note + caption(rows), f"Made by `{COMMAND}`."])


def replaced(document: str, block: str) -> str:
    """The document with the block between its markers; ValueError if they are not there once."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"the document must have {BEGIN} and {END}, once each")
    head, rest = document.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def difference(path: Path, block: str) -> str:
    """A unified diff from the document to what the store says; empty if they agree."""
    now = path.read_text()
    lines = difflib.unified_diff(
        now.splitlines(), replaced(now, block).splitlines(), str(path), "store", lineterm=""
    )
    return "\n".join(lines)


def _of_commit(rows: Sequence[Row], commit: str) -> dict[tuple, Row]:
    """The newest rows of a commit; ValueError if there are none, or of two commits."""
    found = [r for r in rows if r.commit.startswith(commit)]
    commits = {r.commit for r in found}
    if len(commits) != 1:
        what = f"is ambiguous: {sorted(commits)}" if commits else "has no row in the store"
        raise ValueError(f"commit {commit!r} {what}")
    return {(r.machine, r.subject): r for r in newest(found)}


def comparison(rows: Sequence[Row], before: str, after: str) -> Grid:
    """The times that both commits have on one machine."""
    old, new = _of_commit(rows, before), _of_commit(rows, after)
    lines = []
    for key in sorted(old.keys() & new.keys(), key=str):
        a, b = old[key], new[key]
        if a.metric != "time_ms":
            continue
        verdict = "faster" if b.p80 < a.p20 else "slower" if b.p20 > a.p80 else "same"
        name = provider_title((a.provider, a.rank_ratio))
        ratio = f"{b.p50 / a.p50:.2f}"
        place = f"{a.workload}, {MODE_TITLES[a.mode].lower()}, {a.threads} threads"
        lines.append([place, name, number(a.p50), number(b.p50), ratio, verdict])
    if not lines:
        raise ValueError(f"commits {before!r} and {after!r} have no measurement in common")
    header = ["", "provider", f"{before} ms", f"{after} ms", "ratio", "spreads"]
    return Grid(f"{before} to {after}", header, lines)
