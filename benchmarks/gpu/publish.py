"""Rows of gpu-check into the store, and docs/gpu.md from it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.gpu.measure import WORKLOADS
from benchmarks.gpu.rows import Row
from benchmarks.measure import store
from benchmarks.measure.suite import label
from benchmarks.report import documents
from benchmarks.report.tables import Grid, number

RESULTS = "gpu.jsonl"
DOCUMENT = store.ROOT / "docs" / "gpu.md"
BLOCK = "gpu"
COMMAND = "make gpu-check OUT=out && python -m benchmarks gpu publish out/results.jsonl"

Metrics = dict[str, Row]
Cell = Callable[[Metrics], str]


def from_file(path: Path) -> list[Row]:
    """The measurements among the lines of a results file or of the store."""
    names = [f.name for f in fields(Row)]
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.strip()]
    return [Row(**{k: r[k] for k in names}) for r in found if r["kind"] == "gpu"]


def last(rows: Iterable[Row]) -> list[Row]:
    """The rows of the device that was measured last; a column of a table is always one run."""
    rows = list(rows)
    if not rows:
        return []
    device = max(rows, key=lambda r: r.date).device
    rows = [r for r in rows if r.device == device]

    def column(r: Row) -> tuple[str, ...]:
        alone = r.provider if r.workload == "mixed" else ""  # a run a backend
        return r.workload, r.mode, r.metric, alone

    newest: dict[tuple[str, ...], str] = {}
    for r in rows:
        newest[column(r)] = max(newest.get(column(r), ""), r.date)
    return [r for r in rows if r.date == newest[column(r)]]


def with_ratio(metric: str, ratio: str) -> Cell:
    """A time, and a ratio to what ran beside it."""

    def cell(metrics: Metrics) -> str:
        if metric not in metrics:
            return ""
        text = number(metrics[metric].p50)
        return f"{text} ({number(metrics[ratio].p50)}x)" if ratio in metrics else text

    return cell


def value(metric: str) -> Cell:
    return lambda metrics: number(metrics[metric].p50) if metric in metrics else ""


def share(metrics: Metrics) -> str:
    if "share_of_step_percent" not in metrics:
        return value("step_ms")(metrics)
    r = metrics["share_of_step_percent"]
    return f"{number(metrics['step_ms'].p50)} ({r.p50:.1f} %, {r.p20:.1f} to {r.p80:.1f})"


def grid(title: str, rows: Sequence[Row], mode: str, cell: Cell) -> Grid:
    """Providers down, workloads across."""
    places: dict[tuple[str, str], Metrics] = {}
    for r in rows:
        if r.mode == mode:
            place = label((r.provider, r.rank_ratio)), r.workload
            places.setdefault(place, {})[r.metric] = r
    order = {name: i for i, name in enumerate(WORKLOADS)}
    columns = sorted({w for _, w in places}, key=lambda w: (order.get(w, len(order)), w))
    lines = []
    for name in dict.fromkeys(n for n, _ in places):
        cells = [cell(places.get((name, w), {})) for w in columns]
        if any(cells):
            lines.append([name, *cells])
    return Grid(title, ["", *columns], lines)


def table(rows: Sequence[Row]) -> str:
    """The block of the document."""
    counters = [m for m in dict.fromkeys(r.metric for r in rows) if m.startswith("ncu_")]
    on_device = with_ratio("device_ms", "device_over_copy_x")
    whole = with_ratio("step_ms", "step_speedup_over_torch_sn_x")
    made = []
    for mode in ("forward", "backward", "evaluation"):
        title = f"{mode.capitalize()}: ms of the device (multiples of the copy)"
        made.append(grid(title, rows, mode, on_device))
        title = f"{mode.capitalize()}: ms from an idle device to the end (times faster than torch)"
        made.append(grid(title, rows, mode, whole))
        made.append(grid(f"{mode.capitalize()}: kernels launched", rows, mode, value("launches")))
    for mode in ("step", "graphed step"):
        title = f"Training {mode}, bfloat16 autocast: ms (share of normalisation)"
        made.append(grid(title, rows, mode, share))
    title = "Training step: peak memory in MiB"
    made.append(grid(title, rows, "step", value("peak_memory_mib")))
    for mode in ("forward", "backward"):
        made += [grid(f"{mode.capitalize()}: {m}", rows, mode, value(m)) for m in counters]
    for mode in ("again", "beside other work", "two streams", "graph replay"):
        title = f"Rounds whose bits differ, {mode}"
        made.append(grid(title, rows, mode, value("rounds_that_differ")))
    return "\n\n".join([*(g.markdown() for g in made if g.lines), caption(rows)])


def caption(rows: Sequence[Row]) -> str:
    places = dict.fromkeys(
        f"{r.device}, {r.processors} SMs, {r.l2_mb:.0f} MB of L2, driver {r.driver}; torch "
        f"{r.torch}, Triton {r.triton}, Python {r.python}; commit {r.commit}"
        f"{' with local changes' if r.dirty else ''}, {r.date[:10]}."
        for r in rows
    )
    return "\n".join([*places, f"Medians of paired repeats. Made by `{COMMAND}`."])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="*", type=Path, help="results.jsonl of gpu-check")
    parser.add_argument("--store", type=Path, default=store.RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)


def run(chosen: argparse.Namespace) -> int:
    path = chosen.store / RESULTS
    kept = from_file(path)
    known = set(kept)
    fresh = [r for file in chosen.results for r in from_file(file) if r not in known]
    if on_cpu := {r.workload for r in fresh if r.processors == 0}:
        raise SystemExit(f"rows of a rehearsal are no measurements: {sorted(on_cpu)}")
    if fresh:
        with path.open("a") as file:
            file.writelines(json.dumps(asdict(r)) + "\n" for r in fresh)
    rows = last(kept + fresh)
    if not rows:
        print("no row of a GPU is stored: the document stays as it is")
        return 0
    documents.write(chosen.document, table(rows), BLOCK)
    print(f"{len(fresh)} rows kept in {path}; {chosen.document} shows {len(rows)}")
    return 0
