"""How the cost of a round grows: with the parameters, the layers, the iterations, the threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import workloads
from benchmarks.measure import suite
from benchmarks.measure.store import Row
from benchmarks.measure.suite import Options, Watcher

PROVIDERS = ("copy", "torch_sn", "foreach", "module")
LAYERS = 16


@dataclass(frozen=True)
class Point:
    """One place of a curve."""

    workload: str
    n_power_iterations: int = 1
    threads: int | None = None  # None: as the process has them


def _square(layers: int, parameters: int) -> str:
    side = round((parameters / layers) ** 0.5)
    return f"{layers}x{side}x{side}"


# What the horizontal axis says, and the points from left to right.
CURVES: dict[str, dict[int, Point]] = {
    f"parameters in {LAYERS} layers": {
        n: Point(_square(LAYERS, n)) for n in (2**14, 2**16, 2**18, 2**20, 2**22, 2**24)
    },
    "layers of 2^20 parameters": {n: Point(_square(n, 2**20)) for n in (1, 4, 16, 64, 256)},
    "power iterations, 16 layers of 256 x 256": {
        n: Point("16x256x256", n_power_iterations=n) for n in (1, 2, 4, 8)
    },
    "threads, 16 layers of 512 x 512": {n: Point("16x512x512", threads=n) for n in (1, 2, 4, 8)},
}


def points(threads: int) -> Iterator[Point]:
    """Every distinct place of the curves that this many threads can reach."""
    seen = set()
    for curve in CURVES.values():
        for point in curve.values():
            if point not in seen and (point.threads or 1) <= threads:
                seen.add(point)
                yield point


def matches(point: Point, row: Row) -> bool:
    """Whether a row was measured there; a point that does not name its threads takes the most."""
    return (
        row.workload == point.workload
        and row.n_power_iterations == point.n_power_iterations
        and point.threads in (None, row.threads)
    )


def run(options: Options, base: Row, watcher: Watcher) -> list[Row]:
    """The forward and backward of every point, for PROVIDERS; the thread count is put back."""
    options = replace(options, providers=PROVIDERS, modes=("forward_backward",), rank_ratios=(1.0,))
    threads = torch.get_num_threads()
    rows: list[Row] = []
    try:
        for point in points(threads):
            torch.set_num_threads(point.threads or threads)
            here = replace(base, threads=torch.get_num_threads())
            chosen = replace(options, n_power_iterations=point.n_power_iterations)
            rows += suite.run_matrices(workloads.find(point.workload), chosen, here, watcher)
    finally:
        torch.set_num_threads(threads)
    return rows
