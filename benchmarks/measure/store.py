"""The result store: one row a measurement, as JSON lines, written by programs only."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import srn_kernels
from benchmarks.cases.workloads import CORE
from benchmarks.measure.timing import Interval, Spread
from srn_kernels.backends import cpu

if TYPE_CHECKING:
    from typing_extensions import Self

HOME = Path(__file__).parents[1]
ROOT = HOME.parent
RESULTS = HOME / "results"
ROUNDS, CURVES = "cpu.jsonl", "cpu_growth.jsonl"  # rounds and steps; growth.py's curves
BUSY = "cpu_busy.jsonl"  # beside other processes
# What a measurement depends on; results and documents do not count.
SOURCES = ("srn_kernels", "csrc", "setup.py", "benchmarks", ":!benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric of one provider, on any machine; the metric's name ends with its unit."""

    commit: str
    dirty: bool
    date: str
    srn_kernels: str
    torch: str
    python: str
    workload: str = ""
    provider: str = ""
    rank_ratio: float | None = None
    mode: str = ""
    metric: str = ""
    p20: float = 0.0
    p50: float = 0.0
    p80: float = 0.0
    repeats: int = 0
    bytes: int = 0
    low: float | None = None  # 95 % interval of the median, where one was asked for
    high: float | None = None

    def with_result(self, metric: str, result: Spread, scale: float = 1.0) -> Self:
        p20, p50, p80 = (float(f"{scale * x:.6g}") for x in result[:3])
        return replace(self, metric=metric, p20=p20, p50=p50, p80=p80, repeats=result.repeats)

    def with_interval(self, metric: str, result: Interval, scale: float = 1.0) -> Self:
        """:meth:`with_result`, with the 95 % interval of the median."""
        low, high = (float(f"{scale * x:.6g}") for x in (result.low, result.high))
        return replace(self.with_result(metric, result.spread, scale), low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """A measurement on a CPU."""

    cpu: str
    cores: int
    threads: int
    instruction_set: str
    load: float
    n_power_iterations: int = 1
    busy: str = ""  # who else wants the cores, a key of busy.CASES; empty: nobody

    @property
    def machine(self) -> tuple[str, int, int, str]:
        return self.cpu, self.cores, self.threads, self.instruction_set

    @property
    def place(self) -> tuple[str, str, int, str]:
        """What is compared with one another: the cells of one column of a table."""
        return self.workload, self.mode, self.n_power_iterations, self.busy

    @property
    def subject(self) -> tuple[tuple[str, str, int, str], str, float | None, str]:
        return self.place, self.provider, self.rank_ratio, self.metric


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment() -> Row:
    """A row without a measurement: when, on what, and with which versions."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return Row(
        commit=_git("rev-parse", "--short=10", "HEAD") or "unknown",
        dirty=_git("status", "--porcelain", "--", *SOURCES) != "",
        date=now.isoformat(timespec="seconds"),
        srn_kernels=srn_kernels.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        cpu=_cpu_model(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        instruction_set=cpu.instruction_set() or torch.backends.cpu.get_cpu_capability().lower(),
        load=round(os.getloadavg()[0], 2),
    )


def append(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")


def load(folder: Path = RESULTS, name: str = ROUNDS) -> list[Row]:
    """All rows of one of a folder's files, oldest first; none if there is no such file."""
    path = folder / name
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines if line.strip()]
    return sorted(rows, key=lambda row: row.date)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of the rows with one machine and one subject, the last by date."""
    latest: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row.date):
        latest[row.machine, row.subject] = row
    return list(latest.values())


def of_last_runs(rows: Iterable[Row]) -> list[Row]:
    """Of each place, on each machine, the rows of its last run: columns never mix two runs."""
    rows = list(rows)
    last: dict[tuple, str] = {}
    for row in rows:
        key = (row.machine, row.place)
        last[key] = max(last.get(key, ""), row.date)
    return [row for row in rows if row.date == last[row.machine, row.place]]


def repeated(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """What the last commit with two runs on one machine measured in both, the older row first."""
    runs: dict[tuple, dict[tuple, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row.date):
        if not row.dirty:
            runs.setdefault((row.machine, row.commit), {}).setdefault(row.subject, []).append(row)
    pairs = [
        [(found[-2], found[-1]) for found in subjects.values() if len(found) > 1]
        for subjects in runs.values()
    ]
    return max(filter(None, pairs), key=lambda p: max(b.date for _, b in p), default=[])


def published(rows: Iterable[Row]) -> list[Row]:
    """What tables and plots show: the core workloads on the machine that was measured last."""
    rows = [r for r in of_last_runs(rows) if r.workload in CORE and r.n_power_iterations == 1]
    machine = max(rows, key=lambda row: row.date).machine if rows else None
    return [row for row in rows if row.machine == machine]
