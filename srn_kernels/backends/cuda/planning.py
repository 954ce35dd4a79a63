"""From the layers of a call to what csrc/cuda/plan.h describes: records, tiles, sizes.

Runs once for each set of shapes, strides, dtypes and places; the extension keeps the result.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch

from srn_kernels.backends.tiling.config import LaunchConfig
from srn_kernels.backends.tiling.layout import Layout, make_layout
from srn_kernels.backends.tiling.schedule import Phase, Work, order
from srn_kernels.backends.tiling.staging import (
    DIRECT,
    Machine,
    Piece,
    Staging,
    cut_staged,
    on_path,
    settle,
    stage,
)

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = range(4)  # as Type in plan.h
BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT64: 8}
MOST_OF_FEWEST_ROWS = 8
FEWEST_SLABS = 2.5  # for each SM: rounding to whole rows leaves two
# Percent of L2, for models beyond it: producers run ahead (python -m benchmarks gpu events).
LOOKAHEAD = 56
RECORD = struct.Struct("=2q24i")


class Record(NamedTuple):
    """As in plan.h."""

    round: int
    scratch: int
    rows: int
    columns: int
    inner: int
    column_of: int
    slab_rows: int
    slabs: int
    column_width: int
    column_tiles: int
    arrivals: int
    passes: int
    iterations: int
    stats_row: int
    type: int
    other_type: int
    path: int  # from here to other_offset as in Staged; flat, because RECORD packs it
    vectors: int
    group_warps: int
    piece_rows: int
    row_pieces: int
    piece_columns: int
    other_offset: int
    first_protected: int
    gain_type: int
    through: int


class Layer(NamedTuple):
    """One layer of a call, as bindings.cpp describes it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dim: int
    type: int
    other: int  # of W_hat; in backward of G
    aligned: bool  # every pointer is a multiple of four of its elements
    iterations: int
    offset: int  # of u in the round's state
    row: int  # of the statistics
    gain_type: int  # of its gain or the gain's gradient, if it has one
    through: bool  # see Scaling in csrc/scalars.h


_NUMBERS = len(Layer._fields) - 2  # all but shape and strides


@dataclass(frozen=True)
class Blueprint:
    """What the extension makes a plan of; bytes are C arrays of plan.h's types."""

    records: bytes
    tiles: bytes
    columns: bytes
    slot_bytes: int
    stream_slots: int
    resident_slots: int
    ctas: int


def layers_of(words: Sequence[int]) -> Iterator[Layer]:
    """The layers in a plan's key; see describe() in bindings.cpp."""
    at = 0
    while at < len(words):
        n, *numbers = words[at : at + _NUMBERS + 1]
        at += _NUMBERS + 1
        yield Layer(tuple(words[at : at + n]), tuple(words[at + n : at + 2 * n]), *numbers)
        at += 2 * n


def config_for(
    processors: int, l2_bytes: int, shared_bytes: int, model_bytes: int, backward: bool
) -> LaunchConfig:
    """The launch's parameters for a device."""
    sizes = (processors, l2_bytes, shared_bytes, model_bytes, backward)
    config = LaunchConfig.for_device(*sizes, FEWEST_SLABS)
    if model_bytes > l2_bytes:
        config = replace(config, lookahead_bytes=l2_bytes * LOOKAHEAD // 100)
    return config


@functools.cache
def device_config(device: int, model_bytes: int, backward: bool) -> tuple[LaunchConfig, int]:
    """The launch's parameters, and the shared memory of a CTA."""
    p = torch.cuda.get_device_properties(device)
    sizes = (p.multi_processor_count, p.L2_cache_size, p.shared_memory_per_block_optin)
    return config_for(*sizes, model_bytes, backward), p.shared_memory_per_block_optin


ConfigOf = Callable[[int, int, bool], tuple[LaunchConfig, int]]


def plan(key: Sequence[int], machine: Machine, config_of: ConfigOf | None = None) -> Blueprint:
    """Cuts and orders the layers of ``key``: (device, backward, float64, then the layers).

    config_of: in place of :func:`device_config`, for devices that are not here.
    """
    device, backward, float64 = key[0], bool(key[1]), bool(key[2])
    layers = list(layers_of(key[3:]))
    layouts = [make_layout(x.shape, x.strides, x.dim) for x in layers]
    element_bytes = [BYTES[x.type] + (BYTES[x.other] if backward else 0) for x in layers]
    total = sum(y.rows * y.columns * b for y, b in zip(layouts, element_bytes, strict=True))
    config, shared_bytes = (config_of or device_config)(device, total, backward)
    # A CTA adds up what its slab gives to t in registers; in backward nothing is added up.
    config = replace(
        config,
        min_rows=1 if backward else min(MOST_OF_FEWEST_ROWS, config.min_rows),
        max_slabs=max(config.max_slabs, 3 * config.programs),
    )
    pieces = [
        Piece(y, BYTES[x.type], BYTES[x.other] if backward else 0, x.aligned and _vectors(x))
        for x, y in zip(layers, layouts, strict=True)
    ]
    staging = stage(pieces, machine, shared_bytes - machine.control_bytes[float64])
    works = [
        Work(
            y.rows,
            y.columns,
            size,
            staged.block_rows,
            1 if backward or x.iterations == 0 else max(0, x.iterations),
            not backward and x.iterations > 0,
        )
        for x, y, size, staged in zip(layers, layouts, element_bytes, staging.layers, strict=True)
    ]
    cuts = [
        cut_staged(work, config, staged.most_rows)
        for work, staged in zip(works, staging.layers, strict=True)
    ]
    settled = [
        settle(x, piece, c.slab_rows, machine)
        for x, piece, c in zip(staging.layers, pieces, cuts, strict=True)
    ]
    tiles = array("i")
    for tile in order(cuts, config):
        tiles.extend((tile.layer, OPS[tile.phase], tile.index, tile.wait))
    records, columns = bytearray(), array("i")
    for x, y, cut, staged in zip(layers, layouts, cuts, settled, strict=True):
        record = Record(
            x.offset,
            0,  # where its workspace starts: the extension knows the sizes
            y.rows,
            y.columns,
            y.inner,
            _add_table(columns, y),
            cut.slab_rows,
            cut.slabs,
            cut.column_width,
            cut.column_tiles,
            cut.arrivals,
            cut.passes,
            max(0, x.iterations),
            x.row,
            x.type,
            x.other,
            staged.path,
            staged.vectors,
            staged.group_warps,
            staged.piece_rows,
            staged.row_pieces,
            staged.piece_columns,
            staged.other_offset,
            cut.first_protected,
            x.gain_type,
            x.through,
        )
        records += RECORD.pack(*record)
    return _blueprint(bytes(records), tiles, columns, staging, config)


kernels: Machine | None = None  # those that are installed


@functools.lru_cache(maxsize=4096)
def is_direct(shape: tuple[int, ...], strides: tuple[int, ...], dim: int, size: int) -> bool:
    """Whether a forward reads such a weight, of elements of ``size`` bytes, past shared memory."""
    try:
        layout = make_layout(shape, strides, dim)
    except ValueError:  # not dense: what is read is a contiguous copy
        layout = make_layout(shape, torch.empty(shape, device="meta").stride(), dim)
    return on_path(Piece(layout, size, 0, True), kernels) == DIRECT


def _vectors(layer: Layer) -> bool:
    """Whether the pair of types is compiled in: others are read by single elements."""
    return layer.type == layer.other or (layer.type == FLOAT32 and layer.other != FLOAT64)


OPS = {Phase.SLAB: 0, Phase.COLUMNS: 1, Phase.RESCALE: 2}  # as Op in plan.h


def _add_table(columns: array, layout: Layout) -> int:
    if layout.column_of is None:
        return -1
    start = len(columns)
    columns.extend(layout.column_of)
    return start


def _blueprint(
    records: bytes, tiles: array, columns: array, staging: Staging, config: LaunchConfig
) -> Blueprint:
    n_tiles = len(tiles) // 4
    return Blueprint(
        records,
        tiles.tobytes(),
        columns.tobytes(),
        staging.slot_bytes,
        staging.stream_slots,
        staging.resident_slots,
        max(1, min(config.programs, n_tiles)),
    )


def install(module: ModuleType) -> None:
    """Lets the extension ask for plans."""
    sizes = module.layout()
    assert sizes["record_bytes"] == RECORD.size
    global kernels
    kernels = machine = Machine(
        consumer_warps=sizes["consumer_warps"],
        vectors=tuple(sizes["vectors"]),
        scalars=tuple(sizes["scalars"]),
        part_vectors=sizes["part_vectors"],
        most_rows=sizes["most_rows"],
        most_slots=sizes["max_slots"],
        most_pieces=sizes["max_pieces"],
        control_bytes=(module.control_bytes(False), module.control_bytes(True)),
    )
    is_direct.cache_clear()
    module.set_planner(lambda key: plan(key, machine))
