"""How slabs pass through a CTA's shared memory: pieces, slots, and which threads own which columns.

For kernels that keep slabs on chip (csrc/cuda). A piece is what is copied at a time: as many whole
rows as a slot holds, or a part of a row that no slot holds. Some slots carry the stream of pieces,
the others keep slabs until they are rescaled. Host data only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from srn_kernels.backends.tiling.config import KB, LaunchConfig
from srn_kernels.backends.tiling.layout import Layout
from srn_kernels.backends.tiling.schedule import LayerTiles, Work, cut, round_up

DIRECT, SCALARS, VECTORS = range(3)  # Path in plan.h
WARP = 32
LINE = 16  # bytes that are copied together; a span starts as far from one as in global memory
SLOT_BYTES = (16 * KB, 32 * KB)
FEWEST_STREAM_SLOTS = 4
IN_FLIGHT = 64 * KB  # beside what is being worked on, where shared memory is large enough
# In cycles of an SM, from the machine code and the latencies that are published for it.
VECTOR_CYCLES = 16 / 4  # of a warp's unit: its instructions over four schedulers
ROW_CYCLES = 10 / 4
WARP_STRETCH = 8  # a warp alone takes so many times longer than its share of the schedulers
BARRIERS = 150  # a pair, and the sum between them
SUM_CYCLES = 60, 8  # of a slab's shares of a vector: barriers, and each further group


class Machine(NamedTuple):
    """Constants of the kernels, as compiled; names as in csrc/cuda/plan.h."""

    consumer_warps: int
    vectors: tuple[int, ...]  # that a thread may own: of rows read by vectors
    scalars: tuple[int, ...]  # of rows read by single elements
    part_vectors: int  # the most in backward; a row of more comes in parts of so many
    most_rows: int  # of a slab
    most_slots: int
    most_pieces: int
    control_bytes: tuple[int, int]  # of shared memory beside the slots: float32, float64


class Piece(NamedTuple):
    """What staging depends on."""

    layout: Layout
    weight_bytes: int  # of an element
    other_bytes: int  # of an element of G; 0 in forward
    aligned: bool  # whether vectors may be read


class Staged(NamedTuple):
    """How one layer's slabs are staged; fields as in Record of plan.h."""

    path: int
    vectors: int
    group_warps: int
    piece_rows: int
    row_pieces: int
    piece_columns: int
    other_offset: int
    block_rows: int  # slabs are multiples of it
    most_rows: int  # of a slab


class Staging(NamedTuple):
    layers: list[Staged]
    slot_bytes: int
    stream_slots: int
    resident_slots: int


class Sharing(NamedTuple):
    """A thread owns ``vectors`` units of a row that ``group_warps`` warps share."""

    vectors: int
    group_warps: int


def _width(piece: Piece, path: int) -> int:
    """Elements of a unit."""
    return 1 if path == SCALARS else 2 if piece.weight_bytes == 8 else 4


def _counts(path: int, machine: Machine, whole: bool) -> list[int]:
    """Of vectors a thread: for whole rows and panels of them, or for rows that come in parts."""
    counts = machine.scalars if path == SCALARS else machine.vectors
    return [n for n in counts if (n <= machine.part_vectors) == whole]


def sharings(units: int, last: int, counts: Sequence[int], machine: Machine) -> list[Sharing]:
    """The ways to share ``units``, and ``last``, of which only a thread's last may be missing."""
    found = []
    for vectors in counts:
        warps = -(-units // (WARP * vectors))
        if warps <= machine.consumer_warps and (vectors - 1) * warps * WARP <= last:
            found.append(Sharing(vectors, warps))
    return found


def _cycles(way: Sharing, rows: int, piece_rows: int, machine: Machine) -> float:
    """About how long a slab takes once its bytes are there."""
    groups = machine.consumer_warps // way.group_warps
    row = way.vectors * VECTOR_CYCLES + ROW_CYCLES  # of one warp
    turns = -(-rows // groups)
    rounds = -(-rows // piece_rows) * -(-piece_rows // (groups * 8))
    waits = BARRIERS * min(rounds, turns) if way.group_warps > 1 else 0
    sums = way.vectors * (SUM_CYCLES[0] + SUM_CYCLES[1] * groups) if groups > 1 else 0
    return max(rows * way.group_warps * row, turns * row * WARP_STRETCH + waits) + sums


def on_path(piece: Piece, machine: Machine) -> int:
    """Whether, and how wide, a layer can be read from shared memory."""
    columns = piece.layout.columns
    if piece.layout.outer > 1 or columns == 0 or piece.layout.rows == 0:
        return DIRECT
    path = VECTORS if piece.aligned and columns % _width(piece, VECTORS) == 0 else SCALARS
    if piece.other_bytes:
        return path  # by panels
    units = columns // _width(piece, path)
    counts = _counts(path, machine, True) + _counts(path, machine, False)
    return path if sharings(units, units, counts, machine) else DIRECT


def _direct(layout: Layout) -> Staged:
    # Rows that lie side by side are read together.
    block = max(1, min(layout.rows, WARP // layout.inner)) if layout.outer > 1 else 1
    return Staged(DIRECT, 1, 1, 1, 1, layout.columns, 0, block, max(1, layout.rows))


def _in_parts(piece: Piece, path: int, room: int, machine: Machine) -> Staged | None:
    """A row that no slot or three vectors a thread hold, in forward: by parts of three vectors."""
    units = piece.layout.columns // _width(piece, path)
    for vectors, warps in sharings(units, units, _counts(path, machine, False), machine):
        columns = machine.part_vectors * warps * WARP * _width(piece, path)
        if columns * piece.weight_bytes <= room:
            parts = vectors // machine.part_vectors
            most = min(machine.most_pieces // parts, machine.most_rows)
            return Staged(path, vectors, warps, 1, parts, columns, 0, 1, most)
    return None


def _panels(piece: Piece, path: int, room: int, machine: Machine) -> tuple[int, int]:
    """In backward: how many panels of columns, and how wide."""
    width, columns = _width(piece, path), piece.layout.columns
    units = columns // width
    most = room // (width * (piece.weight_bytes + piece.other_bytes))
    counts = _counts(path, machine, True)
    most = min(most, max(counts) * WARP * machine.consumer_warps)
    n = -(-units // most)
    while True:
        panel = -(-units // n)
        last = units - (n - 1) * panel
        if last > 0 and sharings(panel, last, counts, machine):
            return n, panel * width
        n += 1


def _staged(piece: Piece, path: int, slot_bytes: int, machine: Machine) -> Staged:
    layout = piece.layout
    if path == DIRECT:
        return _direct(layout)
    rows, columns = layout.rows, layout.columns
    size = piece.weight_bytes + piece.other_bytes
    room = slot_bytes - LINE * (2 if piece.other_bytes else 1)
    row_pieces, piece_columns, units = 1, columns, columns // _width(piece, path)
    if piece.other_bytes:
        row_pieces, piece_columns = _panels(piece, path, room, machine)
    elif columns * size > room or not sharings(units, units, _counts(path, machine, True), machine):
        return _in_parts(piece, path, room, machine) or _direct(layout)
    piece_rows = 1 if row_pieces > 1 else min(rows, room // (columns * size))
    most = min(machine.most_pieces // row_pieces * piece_rows, machine.most_rows)
    span = piece_rows * piece_columns * piece.weight_bytes
    other_offset = round_up(span + LINE, LINE) if piece.other_bytes else 0
    staged = Staged(path, 1, 1, piece_rows, row_pieces, piece_columns, other_offset, 1, most)
    return staged if most else _direct(layout)


def _slot_bytes(pieces: Sequence[Piece], paths: Sequence[int], room: int, machine: Machine) -> int:
    """The size at which slots hold most: rows must be whole, so some of each is empty."""
    most = min(SLOT_BYTES[1], room // FEWEST_STREAM_SLOTS // 128 * 128)
    best = (-1.0, most)
    for size in range(most, min(SLOT_BYTES[0], most) - 1, -KB):
        held = 0.0
        for piece, path in zip(pieces, paths, strict=True):
            s = _staged(piece, path, size, machine)
            if s.path != DIRECT:
                elements = piece.layout.rows * piece.layout.columns
                span = s.piece_rows * s.piece_columns * (piece.weight_bytes + piece.other_bytes)
                # A small layer leaves its slots half empty at any size.
                whole = piece.layout.rows * s.row_pieces <= s.piece_rows
                held += elements * (1.0 if whole else span / size)
        if held > best[0]:
            best = (held, size)
    return best[1]


def stage(pieces: Sequence[Piece], machine: Machine, room: int) -> Staging:
    """How the layers of one launch use ``room`` bytes of shared memory."""
    paths = [on_path(p, machine) for p in pieces]
    if all(path == DIRECT for path in paths):
        return Staging([_direct(p.layout) for p in pieces], 128, 1, 0)
    size = _slot_bytes(pieces, paths, room, machine)
    layers = [_staged(p, path, size, machine) for p, path in zip(pieces, paths, strict=True)]
    slots = min(machine.most_slots, room // size)
    # What is worked on at a time beside what is in flight.
    backward = any(p.other_bytes for p in pieces)
    held = 1 if backward else max(s.row_pieces for s in layers)
    stream = min(slots, max(FEWEST_STREAM_SLOTS, held - -IN_FLIGHT // size))
    return Staging(layers, size, stream, slots - stream)


def cut_staged(work: Work, config: LaunchConfig, most_rows: int) -> LayerTiles:
    """The cut of a layer whose slabs have at most ``most_rows`` rows."""
    tiles = cut(work, config)
    if tiles.slab_rows <= most_rows:
        return tiles
    row_bytes = work.columns * work.element_bytes
    limited = replace(
        config, tile_bytes=most_rows * row_bytes, min_rows=1, max_slabs=max(1, work.rows)
    )
    return cut(work, limited)


def settle(staged: Staged, piece: Piece, slab_rows: int, machine: Machine) -> Staged:
    """Pieces of like size for slabs of ``slab_rows``, and who owns which columns of them."""
    if staged.path == DIRECT or (staged.row_pieces > 1 and not piece.other_bytes):
        return staged
    n = -(-slab_rows // staged.piece_rows)
    rows = -(-slab_rows // n)
    width = _width(piece, staged.path)
    units = staged.piece_columns // width
    last = piece.layout.columns // width - (staged.row_pieces - 1) * units
    ways = sharings(units, last, _counts(staged.path, machine, True), machine)
    way = min(ways, key=lambda way: _cycles(way, slab_rows, rows, machine))
    return staged._replace(vectors=way.vectors, group_warps=way.group_warps, piece_rows=rows)
