"""Tables from the store, for the terminal and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from tabulate import tabulate

from benchmarks.cases import workloads
from benchmarks.cases.providers import KERNELS, MODES, PROVIDERS
from benchmarks.cases.workloads import CORE
from benchmarks.measure.busy import CASES
from benchmarks.measure.busy import WORKLOADS as BUSY_WORKLOADS
from benchmarks.measure.growth import CURVES, matches
from benchmarks.measure.growth import PROVIDERS as GROWING
from benchmarks.measure.store import Row, newest

MODE_TITLES = {
    "forward": "Forward, training",
    "backward": "Backward",
    "forward_backward": "Forward and backward",
    "evaluation": "Forward, evaluation",
    "step": "Training step",
}

# What a reader of the README compares, and what people call it.
BRIEF_WORKLOADS = {
    "sngan_cifar_resnet_D": "SN-GAN discriminator, CIFAR-10",
    "real_esrgan_unet_D": "Real-ESRGAN discriminator",
    "emulator_175": "Weather emulator",
    "biggan_128_D_ch96": "BigGAN-128 discriminator",
}
BRIEF_PROVIDERS = (
    "copy",
    "torch_sn",
    "torch_sn_legacy",
    "torch_sn_compiled",
    "foreach",
    "layerwise",
    "module",
)

PEERS = ("torch_sn", "torch_sn_legacy", "torch_sn_compiled", "foreach", "layerwise")

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
    return f"{x:,.0f}" if abs(x) >= 99.95 else f"{x:#.3g}"


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
        usable = row.rank_ratio is not None and row.provider != KERNELS
        if row.metric == "time_ms" and usable:
            place = row.workload, row.rank_ratio
            if place not in best or row.p50 < best[place].p50:
                best[place] = row
    return set(best.values())


Cell = Callable[[dict[str, Row]], str | None]


def _value(name: str) -> Cell:
    return lambda metrics: number(metrics[name].p50) if name in metrics else None


def _time_grid(mode: str, rows: Sequence[Row]) -> Grid:
    chosen = [r for r in rows if r.mode == mode]
    fastest = _fastest(chosen)

    def time(metrics: dict[str, Row]) -> str | None:
        if "time_ms" not in metrics:
            return None
        row = metrics["time_ms"]
        text = number(row.p50)
        if "time_over_copy_x" in metrics:
            text += f" ({number(metrics['time_over_copy_x'].p50)}x)"
        return f"**{text}**" if row in fastest else text

    return _grid(f"{MODE_TITLES[mode]}: ms (multiples of the copy)", chosen, time)


def _between(row: Row, digits: Callable[[float], str] = number) -> str:
    """A median with its 95 % interval."""
    return f"{digits(row.p50)} ({digits(row.low)} to {digits(row.high)})"


def _difference(row: Row, summed: Row) -> str:
    if row.low <= 0 <= row.high:
        return f"not decided ({number(row.low)} to {number(row.high)})"
    agree = row.low <= summed.high and summed.low <= row.high
    return _between(row) + ("" if agree else " *")


def step(rows: Sequence[Row]) -> Grid:
    """A line a model and normalisation: the time summed within the step, and the difference."""
    lines = []
    for name in _ordered((r.workload for r in rows if r.metric == "spent_ms"), CORE):
        here = [r for r in rows if r.workload == name and r.mode == "step"]
        plain = find(here, name, provider="plain", metric="time_ms")
        for line in _lines(r for r in here if r.metric == "spent_ms"):
            fields = dict(zip(("provider", "rank_ratio"), line, strict=True))
            spent, share, difference = (
                find(here, name, **fields, metric=m)
                for m in ("spent_ms", "spent_percent", "difference_ms")
            )
            found = (spent, share, difference, plain)
            if None in found:
                continue
            cells = [number(plain.p50), _between(spent), _between(share)]
            model = BRIEF_WORKLOADS.get(name, name)
            lines.append([model, provider_title(line), *cells, _difference(difference, spent)])
    header = [
        "model",
        "",
        "plain step, ms",
        "normalising, ms",
        "% of the step",
        "by difference, ms",
    ]
    title = f"{MODE_TITLES['step']}: what normalising takes (95 % interval of the median)"
    return Grid(title, header, lines)


def without_clocks(rows: Sequence[Row]) -> list[Row]:
    """Rows of steps that :func:`step` cannot show."""
    shown = {r.workload for r in rows if r.metric == "spent_ms"}
    return [r for r in rows if r.mode == "step" and r.workload not in shown]


def busy(rows: Sequence[Row]) -> Grid:
    """Mean times beside other processes, torch's and ours; a line a model and provider."""
    lines = []
    for name in _ordered((r.workload for r in rows), BUSY_WORKLOADS):
        for provider in ("torch_sn", "module"):
            place = {"provider": provider, "rank_ratio": 1.0, "metric": "mean_ms"}
            found = [find(rows, name, **place, busy=case) for case in CASES]
            if any(found):
                model = BRIEF_WORKLOADS.get(name, name)
                title = provider_title((provider, 1.0))
                lines.append([model, title, *(number(r.p50) if r else "" for r in found)])
    return Grid(
        "Forward and backward of all weights beside other processes: mean ms",
        ["model", "", *CASES.values()],
        lines,
    )


def where_peers_win(rows: Sequence[Row]) -> tuple[Grid, int, int]:
    """Where the quickest peer takes less time than this library as people use it; of how many
    places that has both."""
    lines, places = [], 0
    subjects = {(r.workload, r.mode, r.rank_ratio) for r in rows if r.rank_ratio is not None}
    for name, mode, ratio in sorted(subjects):
        place = {"mode": mode, "rank_ratio": ratio, "metric": "time_ms"}
        ours = find(rows, name, **place, provider="module")
        peers = [find(rows, name, **place, provider=p) for p in PEERS]
        peers = [r for r in peers if r is not None]
        if mode not in MODES or ours is None or not peers:
            continue
        places += 1
        best = min(peers, key=lambda r: r.p50)
        if best.p50 < ours.p50:
            where = f"{name}, {MODE_TITLES[mode].lower()}"
            title, over = provider_title((best.provider, ratio)), ours.p50 / best.p50
            lines.append((over, [where, title, number(best.p50), number(ours.p50), f"{over:.2f}"]))
    lines.sort(key=lambda line: -line[0])
    header = ["", "peer", "ms", "here, ms", "times the peer"]
    return Grid("Where a peer is quicker", header, [x for _, x in lines]), len(lines), places


# Title after "Forward and backward: ", and metric.
_METRICS = {
    "ms that normalising adds to a model that is called without it": "added_ms",
    "multiples of the kernels alone": "time_over_kernels_x",
    "times faster than torch spectral norm": "speedup_over_torch_sn_x",
    "times faster than SRN layer by layer": "speedup_over_layerwise_x",
    "times faster than srn_kernels reference": "speedup_over_reference_x",
    "ms when every matrix is 4 x 4, the cost of the calls themselves": "host_ms",
    "operators": "operators",
    "bytes that the operators read and write, over the floor": "bytes_over_floor_x",
    "peak memory in MiB beyond weights and their incoming gradients": "peak_memory_mib",
}


# Title, and metric, of what two runs are compared by.
_REPEATED = {
    "times": "time_ms",
    "multiples of the copy": "time_over_copy_x",
    "multiples of the kernels alone": "time_over_kernels_x",
    "times faster than torch spectral norm": "speedup_over_torch_sn_x",
    "times faster than SRN layer by layer": "speedup_over_layerwise_x",
}


def _host_grid(rows: Sequence[Row]) -> Grid:
    """The cost of calls as a straight line over the number of layers, by least squares."""
    points: dict[Line, list[tuple[int, float]]] = {}
    for r in rows:
        if r.metric == "host_ms":
            layers = len(workloads.find(r.workload).shapes)
            points.setdefault((r.provider, r.rank_ratio), []).append((layers, 1e3 * r.p50))
    lines = []
    for line in _lines(r for r in rows if r.metric == "host_ms"):
        layers, times = zip(*points[line], strict=True)
        if len(set(layers)) > 1:
            slope, fixed = statistics.linear_regression(layers, times)
            lines.append([provider_title(line), number(fixed), number(slope)])
    title = "Forward and backward: microseconds that the calls cost (fitted to the table above)"
    return Grid(title, ["", "a round", "and a layer"], lines)


def grids(rows: Sequence[Row]) -> list[Grid]:
    """All tables that the rows have something for."""
    both = [r for r in rows if r.mode == "forward_backward"]
    made = [_time_grid(mode, rows) for mode in MODES]
    for title, metric in _METRICS.items():
        chosen = [r for r in both if r.metric == metric]
        made.append(_grid(f"Forward and backward: {title}", chosen, _value(metric)))
        if metric == "host_ms":
            made.append(_host_grid(chosen))
    made.append(step(rows))
    return [grid for grid in made if grid.lines]


def find(rows: Iterable[Row], workload: str, **fields: object) -> Row | None:
    """The row of a workload whose fields have these values; None without one."""
    chosen = (r for r in rows if r.workload == workload)
    return next((r for r in chosen if all(getattr(r, k) == v for k, v in fields.items())), None)


def brief(rows: Sequence[Row]) -> Grid:
    """The times of :func:`grids` that people ask for first: at most eight lines."""
    chosen = [r for r in rows if r.provider in BRIEF_PROVIDERS and r.rank_ratio in (None, 1.0, 0.7)]
    return _time_grid("forward_backward", chosen)


def savings(rows: Sequence[Row], busy_rows: Sequence[Row] = ()) -> Grid:
    """What a reader of the README wants to know: a line a model, a blank where nothing is known."""

    def times(row: Row | None) -> str:
        return f"{row.p50:.1f}" if row else ""

    def share(row: Row | None) -> str:
        return f"{row.p50:.1f} %" if row else ""

    lines = []
    for name, title in BRIEF_WORKLOADS.items():
        weights = workloads.find(name)
        size = f"{len(weights.shapes)} layers, {weights.parameters * 4 / 1e6:.0f} MB"
        ours = {"provider": "module", "mode": "forward_backward", "rank_ratio": 1.0}
        step = {"rank_ratio": 1.0, "mode": "step", "metric": "spent_percent"}
        over = "speedup_of_means_over_torch_sn_x"
        cells = [
            times(find(rows, name, **ours, metric="speedup_over_torch_sn_x")),
            times(find(busy_rows, name, **ours, busy="1", metric=over)),
            share(find(rows, name, **step, provider="torch_sn")),
            share(find(rows, name, **step, provider="module")),
        ]
        if any(cells):
            lines.append([title, size, *cells])
    header = [
        "model",
        "weights",
        "times faster than torch's SN",
        "beside a busy process a core",
        "torch's SN takes of a training step",
        "SN here takes",
    ]
    return Grid("What it saves", header, lines)


def curves(rows: Sequence[Row]) -> list[Grid]:
    """One table a curve of growth.py."""
    made = []
    for title, points in CURVES.items():
        shown = {
            x: {
                r.provider: r
                for r in rows
                if matches(point, r) and r.mode == "forward_backward" and r.metric == "time_ms"
            }
            for x, point in points.items()
        }
        shown = {x: found for x, found in shown.items() if found}
        lines = [
            [provider_title((name, 1.0 if PROVIDERS[name].spectral else None))]
            + [number(found[name].p50) if name in found else "" for found in shown.values()]
            for name in GROWING
        ]
        if shown:
            made.append(Grid(f"ms against {title}", ["", *map(str, shown)], lines))
    return made


def caption(rows: Sequence[Row]) -> str:
    """Where and when the rows were measured; one line for each distinct place."""
    places: dict[tuple, list[Row]] = {}
    for row in rows:
        commit = row.commit + (" with local changes" if row.dirty else "")
        place = (*row.machine, row.torch, row.python, commit, row.date[:10])
        places.setdefault(place, []).append(row)
    lines = []
    for (cpu, cores, threads, isa, torch, python, commit, date), group in places.items():
        times = [r.repeats for r in group if r.metric == "time_ms"] or [0]
        lines.append(
            f"{cpu}, {cores} cores, {threads} threads, {isa}; torch {torch}, Python {python}; "
            f"commit {commit}, {date}; medians of {min(times)} to {max(times)} paired repeats."
        )
    return "\n".join(lines)


def repeatability(pairs: Sequence[tuple[Row, Row]]) -> Grid:
    """How far the same numbers were apart in two runs of one commit."""
    lines = []
    for title, metric in _REPEATED.items():
        chosen = [(a, b) for a, b in pairs if a.metric == metric and a.p50 > 0 < b.p50]
        if len(chosen) < 2:
            continue
        meet = sum(a.p20 <= b.p80 and b.p20 <= a.p80 for a, b in chosen) / len(chosen)
        apart = [100 * abs(b.p50 / a.p50 - 1) for a, b in chosen]
        tenths = statistics.quantiles(apart, n=10, method="inclusive")
        percent = [f"{100 * meet:.0f} %", *(f"{x:.1f} %" for x in (tenths[4], tenths[8]))]
        lines.append([title, str(len(chosen)), *percent])
    header = ["", "numbers", "spreads overlap", "medians differ by", "nine in ten by at most"]
    return Grid("The same commit run twice", header, lines)


def _of_run(rows: Sequence[Row], name: str) -> dict[tuple, Row]:
    """The newest rows of a commit or of a date; ValueError if there are none, or two commits."""
    found = [r for r in rows if r.commit.startswith(name) or r.date.startswith(name)]
    commits = {r.commit for r in found}
    if len(commits) != 1:
        what = f"is ambiguous: {sorted(commits)}" if commits else "has no row in the store"
        raise ValueError(f"run {name!r} {what}")
    return {(r.machine, r.subject): r for r in newest(found)}


def comparison(rows: Sequence[Row], before: str, after: str) -> Grid:
    """The times that two runs, named by commit or date, have on one machine."""
    old, new = _of_run(rows, before), _of_run(rows, after)
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
        raise ValueError(f"{before!r} and {after!r} have no measurement in common")
    header = ["", "provider", f"{before} ms", f"{after} ms", "ratio", "spreads"]
    return Grid(f"{before} to {after}", header, lines)
