"""Predicts what a launch moves: replays the Triton schedule of a workload through a model of L2.

    python -m benchmarks gpu traffic [workload ...] [--l2-mb 50] [--output float32|bfloat16]
    python -m benchmarks gpu traffic --save     the published rows, and their table in docs/gpu.md

Nothing here is measured. Device-memory bytes are compared with their floor (each input read once,
each output written once). The time is that of ``programs`` workers that take the tiles in order and
share two pipes, device memory and L2, each serving first come, first served.

L2 is fully associative, in blocks of 8 KB, with three classes that the kernels' hints choose:
evict_first leaves before the rest, evict_last after it, each class least recently used first. It
starts empty, and what is still dirty at the end is written back.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from tabulate import tabulate

from benchmarks.cases import workloads
from benchmarks.measure import store
from benchmarks.report import documents
from srn_kernels.backends.tiling.config import KB, MB, LaunchConfig
from srn_kernels.backends.tiling.layout import Layout, Spec, design, model_bytes
from srn_kernels.backends.tiling.schedule import Phase, Tile, build

BLOCK = 8 * KB
FIRST, NORMAL, LAST = range(3)  # to be evicted


@dataclass(frozen=True)
class Machine:
    """Figures of an H200; the last four are assumptions."""

    processors: int = 132
    l2_bytes: int = 50 * MB
    shared_bytes: int = 227 * KB
    device_rate: float = 4.3e12  # bytes/s of a copy, reads and writes together
    l2_rate: float = 6.0e12
    worker_rate: float = 110e9  # of one SM
    tile_seconds: float = 0.7e-6  # ticket, tables, barriers
    wait_seconds: float = 1.0e-6  # from the last arrival to a waiting tile's first load


class L2:
    """What is in the cache; counts the bytes that go past it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.classes: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(3)]
        self.dirty: set[int] = set()
        self.tails: dict[int, int] = {}  # bytes of the last block of an array
        self.used = self.device_read = self.device_written = 0
        self.next_block = 0

    def array(self, size: int) -> int:
        """A new array of ``size`` bytes; returns its address."""
        start = self.next_block
        self.next_block += -(-size // BLOCK)
        if size % BLOCK:
            self.tails[self.next_block - 1] = size % BLOCK
        return start * BLOCK

    def touch(self, address: int, size: int, policy: int, write: bool = False) -> None:
        for block in range(address // BLOCK, -(-(address + size) // BLOCK)):
            bytes_ = self.tails.get(block, BLOCK)
            if not any(c.pop(block, 0) for c in self.classes):
                self.used += bytes_
                self.device_read += 0 if write else bytes_
            self.classes[policy][block] = bytes_
            if write:
                self.dirty.add(block)
        while self.used > self.capacity:
            oldest = next(c for c in self.classes if c)
            block, bytes_ = oldest.popitem(last=False)
            self.used -= bytes_
            self._write_back(block)

    def flush(self) -> None:
        for block in list(self.dirty):
            self._write_back(block)

    def _write_back(self, block: int) -> None:
        if block in self.dirty:
            self.dirty.remove(block)
            self.device_written += self.tails.get(block, BLOCK)


class Access(NamedTuple):
    array: str
    start: int  # bytes
    size: int
    policy: int = NORMAL
    write: bool = False


class Replay:
    """The launch of one direction, for row-major weights."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        machine: Machine,
        backward: bool,
        weight_bytes: int = 4,
        other_bytes: int = 4,
        config: LaunchConfig | None = None,
    ) -> None:
        self.machine, self.backward = machine, backward
        self.specs = [
            Spec(Layout(1, rows, columns, None), weight_bytes, other_bytes, True)
            for rows, columns in shapes
        ]
        total = model_bytes(self.specs, backward)
        self.config = config or LaunchConfig.for_device(
            machine.processors, machine.l2_bytes, machine.shared_bytes, total, backward
        )
        self.design = design(self.specs, self.config, backward)
        self.schedule = build(self.design.works, self.config)

    @property
    def floor_bytes(self) -> int:
        elements = sum(s.layout.rows * s.layout.columns for s in self.specs)
        spec = self.specs[0]
        return elements * ((2 if self.backward else 1) * spec.weight_bytes + spec.other_bytes)

    def tile(self, tile: Tile) -> list[Access]:
        """The accesses of a tile; vectors and scalars that are a few KB a layer are left out."""
        spec, cut = self.specs[tile.layer], self.schedule.layers[tile.layer]
        rows, columns = spec.layout.rows, spec.layout.columns
        if tile.phase == Phase.COLUMNS:
            width = min(cut.column_width, columns - tile.index * cut.column_width)
            start = tile.index * cut.column_width * 4
            shares = [
                Access("shares", k * columns * 4 + start, width * 4) for k in range(cut.slabs)
            ]
            return [*shares, Access("t", start, width * 4, write=True)]
        first = tile.index * cut.slab_rows
        count = min(cut.slab_rows, rows - first) * columns
        first *= columns

        def part(array: str, bytes_: int, policy: int, write: bool = False) -> Access:
            return Access(array, first * bytes_, count * bytes_, policy, write)

        keep = LAST if tile.index >= cut.first_protected else FIRST
        policy = keep if tile.phase == Phase.SLAB else FIRST
        accesses = [part("weight", spec.weight_bytes, policy), Access("v", 0, columns * 4)]
        if self.backward:
            accesses.append(part("grad", spec.other_bytes, policy))
        if tile.phase == Phase.RESCALE:
            bytes_ = spec.weight_bytes if self.backward else spec.other_bytes
            return [*accesses, part("out", bytes_, FIRST, write=True)]
        if not self.backward:
            if not self.design.slabs[tile.layer].whole:  # read twice
                accesses.append(accesses[0])
            share = Access("shares", tile.index * columns * 4, columns * 4, write=True)
            accesses.append(share)
            if cut.column_tiles == 0 and tile.index == cut.slabs - 1:
                accesses.append(Access("shares", 0, cut.slabs * columns * 4))
        return accesses

    def run(self) -> Prediction:
        machine, l2 = self.machine, L2(self.machine.l2_bytes)
        addresses = [
            {
                "weight": l2.array(s.layout.rows * s.layout.columns * s.weight_bytes),
                "grad": l2.array(s.layout.rows * s.layout.columns * s.other_bytes),
                "out": l2.array(
                    s.layout.rows * s.layout.columns * max(s.weight_bytes, s.other_bytes)
                ),
                "v": l2.array(s.layout.columns * 4),
                "t": l2.array(s.layout.columns * 4),
                "shares": l2.array(cut.slabs * s.layout.columns * 4),
            }
            for s, cut in zip(self.specs, self.schedule.layers, strict=True)
        ]
        workers = [0.0] * machine.processors
        finished: dict[tuple[int, int], float] = {}  # layer, arrivals -> when
        arrivals = [0] * len(self.specs)
        latest = [0.0] * len(self.specs)
        device_free = l2_free = waited = 0.0
        l2_bytes = 0
        for tile in self.schedule.tiles:
            start = heapq.heappop(workers) + machine.tile_seconds
            if tile.wait:
                ready = finished[tile.layer, tile.wait] + machine.wait_seconds
                waited += max(0.0, ready - start)
                start = max(start, ready)
            past = l2.device_read + l2.device_written
            bytes_ = 0
            for a in self.tile(tile):
                l2.touch(addresses[tile.layer][a.array] + a.start, a.size, a.policy, a.write)
                bytes_ += a.size
            past = l2.device_read + l2.device_written - past
            l2_bytes += bytes_
            device_free = max(device_free, start) + past / machine.device_rate
            l2_free = max(l2_free, start) + bytes_ / machine.l2_rate
            end = max(device_free, l2_free, start + bytes_ / machine.worker_rate)
            heapq.heappush(workers, end)
            if tile.phase != Phase.RESCALE:
                layer, cut = tile.layer, self.schedule.layers[tile.layer]
                latest[layer] = max(latest[layer], end)
                arrivals[layer] += 1
                finished[layer, arrivals[layer]] = latest[layer]
                if arrivals[layer] % cut.arrivals == cut.arrivals - 1:
                    latest[layer] += machine.wait_seconds  # norms, u and v
                    arrivals[layer] += 1
                    finished[layer, arrivals[layer]] = latest[layer]
        l2.flush()
        return Prediction(
            l2.device_read,
            l2.device_written,
            self.floor_bytes,
            l2_bytes,
            max(workers),
            self.floor_bytes / machine.device_rate,
            waited / (max(workers) * machine.processors),
        )


class Prediction(NamedTuple):
    device_read: int
    device_written: int
    floor_bytes: int
    l2_bytes: int
    seconds: float
    floor_seconds: float
    waiting: float  # share of the workers' time

    @property
    def traffic(self) -> float:
        """Device-memory bytes over their floor."""
        return (self.device_read + self.device_written) / self.floor_bytes

    @property
    def time(self) -> float:
        return self.seconds / self.floor_seconds


@dataclass(frozen=True)
class Row:
    """A prediction of one direction, as it is stored; the commit is that of the schedule."""

    commit: str
    dirty: bool
    date: str
    workload: str
    direction: str
    output_dtype: str
    l2_mb: int
    processors: int
    device_bytes_per_s: float
    l2_bytes_per_s: float
    largest_layer_bytes: int
    floor_bytes: int
    predicted_device_read_bytes: int
    predicted_device_written_bytes: int
    predicted_traffic_over_floor_x: float
    predicted_time_over_floor_x: float
    predicted_waiting_share: float


DIRECTIONS = ("forward", "backward")
OUTPUTS = {"float32": 4, "bfloat16": 2}  # of W_hat and G, bytes
ROWS = store.RESULTS / "traffic.jsonl"
DOCUMENT = store.ROOT / "docs" / "gpu.md"


def predict(workload: workloads.Workload, output: str, machine: Machine) -> list[Row]:
    """Both directions of a workload with float32 weights."""
    environment = store.environment()
    rows = []
    for direction in DIRECTIONS:
        backward = direction == "backward"
        p = Replay(workload.shapes, machine, backward, other_bytes=OUTPUTS[output]).run()
        rows.append(
            Row(
                environment.commit,
                environment.dirty,
                environment.date,
                workload.name,
                direction,
                output,
                machine.l2_bytes // MB,
                machine.processors,
                machine.device_rate,
                machine.l2_rate,
                max(r * c for r, c in workload.shapes) * 4,
                p.floor_bytes,
                p.device_read,
                p.device_written,
                round(p.traffic, 4),
                round(p.time, 4),
                round(p.waiting, 4),
            )
        )
    return rows


def stored() -> list[Row]:
    return [Row(**json.loads(line)) for line in ROWS.read_text().splitlines()]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a workload, for each kind of output."""
    head = ["workload", "largest layer, MB"]
    head += [f"{d}: {what}" for d in DIRECTIONS for what in ("bytes", "time", "waiting")]
    parts = []
    for output in dict.fromkeys(r.output_dtype for r in rows):
        lines: dict[str, list[str]] = {}
        for r in rows:
            if r.output_dtype == output:
                line = lines.setdefault(
                    r.workload, [r.workload, f"{r.largest_layer_bytes / MB:.1f}"]
                )
                line.append(f"{r.predicted_traffic_over_floor_x:.2f}")
                line.append(f"{r.predicted_time_over_floor_x:.2f}")
                line.append(f"{r.predicted_waiting_share:.0%}")
        title = f"**float32 weights, {output} W_hat and gradients**"
        body = tabulate(lines.values(), head, tablefmt="github", disable_numparse=True)
        parts.append(f"{title}\n\n{body}")
    r = rows[0]
    note = (
        f"Predicted for {r.processors} SMs, {r.l2_mb} MB of L2, {r.device_bytes_per_s / 1e12:.1f} "
        f"TB/s to device memory and {r.l2_bytes_per_s / 1e12:.1f} TB/s to L2; commit {r.commit}. "
        "Made by `python -m benchmarks gpu traffic --save`."
    )
    return "\n\n".join([*parts, note])


def save(rows: Sequence[Row]) -> None:
    """A prediction is a function of the source: the new rows replace the old."""
    ROWS.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    documents.write(DOCUMENT, table(rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(workloads.load())
    parser.add_argument("workload", nargs="*", help=f"of {known}; all by default")
    parser.add_argument("--l2-mb", type=int, default=Machine.l2_bytes // MB)
    parser.add_argument("--output", choices=OUTPUTS, nargs="+", default=list(OUTPUTS))
    parser.add_argument("--save", action="store_true", help="all of it, published")


def run(chosen: argparse.Namespace) -> int:
    if chosen.save and (chosen.workload or chosen.l2_mb * MB != Machine.l2_bytes):
        raise SystemExit("--save publishes all workloads at the default machine")
    machine = Machine(l2_bytes=chosen.l2_mb * MB)
    rows = [
        row
        for output in chosen.output
        for name in chosen.workload or workloads.load()
        for row in predict(workloads.find(name), output, machine)
    ]
    print(table(rows))
    if chosen.save:
        save(rows)
    return 0
