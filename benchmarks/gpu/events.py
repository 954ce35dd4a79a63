"""Simulates launches of the CUDA kernels, event by event; a prediction, nothing is measured.

    python -m benchmarks gpu events [workload ...] [--card h200] [--output float32|bfloat16]
    python -m benchmarks gpu events --save     the table of all workloads in docs/cuda.md

The plan is that of srn_kernels.backends.cuda.planning. Every CTA is a producer that takes tickets,
waits for counters and for slots and starts copies, and a consumer that works on what has arrived,
finishes layers and writes; queue, slots and kept slabs follow csrc/cuda/cta.h. What they share are
two pipes, device memory and L2, each first come, first served, behind the cache of traffic.py.

Beyond 400 lines: the assumptions stand beside the steps that make them.
"""

from __future__ import annotations

import argparse
import heapq
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from benchmarks.cases import workloads
from benchmarks.gpu.traffic import FIRST, L2, LAST, NORMAL
from benchmarks.measure.store import ROOT
from benchmarks.report import documents
from srn_kernels.backends.cuda import planning
from srn_kernels.backends.tiling import staging
from srn_kernels.backends.tiling.config import KB, MB, LaunchConfig

# What the kernels were compiled with; tests compare it with the extension's own figures.
KERNELS = staging.Machine(15, (1, 2, 3, 6, 9), (1, 3, 6), 3, 1920, 16, 32, (10752, 18560))
QUEUE = 4  # entries that a producer may be ahead
SLAB, COLUMNS, RESCALE, RESIDENT, EXIT = range(5)


@dataclass(frozen=True)
class Card:
    """A device; from ``device_rate`` on figures of others, or assumptions."""

    name: str
    processors: int
    l2_bytes: int
    shared_bytes: int
    device_rate: float  # bytes/s of a copy, reads and writes together
    l2_rate: float
    clock: float
    sm_rate: float = 110e9
    l2_seconds: float = 280e-9  # to the first byte of a hit,
    device_seconds: float = 650e-9  # of a miss
    counter_seconds: float = 1.0e-6  # from an arrival to the first copy of a tile that waited
    write_bytes: int = 32 * KB  # that an SM may have on their way before its stores wait
    launch_seconds: float = 0.0


CARDS = {
    card.name: card
    for card in (
        Card("h200", 132, 50 * MB, 227 * KB, 4.3e12, 6.0e12, 1.7e9),
        Card("h100", 132, 50 * MB, 227 * KB, 3.0e12, 6.0e12, 1.7e9),
        Card("a100", 108, 40 * MB, 163 * KB, 1.4e12, 4.0e12, 1.4e9),
        Card("rtx4090", 128, 72 * MB, 99 * KB, 0.9e12, 4.0e12, 2.5e9),
    )
}


@dataclass(frozen=True)
class Cycles:
    """Of an SM's consumers. Instructions are those that compile.py counts, of the middle row."""

    # For a unit of four elements: forward slab and rescale, backward sums and gradient.
    instructions: tuple[float, float, float, float] = (21, 19, 21, 25)
    narrow: float = 1.4  # times as many where a type has 16 bits
    scalar: float = 0.5  # times as many for a single element
    schedulers: int = 4
    piece: float = 100  # wait, hand over
    slab_end: float = 400  # sums, the counter
    finish: float = 1700  # norms, sigma, u, v
    lanes: int = 480


class Prediction(NamedTuple):
    seconds: float
    floor_seconds: float
    device_bytes: int
    floor_bytes: int
    busy: float  # share of the consumers' time
    waits: float  # of the producers', for counters
    kept: float  # share of the slabs' pieces that stayed in shared memory
    events: int

    @property
    def time(self) -> float:
        return self.seconds / self.floor_seconds

    @property
    def traffic(self) -> float:
        return self.device_bytes / self.floor_bytes


class Stuck(RuntimeError):
    """Processes wait for each other."""


class Condition:
    """What processes wait for; they look again themselves when they wake."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Process, list[bool]]] = []


Process = Generator[Any, None, None]  # yields a time, or Conditions of which any may wake it


class Clock:
    """Processes in the order of time; those of one time in the order of their asking."""

    def __init__(self) -> None:
        self.now, self.events = 0.0, 0
        self._heap: list[tuple[float, int, Process]] = []
        self._alive = 0

    def start(self, process: Process, at: float = 0.0) -> None:
        self._alive += 1
        self._push(at, process)

    def _push(self, at: float, process: Process) -> None:
        self.events += 1
        heapq.heappush(self._heap, (max(at, self.now), self.events, process))

    def wake(self, condition: Condition) -> None:
        waiting, condition.waiting = condition.waiting, []
        for process, gone in waiting:
            if not gone[0]:
                gone[0] = True
                self._push(self.now, process)

    def run(self) -> None:
        while self._heap:
            self.now, _, process = heapq.heappop(self._heap)
            try:
                wanted = next(process)
            except StopIteration:
                self._alive -= 1
                continue
            if isinstance(wanted, tuple):
                gone = [False]
                for condition in wanted:
                    condition.waiting.append((process, gone))
            else:
                self._push(wanted, process)
        if self._alive:
            raise Stuck(f"{self._alive} processes wait without end at {self.now:.2e} s")


@dataclass
class Entry:
    op: int
    layer: int
    index: int
    pieces: list[int]  # that are worked on, in order
    kept: dict[int, int] = field(default_factory=dict)  # piece: resident slot
    full: list[float] = field(default_factory=list)  # when the copies of ``pieces`` are there
    issued: Condition = field(default_factory=Condition)


@dataclass
class Cta:
    queue: deque[Entry] = field(default_factory=deque)
    residents: deque[tuple[int, int, int, dict[int, int]]] = field(default_factory=deque)
    free: list[int] = field(default_factory=list)  # resident slots
    streamed: int = 0  # pieces in stream slots
    published: Condition = field(default_factory=Condition)
    moved: Condition = field(default_factory=Condition)  # an entry, a slot came free
    writes: deque[tuple[float, int]] = field(default_factory=deque)  # on their way: end, bytes
    port: float = 0.0  # when this SM can take more bytes
    busy: float = 0.0  # of the consumers
    held: float = 0.0  # the producer, by counters


class Launch:
    """One launch for row-major weights, one power iteration."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        card: Card,
        backward: bool,
        other_type: int = planning.FLOAT32,
        type_: int = planning.FLOAT32,
        cycles: Cycles | None = None,
        ctas: int | None = None,
    ) -> None:
        self.card, self.backward, self.cycles = card, backward, cycles or Cycles()
        self.size, self.other = planning.BYTES[type_], planning.BYTES[other_type]
        words = [0, int(backward), 0]
        for i, shape in enumerate(shapes):
            strides = torch.empty(shape, device="meta").stride()
            words += [2, 0, type_, other_type, 1, 1, 0, i, planning.FLOAT32, 1, *shape, *strides]
        made = planning.plan(words, KERNELS, self._config)
        self.made, self.records = (
            made,
            [planning.Record(*x) for x in planning.RECORD.iter_unpack(made.records)],
        )
        words = torch.frombuffer(bytearray(made.tiles), dtype=torch.int32)
        self.tiles = [tuple(x) for x in words.view(-1, 4).tolist()]
        self.ctas = [Cta(free=list(range(made.resident_slots))) for _ in range(ctas or made.ctas)]
        self.clock, self.l2 = Clock(), L2(card.l2_bytes)
        self.device_free = self.l2_free = 0.0
        self.ticket = self.pieces = self.kept_pieces = 0
        self.arrived, self.seen = [0] * len(shapes), [0] * len(shapes)
        self.passed = [Condition() for _ in shapes]
        self.kept: dict[tuple[int, int], set[int]] = {}
        self.arrays = [
            {
                "weight": self.l2.array(r.rows * r.columns * self.size),
                "other": self.l2.array(r.rows * r.columns * self.other),
                "out": self.l2.array(r.rows * r.columns * max(self.size, self.other)),
                "shares": self.l2.array(r.slabs * r.columns * 4),
            }
            for r in self.records
        ]

    def _config(self, device: int, model_bytes: int, backward: bool) -> tuple[LaunchConfig, int]:
        c = self.card
        sizes = (c.processors, c.l2_bytes, c.shared_bytes, model_bytes, backward)
        return planning.config_for(*sizes), c.shared_bytes

    def run(self) -> Prediction:
        for cta in self.ctas:
            self.clock.start(self._produce(cta), self.card.launch_seconds)
            self.clock.start(self._consume(cta), self.card.launch_seconds)
        self.clock.run()
        seconds, l2 = self.clock.now, self.l2
        l2.flush()
        elements = sum(r.rows * r.columns for r in self.records)
        floor = elements * ((2 if self.backward else 1) * self.size + self.other)
        return Prediction(
            seconds,
            floor / self.card.device_rate,
            l2.device_read + l2.device_written,
            floor,
            sum(cta.busy for cta in self.ctas) / (seconds * len(self.ctas)),
            sum(cta.held for cta in self.ctas) / (seconds * len(self.ctas)),
            self.kept_pieces / max(1, self.pieces),
            self.clock.events,
        )

    # --- memory -----------------------------------------------------------------------------------

    def _move(
        self, cta: Cta, spans: Sequence[tuple[int, str, int, int, int]], write: bool = False
    ) -> float:
        """When spans (layer, array, start, bytes, policy) have arrived, or been taken."""
        past, size = self.l2.device_read + self.l2.device_written, 0
        for layer, array, start, bytes_, policy in spans:
            self.l2.touch(self.arrays[layer][array] + start, bytes_, policy, write)
            size += bytes_
        past = self.l2.device_read + self.l2.device_written - past
        now, card = self.clock.now, self.card
        self.device_free = max(self.device_free, now) + past / card.device_rate
        self.l2_free = max(self.l2_free, now) + size / card.l2_rate
        cta.port = max(cta.port, now) + size / card.sm_rate
        # Hits do not stand in line for device memory.
        done = max(self.l2_free, cta.port, self.device_free if past else 0.0)
        return done if write else done + (card.device_seconds if past else card.l2_seconds)

    def _span(self, r: planning.Record, index: int, piece: int) -> tuple[int, int]:
        """First element and number of elements of a slab's piece."""
        first = index * r.slab_rows
        rows = min(r.slab_rows, r.rows - first)
        row = piece // r.row_pieces * r.piece_rows
        column = piece % r.row_pieces * r.piece_columns
        count = min(r.piece_rows, rows - row) * min(r.piece_columns, r.columns - column)
        return (first + row) * r.columns + column, count

    def _pieces(self, r: planning.Record, index: int) -> range:
        rows = min(r.slab_rows, r.rows - index * r.slab_rows)
        return range(-(-rows // r.piece_rows) * r.row_pieces)

    # --- the producer -----------------------------------------------------------------------------

    def _produce(self, cta: Cta) -> Process:
        while True:
            yield from self._offer(cta, False)
            yield self.clock.now + self.card.l2_seconds
            if self.ticket == len(self.tiles):
                break
            self.ticket += 1
            yield from self._prepare(cta, *self.tiles[self.ticket - 1])
        yield from self._offer(cta, True)
        yield from self._publish(cta, Entry(EXIT, 0, 0, []))

    def _publish(self, cta: Cta, entry: Entry) -> Process:
        while len(cta.queue) >= QUEUE:
            yield (cta.moved,)
        cta.queue.append(entry)
        self.clock.wake(cta.published)

    def _offer(self, cta: Cta, all_: bool) -> Process:
        while cta.residents:
            layer, index, until, where = cta.residents[0]
            while self.seen[layer] < until:
                if not all_:
                    return
                yield (self.passed[layer],)
            yield from self._publish(cta, Entry(RESIDENT, layer, index, list(where), where))
            cta.residents.popleft()

    def _await(self, cta: Cta, layer: int, value: int) -> Process:
        while self.seen[layer] < value:
            yield from self._offer(cta, False)
            if self.seen[layer] < value:
                first = (self.passed[cta.residents[0][0]],) if cta.residents else ()
                yield (self.passed[layer], *first)

    def _prepare(self, cta: Cta, layer: int, op: int, index: int, wait: int) -> Process:
        r = self.records[layer]
        pieces = [] if op == COLUMNS else list(self._pieces(r, index))
        if op != SLAB and wait > 0:
            since = self.clock.now
            yield from self._await(cta, layer, wait)
            cta.held += self.clock.now - since
        if op == RESCALE:
            pieces = [k for k in pieces if k not in self.kept.get((layer, index), ())]
            if not pieces:
                return
        kept: dict[int, int] = {}
        if op == SLAB:
            self.pieces += len(pieces)
            if len(cta.residents) < KERNELS.most_slots:
                for k in pieces[: len(cta.free)]:
                    kept[k] = cta.free.pop()
            self.kept_pieces += len(kept)
        if op == RESCALE or (op == SLAB and self.backward):
            pieces.sort(key=lambda k: (k % r.row_pieces, k))
        entry = Entry(op, layer, index, pieces, kept)
        yield from self._publish(cta, entry)
        if kept:
            cta.residents.append((layer, index, r.passes * r.arrivals, kept))
        for k in pieces:
            if k not in kept:
                while cta.streamed >= self.made.stream_slots:
                    yield (cta.moved,)
                cta.streamed += 1
            first, count = self._span(r, index, k)
            again = op == SLAB and index >= r.first_protected and k not in kept
            policy = LAST if again else FIRST
            spans = [(layer, "weight", first * self.size, count * self.size, policy)]
            if self.backward:
                spans.append((layer, "other", first * self.other, count * self.other, policy))
            entry.full.append(self._move(cta, spans))
            self.clock.wake(entry.issued)

    # --- the consumers ----------------------------------------------------------------------------

    def _consume(self, cta: Cta) -> Process:
        while True:
            while not cta.queue:
                yield (cta.published,)
            entry = cta.queue[0]
            if entry.op == EXIT:
                return
            yield from self._work(cta, entry)
            cta.queue.popleft()
            self.clock.wake(cta.moved)

    def _spend(self, cta: Cta, cycles: float) -> float:
        seconds = cycles / self.card.clock
        cta.busy += seconds
        return self.clock.now + seconds

    def _work(self, cta: Cta, e: Entry) -> Process:
        r, cycles = self.records[e.layer], self.cycles
        if e.op == COLUMNS:
            width = min(r.column_width, r.columns - e.index * r.column_width)
            yield from self._add_shares(cta, e.layer, e.index * r.column_width, width)
            yield from self._arrive(cta, e.layer)
            return
        together = r.row_pieces if e.op == SLAB and not self.backward else 1
        for at in range(0, len(e.pieces), together):
            block = e.pieces[at : at + together]
            if e.op != RESIDENT:
                while len(e.full) < at + len(block):
                    yield (e.issued,)
                yield max(e.full[at : at + len(block)])
            rows = -(-sum(self._span(r, e.index, k)[1] for k in block) // r.columns)
            rows = max(1, rows) if together > 1 else min(r.piece_rows, max(1, rows))
            yield self._spend(cta, cycles.piece + self._cycles(r, rows, e.op))
            if e.op != SLAB:
                yield from self._write(cta, e, block[0])
            self._give_back(cta, e, block)
        if e.op != SLAB:
            return
        groups = KERNELS.consumer_warps // r.group_warps
        end = cycles.slab_end
        if not self.backward:
            first, each = staging.SUM_CYCLES
            end += r.vectors * (first + each * groups) if groups > 1 else 0
            self._move(
                cta, [(e.layer, "shares", e.index * r.columns * 4, r.columns * 4, NORMAL)], True
            )
        yield self._spend(cta, end)
        self.kept[e.layer, e.index] = set(e.kept)
        yield from self._arrive(cta, e.layer)

    def _give_back(self, cta: Cta, e: Entry, block: Sequence[int]) -> None:
        for k in block:
            if e.op == RESIDENT:
                cta.free.append(e.kept[k])
            elif k not in e.kept:
                cta.streamed -= 1
        self.clock.wake(cta.moved)

    def _write(self, cta: Cta, e: Entry, piece: int) -> Process:
        first, count = self._span(self.records[e.layer], e.index, piece)
        size = count * (self.size if self.backward else self.other)
        start = first * (self.size if self.backward else self.other)
        done = self._move(cta, [(e.layer, "out", start, size, FIRST)], True)
        cta.writes.append((done, size))
        # Stores are posted; an SM can only have so many bytes of them on their way.
        while sum(bytes_ for _, bytes_ in cta.writes) > self.card.write_bytes:
            yield cta.writes.popleft()[0]

    def _cycles(self, r: planning.Record, rows: int, op: int) -> float:
        """Of one piece: issue of all warps, or the latency of one, whichever is longer."""
        c = self.cycles
        phase = (0 if op == SLAB else 1) + (2 if self.backward else 0)
        instructions = c.instructions[phase] * (1.0 if min(self.size, self.other) > 2 else c.narrow)
        instructions *= c.scalar if r.path == staging.SCALARS else 1.0
        vectors = r.vectors if phase == 0 else min(r.vectors, KERNELS.part_vectors)
        groups = KERNELS.consumer_warps // r.group_warps
        row = vectors * instructions / c.schedulers + staging.ROW_CYCLES
        turns = -(-rows // groups)
        waits = -(-turns // 8) if phase == 0 and r.group_warps > 1 else 0
        longest = max(rows * r.group_warps * row, turns * row * staging.WARP_STRETCH)
        return longest + waits * staging.BARRIERS

    def _add_shares(self, cta: Cta, layer: int, start: int, width: int) -> Process:
        r = self.records[layer]
        spans = [
            (layer, "shares", (k * r.columns + start) * 4, width * 4, NORMAL)
            for k in range(r.slabs)
        ]
        there = self._move(cta, spans)
        # Five threads a column, four loads in flight each.
        turns = -(-width // (self.cycles.lanes // 5)) * -(-r.slabs // 20)
        busy = turns * self.card.l2_seconds
        cta.busy += busy
        yield max(there, self.clock.now + busy)

    def _arrive(self, cta: Cta, layer: int) -> Process:
        r = self.records[layer]
        self._count(layer)
        if self.arrived[layer] % r.arrivals != r.arrivals - 1:
            return
        if not self.backward:
            if r.column_tiles == 0:
                yield from self._add_shares(cta, layer, 0, r.columns)
            # Two loops over s and t, four loads in flight a thread.
            loads = -(-(r.rows + r.columns) // (4 * self.cycles.lanes))
            yield self.clock.now + 2 * loads * self.card.l2_seconds
        yield self._spend(cta, self.cycles.finish)
        self._count(layer)

    def _count(self, layer: int) -> None:
        self.arrived[layer] += 1
        self.clock.start(self._show(layer, self.arrived[layer]))

    def _show(self, layer: int, value: int) -> Process:
        yield self.clock.now + self.card.counter_seconds
        self.seen[layer] = max(self.seen[layer], value)
        self.clock.wake(self.passed[layer])


# --- the command ----------------------------------------------------------------------------------

# All, of the largest every eighth matrix.
WORKLOADS = [name if name != "gpt2_xl" else "gpt2_xl/8" for name in workloads.load()]
OUTPUTS = {"float32": planning.FLOAT32, "bfloat16": planning.BFLOAT16}
DOCUMENT = ROOT / "docs" / "cuda.md"


def assumptions(card: Card) -> str:
    """What stands beside every output."""
    c = Cycles()
    instructions = "/".join(f"{n:g}" for n in c.instructions)
    return (
        f"Simulated, not measured. {card.name}: {card.processors} SMs, {card.l2_bytes // MB} MB of "
        f"L2, {card.shared_bytes // KB} KB of shared memory a CTA. Assumed: "
        f"{card.device_rate / 1e12:.1f} TB/s to device memory, {card.l2_rate / 1e12:.1f} TB/s to "
        f"L2, {card.sm_rate / 1e9:.0f} GB/s of an SM, {card.clock / 1e9:.1f} GHz; "
        f"{card.l2_seconds * 1e9:.0f} ns to a hit's first byte, {card.device_seconds * 1e9:.0f} ns "
        f"to a miss's; {card.counter_seconds * 1e6:.1f} us from an arrival to the first copy of a "
        "tile that waited for it; pipes first come, first served, reads and writes alike; L2 fully "
        f"associative, obeying the hints, empty at first; {card.write_bytes // KB} KB of an SM's "
        f"stores on their way before more wait; {instructions} instructions for four elements "
        f"(slab, rescale, sums, gradient; 16-bit types {c.narrow:g} times, single elements "
        f"{c.scalar:g} times each), one a scheduler and cycle; a warp alone {staging.WARP_STRETCH} "
        f"times its share; {staging.BARRIERS} cycles for a pair of barriers, {c.piece:g} for a "
        f"piece, {c.slab_end:g} at a slab's end, {c.finish:g} for a layer. Not modelled: the "
        "launch, the memory's turnaround, TLB, bank conflicts, other kernels."
    )


def table(rows: Sequence[tuple[str, str, Prediction, Prediction]], card: Card) -> str:
    head = ["workload", "W_hat, G"]
    for direction in ("forward", "backward"):
        head += [f"{direction}: us", "x floor", "bytes", "busy", "waits", "kept"]
    lines = [
        [name, output]
        + [
            text
            for p in pair
            for text in (
                f"{p.seconds * 1e6:.1f}",
                f"{p.time:.2f}",
                f"{p.traffic:.2f}",
                f"{p.busy:.0%}",
                f"{p.waits:.0%}",
                f"{p.kept:.0%}",
            )
        ]
        for name, output, *pair in rows
    ]
    note = (
        "us: of the launch; bytes: to device memory, over the floor's; busy: the consumers' share "
        "of the time; waits: the producers' for counters; kept: pieces of slabs that stayed in "
        "shared memory. "
    )
    made = "Made by `python -m benchmarks gpu events --save`."
    body = tabulate(lines, head, tablefmt="github", disable_numparse=True)
    return "\n\n".join([body, note + made, assumptions(card)])


def predict(workload: str, output: str, card: Card) -> tuple[Prediction, Prediction]:
    """A forward and a backward of a workload with float32 weights."""
    shapes = workloads.find(workload).shapes
    forward, backward = (Launch(shapes, card, b, OUTPUTS[output]).run() for b in (False, True))
    return forward, backward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", nargs="*", help="all by default")
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("--output", choices=OUTPUTS, nargs="+", default=list(OUTPUTS))
    for name, kind in (("processors", int), ("device-rate", float), ("counter-seconds", float)):
        parser.add_argument(f"--{name}", type=kind, help="in place of the card's")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--save", action="store_true", help="all workloads, into docs/cuda.md")


def run(chosen: argparse.Namespace) -> int:
    changed = {
        name: value
        for name in ("processors", "device_rate", "counter_seconds")
        if (value := getattr(chosen, name)) is not None
    }
    card = replace(CARDS[chosen.card], **changed)
    if chosen.save and (chosen.workload or card != CARDS["h200"]):
        raise SystemExit("--save publishes all workloads on the h200")
    work = [(name, o) for o in chosen.output for name in chosen.workload or WORKLOADS]
    with ProcessPoolExecutor(chosen.jobs) as pool:
        pairs = pool.map(predict, *zip(*work, strict=True), [card] * len(work))
        rows = [(*what, *pair) for what, pair in zip(work, pairs, strict=True)]
    print(block := table(rows, card))
    if chosen.save:
        documents.write(DOCUMENT, block, "events")
    return 0
