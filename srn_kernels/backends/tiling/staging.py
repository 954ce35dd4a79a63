"""How slabs pass through a CTA's shared memory: pieces, slots, and which warps share a row.

For kernels that keep slabs on chip (csrc/cuda). A piece is what is copied at a time: as many whole
rows as a slot holds, or in backward, where rows need not be whole, a part of one. Some slots carry
the stream of pieces, the others keep slabs until they are rescaled. Host data only.
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
SLOT_BYTES = 32 * KB  # about; two in flight cover the latency of device memory
FEWEST_SLOTS = 6  # where shared memory is short, slots are smaller
SHIFT = 16  # a span starts as far from a 16-byte line as in global memory


class Machine(NamedTuple):
    """Constants of the kernels, as compiled; names as in csrc/cuda/plan.h."""

    consumer_warps: int
    few_vectors: int
    many_vectors: int
    scalar_vectors: int
    most_slots: int
    most_pieces: int
    control_bytes: tuple[int, int]  # of shared memory beside the slots: float32, float64


class Piece(NamedTuple):
    """What staging depends on."""

    layout: Layout
    weight_bytes: int  # of an element
    other_bytes: int  # of an element of G; 0 in forward
    aligned: bool  # pointers are multiples of four elements


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
    v_bytes: int


def _path(piece: Piece, machine: Machine) -> int:
    """Whether, and how wide, a layer can be read from shared memory."""
    layout, lanes = piece.layout, machine.consumer_warps * WARP
    if layout.outer > 1:
        return DIRECT
    if piece.aligned and layout.columns % 4 == 0:
        fits = piece.other_bytes or layout.columns <= 4 * lanes * machine.many_vectors
        return VECTORS if fits else DIRECT
    fits = piece.other_bytes or layout.columns <= lanes * machine.scalar_vectors
    return SCALARS if fits else DIRECT


def _groups(units: int, vectors: int, machine: Machine) -> int:
    """Warps that share a row, so that a thread has ``vectors`` of its ``units``; 0: too many."""
    warps = -(-units // (WARP * vectors))
    return warps if warps <= machine.consumer_warps else 0


def _sharing(path: int, columns: int, piece_rows: int, machine: Machine) -> tuple[int, int]:
    """(vectors of a thread, warps of a row): the fewest steps for a piece, barriers counted."""
    if path == SCALARS:
        return machine.scalar_vectors, _groups(columns, machine.scalar_vectors, machine)
    best = (0, 0, 0)
    for vectors, batch in ((machine.few_vectors, 4), (machine.many_vectors, 1)):
        warps = _groups(columns // 4, vectors, machine)
        if not warps:
            continue
        groups = machine.consumer_warps // warps
        rows = min(batch, -(-piece_rows // groups))
        barrier = 8 if warps > 1 else 2  # in vectors' worth of time
        cost = -(-piece_rows // (groups * batch)) * (rows * vectors + barrier)
        if not best[0] or cost < best[0]:
            best = (cost, vectors, warps)
    return best[1], best[2]


def _staged(piece: Piece, path: int, slot_bytes: int, machine: Machine) -> Staged:
    layout = piece.layout
    rows, columns = layout.rows, layout.columns
    if path == DIRECT:
        # Rows that lie side by side are read together.
        block = max(1, min(rows, WARP // layout.inner)) if layout.outer > 1 else 1
        return Staged(DIRECT, 0, 1, 1, 1, columns, 0, block, rows)
    size = piece.weight_bytes + piece.other_bytes
    room = slot_bytes - SHIFT * (2 if piece.other_bytes else 1)
    piece_rows, row_pieces, piece_columns = max(1, room // (columns * size)), 1, columns
    piece_rows = min(piece_rows, rows)
    if columns * size > room:  # backward only
        piece_columns = room // size // 8 * 8
        row_pieces = -(-columns // piece_columns)
    span = piece_rows * piece_columns * piece.weight_bytes
    vectors, warps = 0, 1
    if not piece.other_bytes:
        vectors, warps = _sharing(path, columns, piece_rows, machine)
    most = machine.most_pieces // row_pieces * piece_rows
    other_offset = round_up(span + SHIFT, SHIFT) if piece.other_bytes else 0
    return Staged(
        path,
        vectors,
        warps,
        piece_rows,
        row_pieces,
        piece_columns,
        other_offset,
        piece_rows,
        max(1, most),
    )


def _usual_slot(room: int) -> int:
    return min(SLOT_BYTES, room // FEWEST_SLOTS // 128 * 128)


def _slot_bytes(pieces: Sequence[Piece], room: int) -> int:
    """The size at which the slots hold most: rows must be whole, so some of each is empty."""
    usual = _usual_slot(room)
    widest = max(p.layout.columns * p.weight_bytes for p in pieces)
    least = round_up(max(widest, usual // 2) + SHIFT, 128)
    sizes = [p.layout.rows * p.layout.columns * p.weight_bytes for p in pieces]
    best = (0.0, least)
    for size in range(least, max(least, 2 * usual) + 1, 1024):
        slots = room // size
        held = 0.0
        for p, weight in zip(pieces, sizes, strict=True):
            row = p.layout.columns * p.weight_bytes
            held += weight * min((size - SHIFT) // row * row, weight)
        # Fewer than four slots would be streams alone.
        score = held * slots * (1.0 if slots >= 4 else 0.5) / sum(sizes)
        if score > best[0]:
            best = (score, size)
    return best[1]


def stage(pieces: Sequence[Piece], machine: Machine, room: int, staged: bool = True) -> Staging:
    """How the layers of one launch use ``room`` bytes of shared memory."""
    backward = any(p.other_bytes for p in pieces)
    paths = [_path(p, machine) if staged else DIRECT for p in pieces]
    v_bytes = 0
    if not backward:
        # v of the widest rows lies in shared memory too; too wide rows are read directly.
        for i, (p, path) in enumerate(zip(pieces, paths, strict=True)):
            row = p.layout.columns * p.weight_bytes + SHIFT
            few = _groups(p.layout.columns // 4, machine.few_vectors, machine)
            v = 0 if path == SCALARS or few else 4 * p.layout.columns
            if path != DIRECT and round_up(v, 128) + 2 * round_up(row, 128) > room:
                paths[i] = DIRECT
    on_chip = [p for p, path in zip(pieces, paths, strict=True) if path != DIRECT]
    if not on_chip:
        layers = [_staged(p, DIRECT, 0, machine) for p in pieces]
        return Staging(layers, 128, 1, 0, 0)
    if backward:
        slot = _usual_slot(room)
        layers = [_staged(p, path, slot, machine) for p, path in zip(pieces, paths, strict=True)]
    else:
        wide = [p.layout.columns for p, x in zip(pieces, paths, strict=True) if x == VECTORS]
        v_bytes = round_up(4 * max(wide, default=0), 128)
        slot = _slot_bytes(on_chip, room - v_bytes)
        layers = [_staged(p, path, slot, machine) for p, path in zip(pieces, paths, strict=True)]
        if not any(x.vectors == machine.many_vectors for x in layers):
            v_bytes = 0
    slots = min(machine.most_slots, (room - v_bytes) // slot)
    stream = min(slots, 3 if slots >= 6 else 2)
    return Staging(layers, slot, stream, slots - stream, v_bytes)


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
