"""Which tile when: the work list of one launch, as plain data. Needs neither Triton nor a GPU.

Workers (CTAs) take the tiles of the list in order, one ticket each. Every layer has one counter.

slab      part of s = W v, a share of t = W^T s and of |W|_F^2 from the same bytes; adds 1
columns   t for a range of columns, the shares added in fixed order; adds 1
rescale   W_hat = a W + b u v^T for the rows of one slab; adds nothing

Whoever brings the counter to the end of a pass also finishes the layer (norms, sigma, u, v, a, b)
and adds 1 more; what follows waits for that value. A tile thus waits for tiles with smaller tickets
only, and running workers hold those: the list finishes for any number of workers, one included. In
backward, "slab" gathers <G, W> and u^T G v, "rescale" writes dL/dW, and no columns are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from srn_kernels.backends.tiling.config import LaunchConfig

COLUMN_BLOCK = 128  # columns are added in ranges of this many


class Phase(IntEnum):
    SLAB = 0
    COLUMNS = 1
    RESCALE = 2


class Tile(NamedTuple):
    layer: int
    phase: Phase
    index: int
    wait: int  # value that the layer's counter must have reached


class Work(NamedTuple):
    """What the schedule needs to know of a layer."""

    rows: int
    columns: int
    element_bytes: (
        int  # read by a tile for each element: the weight's, in backward the gradient's too
    )
    block_rows: int = 1  # tiles take multiples of it where they can
    passes: int = 1  # over the weight before it is rescaled; 0: rescale alone
    partial_sums: bool = True  # each pass makes t = W^T s


class LayerTiles(NamedTuple):
    """How a layer is cut."""

    passes: int
    slab_rows: int
    slabs: int
    column_width: int  # columns of a column tile
    column_tiles: int  # 0: the last slab adds the partial sums itself
    slab_bytes: int
    first_protected: int  # slabs before it are not worth keeping in L2

    @property
    def arrivals(self) -> int:
        """What a pass adds to the counter: its tiles, and one for the finished layer."""
        return self.slabs + self.column_tiles + 1


class Schedule(NamedTuple):
    layers: list[LayerTiles]
    tiles: list[Tile]


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def cut(work: Work, config: LaunchConfig) -> LayerTiles:
    row_bytes = work.columns * work.element_bytes
    rows = max(config.tile_bytes // row_bytes, config.min_rows, -(-work.rows // config.max_slabs))
    rows = min(round_up(rows, work.block_rows), work.rows)
    slabs = -(-work.rows // rows)
    width, tiles = work.columns, 0
    if work.partial_sums and work.passes and slabs * work.columns * 4 > config.column_bytes:
        width = max(1, config.column_bytes // (slabs * 4 * COLUMN_BLOCK)) * COLUMN_BLOCK
        tiles = -(-work.columns // width)
    beyond = work.rows * row_bytes - config.protected_bytes
    first_protected = min(slabs, -(-beyond // (rows * row_bytes))) if beyond > 0 else 0
    return LayerTiles(work.passes, rows, slabs, width, tiles, rows * row_bytes, first_protected)


class _Group(NamedTuple):
    ready_at: int
    layer: int
    number: int  # of the pass; `passes` means rescale
    tiles: Iterator[Tile]


def _pass(layer: int, number: int, cut_: LayerTiles) -> Iterator[Tile]:
    """The slabs of one pass, or the rescale tiles: last rows first, which L2 still holds."""
    wait = number * cut_.arrivals
    if number < cut_.passes:
        return (Tile(layer, Phase.SLAB, i, wait) for i in range(cut_.slabs))
    return (Tile(layer, Phase.RESCALE, i, wait) for i in reversed(range(cut_.slabs)))


def order(layers: Sequence[LayerTiles], config: LaunchConfig) -> list[Tile]:
    """The list: model order, later phases of a layer alternating with the slabs of later layers.

    Slabs load device memory while rescale tiles load L2: alternated they overlap. A phase is
    listed once ``lookahead_bytes`` of other tiles stand before it, so that it rarely waits, and
    soon after, so that its bytes are still in L2.
    """
    tiles: list[Tile] = []
    first = ((layer, tile) for layer, c in enumerate(layers) for tile in _pass(layer, 0, c))
    columns: deque[_Group] = deque()
    later: deque[_Group] = deque()
    listed = credit = 0
    fresh = next(first, None)

    def emit(tile: Tile, number: int) -> None:
        nonlocal listed
        c = layers[tile.layer]
        tiles.append(tile)
        listed += c.slab_bytes
        if tile.phase != Phase.SLAB or tile.index != c.slabs - 1:
            return
        wait = number * c.arrivals + c.slabs
        if c.column_tiles:
            ready = listed + config.lookahead_bytes // 4
            group = (Tile(tile.layer, Phase.COLUMNS, i, wait) for i in range(c.column_tiles))
            columns.append(_Group(ready, tile.layer, number, group))
        ready = listed + config.lookahead_bytes
        group = _pass(tile.layer, number + 1, c)
        later.append(_Group(ready, tile.layer, number + 1, group))

    def emit_later() -> None:
        nonlocal credit
        group = later[0]
        tile = next(group.tiles, None)
        if tile is None:
            later.popleft()
        else:
            emit(tile, group.number)
            credit -= layers[tile.layer].slab_bytes

    while fresh or columns or later:
        due = columns[0].ready_at if columns else 0
        if columns and (due <= listed or (not fresh and due <= later[0].ready_at)):
            tiles.extend(columns.popleft().tiles)
        elif later and (not fresh or (credit > 0 and later[0].ready_at <= listed)):
            emit_later()
        else:
            layer, tile = fresh
            emit(tile, 0)
            credit = min(credit, 0) + config.follow_ratio * layers[layer].slab_bytes
            fresh = next(first, None)
    return tiles


def build(works: Sequence[Work], config: LaunchConfig) -> Schedule:
    layers = [cut(work, config) for work in works]
    return Schedule(layers, order(layers, config))


def check(schedule: Schedule) -> None:
    """Raises ValueError unless the list is complete and every tile waits on earlier tiles only."""
    counters = [0] * len(schedule.layers)
    seen: set[Tile] = set()
    for ticket, tile in enumerate(schedule.tiles):
        c = schedule.layers[tile.layer]
        if tile in seen:
            raise ValueError(f"ticket {ticket} repeats {tile}")
        seen.add(tile)
        if counters[tile.layer] < tile.wait:
            raise ValueError(
                f"ticket {ticket}, {tile}, waits for {tile.wait}; the tiles before it reach "
                f"{counters[tile.layer]}"
            )
        if tile.phase != Phase.RESCALE:
            counters[tile.layer] += 1
            if counters[tile.layer] % c.arrivals == c.arrivals - 1:
                counters[tile.layer] += 1
    for layer, c in enumerate(schedule.layers):
        rescales = sum(
            Tile(layer, Phase.RESCALE, i, c.passes * c.arrivals) in seen for i in range(c.slabs)
        )
        if counters[layer] != c.passes * c.arrivals or rescales != c.slabs:
            raise ValueError(
                f"layer {layer} ends at {counters[layer]} of {c.passes * c.arrivals} arrivals and "
                f"{rescales} of {c.slabs} rescale tiles"
            )
