"""Hardware counters of our kernels, through ncu: time, bytes, and what warps wait for."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import workloads
from benchmarks.gpu import program
from benchmarks.gpu.candidates import candidates, on_device
from benchmarks.gpu.program import Fail
from benchmarks.gpu.rows import Row
from benchmarks.measure.store import ROOT
from benchmarks.measure.timing import Spread

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# ncu's name: the row's metric, and its scale.
METRICS = {
    "gpu__time_duration.sum": ("ncu_time_ms", 1e-6),
    "dram__bytes_read.sum": ("ncu_dram_read_mb", 1e-6),
    "dram__bytes_write.sum": ("ncu_dram_written_mb", 1e-6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("ncu_dram_percent", 1.0),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("ncu_issue_percent", 1.0),
    STALL.format("long_scoreboard"): ("ncu_wait_for_l2_or_memory_warps", 1.0),
    STALL.format("short_scoreboard"): ("ncu_wait_for_shared_memory_warps", 1.0),
    STALL.format("barrier"): ("ncu_wait_at_barrier_warps", 1.0),
}
OURS = "regex:^(normalize|backward)_kernel$"


def parse(text: str) -> list[dict[str, float]]:
    """The metrics of every profiled kernel, from ``--csv --page raw --print-units base``."""
    lines = text.splitlines()
    start = next((i for i, x in enumerate(lines) if x.startswith('"ID"')), None)
    if start is None:
        return []
    header, _units, *found = csv.reader(lines[start:])
    kernels = []
    for values in found:
        named = dict(zip(header, values, strict=False))
        number = {m: named[m].replace(",", "") for m in METRICS if named.get(m)}
        kernels.append({METRICS[m][0]: METRICS[m][1] * float(x) for m, x in number.items()})
    return kernels


@dataclass(frozen=True)
class Counters:
    """The counters of a backend's forward and backward of one workload."""

    workload: str
    backend: str

    def __call__(self, device: torch.device, base: Row, fail: Fail) -> Iterator[Row]:
        command = ("ncu", "--csv", "--page", "raw", "--print-units", "base")
        command += ("--clock-control", "none", "--kernel-name", OURS, "--launch-skip", "2")
        command += ("--launch-count", "2", "--metrics", ",".join(METRICS))
        body = (sys.executable, "-m", "benchmarks", "gpu", "counters", "--body", self.workload)
        body += ("--backend", self.backend)
        done = subprocess.run((*command, *body), cwd=ROOT, capture_output=True, text=True)
        kernels = parse(done.stdout)
        if done.returncode or len(kernels) != 2:
            output = (done.stdout + done.stderr)[-2000:]
            fail(f"{self.backend}: ncu gave {len(kernels)} kernels of 2:\n{output}")
            return
        for mode, values in zip(("forward", "backward"), kernels, strict=True):
            row = replace(base, workload=self.workload, mode=mode, provider=self.backend)
            for metric, value in values.items():
                yield row.with_result(metric, Spread(value, value, value, 1))


def two_rounds(workload: str, backend: str) -> None:
    device = torch.device("cuda")
    found = workloads.find(workload)
    problem = on_device(workloads.make_problem(found), device)
    name = f"functional_{backend}"
    runner = candidates(device, [backend], found)[name].runner(problem, 0.7)
    for _ in range(2):
        runner.forward_backward()
    torch.cuda.synchronize()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    program.add_arguments(parser)
    parser.add_argument("--workload", nargs="+", default=["vit_b16", "biggan_128_D_ch96"])
    parser.add_argument("--body", help=argparse.SUPPRESS)


def run(chosen: argparse.Namespace) -> int:
    backends: Sequence[str] = program.backends_of(chosen)
    if chosen.body:
        two_rounds(chosen.body, backends[0])
        return 0
    parts = [Counters(w, b) for w in chosen.workload for b in backends]
    return program.run_parts(chosen, parts)
