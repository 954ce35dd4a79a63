"""The tile list of one launch: run by simulated workers, without Triton and without a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from srn_kernels.backends.tiling.config import KB, MB, LaunchConfig
from srn_kernels.backends.tiling.schedule import (
    Phase,
    Schedule,
    Tile,
    Work,
    build,
    check,
    order,
)

CONFIG = LaunchConfig(
    programs=8,
    tile_bytes=4 * KB,
    min_rows=2,
    max_slabs=12,
    column_bytes=2 * KB,
    lookahead_bytes=24 * KB,
    protected_bytes=32 * KB,
)
MODELS = {
    "one_row": [Work(1, 7, 4)],
    "one_tile": [Work(4, 16, 4)],
    "tall": [Work(4096, 3, 2, block_rows=16)],
    "mixed": [
        Work(64, 27, 4),
        Work(96, 512, 4),
        Work(1, 300, 4),
        Work(300, 1, 2),
        Work(40, 700, 2),
        Work(128, 64, 4),
    ],
    "many_small": [Work(12 + i % 3, 36 + i, 4) for i in range(40)],
    "three_passes": [Work(96, 512, 4, passes=3), Work(8, 16, 4, passes=3), Work(64, 64, 2)],
    "evaluation": [Work(96, 512, 4, partial_sums=False), Work(64, 27, 4, partial_sums=False)],
    "repeat": [Work(96, 512, 4, passes=0), Work(64, 27, 4, passes=1)],
}


class ProtocolError(Exception):
    pass


class Simulation:
    """The kernel's protocol, one step at a time, with a memory that knows what was written."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.polling: dict[int, tuple[int, int]] = {}  # ticket -> layer, wait
        self.ticket = self.exits = 0
        self.counters = [0] * len(schedule.layers)

    def launch(self, workers: int, resident: int, rng: random.Random) -> None:
        """Runs ``workers`` workers, at most ``resident`` at a time, interleaved at random."""
        self.shares: set[tuple[int, int, int]] = set()
        self.sums: set[tuple[int, int, int]] = set()
        self.finished = [0] * len(self.schedule.layers)
        self.rescaled: set[tuple[int, int]] = set()
        waiting = [self.worker(workers) for _ in range(workers)]
        running: list[Iterator[bool]] = []
        idle = 0  # steps since anything but polling happened
        while running or waiting:
            while waiting and len(running) < resident:
                running.append(waiting.pop())
            at = rng.randrange(len(running))
            try:
                progress = next(running[at])
            except StopIteration:
                running.pop(at)
                progress = True
            idle = 0 if progress else idle + 1
            # Every worker polled in vain, several times: nobody can bring a counter forward.
            if idle > 50 * len(running) and not self.can_move():
                raise ProtocolError("deadlock")
        if self.ticket or self.exits or any(self.counters):
            raise ProtocolError("the counters are not clean after the launch")
        for i, cut in enumerate(self.schedule.layers):
            if sum(layer == i for layer, _ in self.rescaled) != cut.slabs:
                raise ProtocolError(f"layer {i} is not complete")

    def can_move(self) -> bool:
        return any(self.counters[layer] >= wait for layer, wait in self.polling.values())

    def worker(self, workers: int) -> Iterator[bool]:
        tiles, layers = self.schedule.tiles, self.schedule.layers
        while True:
            ticket, self.ticket = self.ticket, self.ticket + 1
            yield True
            if ticket >= len(tiles):
                break
            tile = tiles[ticket]
            cut = layers[tile.layer]
            self.polling[ticket] = (tile.layer, tile.wait)
            while self.counters[tile.layer] < tile.wait:
                yield False
            del self.polling[ticket]
            number = tile.wait // cut.arrivals
            if tile.phase == Phase.RESCALE:
                self.need(self.finished[tile.layer] >= cut.passes, tile)
                yield True
                self.rescaled.add((tile.layer, tile.index))
                continue
            if tile.phase == Phase.SLAB:
                self.need(self.finished[tile.layer] >= number, tile)
                yield True
                self.shares.add((tile.layer, number, tile.index))
            else:
                self.need_shares(tile.layer, number, tile)
                yield True
                self.sums.add((tile.layer, number, tile.index))
            yield True
            self.counters[tile.layer] += 1
            arrived = self.counters[tile.layer]
            yield True
            if arrived == (number + 1) * cut.arrivals - 1:
                self.need_shares(tile.layer, number, tile)
                for i in range(cut.column_tiles):
                    self.need((tile.layer, number, i) in self.sums, tile)
                yield True
                self.finished[tile.layer] = number + 1
                yield True
                self.counters[tile.layer] += 1
        self.exits += 1
        if self.exits == workers:
            self.ticket = self.exits = 0
            self.counters = [0] * len(self.counters)

    def need_shares(self, layer: int, number: int, tile: Tile) -> None:
        for i in range(self.schedule.layers[layer].slabs):
            self.need((layer, number, i) in self.shares, tile)

    @staticmethod
    def need(written: bool, tile: Tile) -> None:
        if not written:
            raise ProtocolError(f"{tile} reads what is not yet written")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 32, 300])
def test_any_number_of_workers(name: str, workers: int) -> None:
    schedule = build(MODELS[name], CONFIG)
    check(schedule)
    for seed in range(3):
        rng = random.Random(seed * 1000 + workers)
        simulation = Simulation(schedule)
        for _ in range(2):  # the second launch starts from the counters the first one left
            simulation.launch(workers, rng.randint(1, workers), rng)


def broken(schedule: Schedule, how: str) -> Schedule:
    tiles = list(schedule.tiles)
    if how == "shuffled":
        random.Random(1).shuffle(tiles)
    elif how == "reversed":
        tiles.reverse()
    elif how == "tile missing":
        tiles.remove(next(t for t in tiles if t.phase == Phase.SLAB))
    elif how == "columns too early":
        at = next(i for i, t in enumerate(tiles) if t.phase == Phase.COLUMNS)
        tiles.insert(0, tiles.pop(at))
    elif how == "waits for too much":
        at = next(i for i, t in enumerate(tiles) if t.phase == Phase.RESCALE)
        tiles[at] = tiles[at]._replace(wait=tiles[at].wait + 1)
    return schedule._replace(tiles=tiles)


@pytest.mark.parametrize(
    "how", ["shuffled", "reversed", "tile missing", "columns too early", "waits for too much"]
)
def test_a_broken_order_is_caught(how: str) -> None:
    schedule = broken(build(MODELS["mixed"], CONFIG), how)
    with pytest.raises(ValueError):
        check(schedule)
    with pytest.raises(ProtocolError):
        Simulation(schedule).launch(1, 1, random.Random(0))


@pytest.mark.parametrize("phase", [Phase.COLUMNS, Phase.RESCALE])
def test_a_wait_that_is_too_short_is_caught(phase: Phase) -> None:
    schedule = build(MODELS["mixed"], CONFIG)
    tiles = [t._replace(wait=t.wait - 1) if t.phase == phase else t for t in schedule.tiles]
    with pytest.raises(ProtocolError):
        for seed in range(40):
            Simulation(schedule._replace(tiles=tiles)).launch(64, 64, random.Random(seed))


def test_every_element_is_covered_once() -> None:
    for works in MODELS.values():
        schedule = build(works, CONFIG)
        for work, cut in zip(works, schedule.layers, strict=True):
            assert (cut.slabs - 1) * cut.slab_rows < work.rows <= cut.slabs * cut.slab_rows
            assert cut.slabs <= CONFIG.max_slabs
            if cut.column_tiles:
                assert cut.column_width * (cut.column_tiles - 1) < work.columns
                assert work.columns <= cut.column_width * cut.column_tiles


def test_later_phases_follow_at_a_distance_and_in_reverse() -> None:
    works = [Work(512, 1024, 4) for _ in range(40)]  # 2 MB each
    config = LaunchConfig(programs=132)
    schedule = build(works, config)
    check(schedule)
    listed, last_slab, gaps = 0, {}, {}
    for tile in schedule.tiles:
        bytes_ = schedule.layers[tile.layer].slab_bytes
        if tile.phase == Phase.RESCALE and tile.layer not in gaps:
            gaps[tile.layer] = listed - last_slab[tile.layer]
        listed += bytes_ if tile.phase != Phase.COLUMNS else 0
        if tile.phase == Phase.SLAB:
            last_slab[tile.layer] = listed
    early = [gaps[i] for i in range(20)]
    assert min(early) >= config.lookahead_bytes
    # The slabs listed before the first rescale stand closer than what is listed after it.
    assert max(early) <= config.lookahead_bytes * (1 + 1 / config.follow_ratio) + 2 * MB
    rescales = [t.index for t in schedule.tiles if t.layer == 0 and t.phase == Phase.RESCALE]
    assert rescales == sorted(rescales, reverse=True)


def test_a_layer_beyond_l2_protects_its_end_only() -> None:
    cut = build([Work(1536, 13824, 4)], LaunchConfig(programs=132)).layers[0]
    protected = (cut.slabs - cut.first_protected) * cut.slab_bytes
    assert 35 * MB < protected < 37 * MB
    assert build([Work(512, 1024, 4)], LaunchConfig(programs=132)).layers[0].first_protected == 0


def test_sizes_past_32_bits() -> None:
    work = Work(70_000, 65_536, 4)  # 18 GB: by arithmetic only
    cut = build([work], LaunchConfig(programs=132)).layers[0]
    assert (cut.slabs - 1) * cut.slab_rows < work.rows <= cut.slabs * cut.slab_rows


def test_order_needs_no_lookahead_to_be_valid() -> None:
    for lookahead in (0, 1, 10**12):
        for ratio in (0, 1, 100):
            config = replace(CONFIG, lookahead_bytes=lookahead, follow_ratio=ratio)
            for works in MODELS.values():
                check(build(works, config))
    assert order([], CONFIG) == []
