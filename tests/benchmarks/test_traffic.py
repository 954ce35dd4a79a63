"""The traffic model: its bounds, what holds of any cache, and its bytes against the kernels'."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.cases import workloads
from benchmarks.gpu.traffic import (
    BLOCK,
    DIRECTIONS,
    DOCUMENT,
    FIRST,
    L2,
    LAST,
    NORMAL,
    OUTPUTS,
    Machine,
    Replay,
    predict,
    stored,
    table,
)
from benchmarks.report import documents
from srn_kernels.backends import triton as backend
from srn_kernels.backends.tiling.config import KB, MB, LaunchConfig
from srn_kernels.backends.tiling.schedule import Phase

WORKLOADS = workloads.load()
H200 = Machine()
SMALL_LAYERS = [
    name for name, w in WORKLOADS.items() if max(r * c for r, c in w.shapes) * 4 <= 16 * MB
]


@pytest.mark.parametrize("name", SMALL_LAYERS)
def test_layers_up_to_16_mb_stay_near_the_floor(name):
    shapes = WORKLOADS[name].shapes
    assert Replay(shapes, H200, backward=False).run().traffic <= 1.15
    assert Replay(shapes, H200, backward=True).run().traffic <= 1.25


def test_the_order_matters():
    """All slabs first reads every weight twice; the schedule's order does not."""
    shapes = [(1024, 2304)] * 16  # 151 MB
    replay = Replay(shapes, H200, backward=False)
    good = replay.run()
    replay.schedule.tiles.sort(key=lambda t: t.phase)  # stable: a valid order still
    bad = replay.run()
    assert good.traffic < 1.1
    assert bad.traffic > 1.35


@pytest.mark.parametrize("backward", [False, True])
def test_an_endless_cache_moves_the_floor_and_the_partial_sums(backward):
    shapes = [(1024, 1152), (256, 2304), (64, 27)]
    replay = Replay(shapes, replace(H200, l2_bytes=1 << 40), backward)
    prediction = replay.run()
    arrays = sum(
        c.slabs * w.columns * 4 + 2 * w.columns * 4 + 6 * BLOCK
        for c, w in zip(replay.schedule.layers, replay.design.works, strict=True)
    )
    moved = prediction.device_read + prediction.device_written
    assert prediction.floor_bytes <= moved <= prediction.floor_bytes + arrays


def test_no_cache_moves_every_access():
    replay = Replay([(1024, 2048)], replace(H200, l2_bytes=BLOCK), backward=True)
    # 5 passes over arrays of equal size where 3 are the floor.
    assert replay.run().traffic == pytest.approx(5 / 3, rel=0.02)


def test_priorities_and_write_back():
    cache = L2(3 * BLOCK)
    first, normal, last, more = (cache.array(BLOCK) for _ in range(4))
    cache.touch(last, BLOCK, LAST)
    cache.touch(normal, BLOCK, NORMAL)
    cache.touch(first, BLOCK, FIRST, write=True)
    cache.touch(more, BLOCK, LAST)  # evicts `first`, which is written back
    assert (cache.device_read, cache.device_written) == (3 * BLOCK, BLOCK)
    cache.touch(last, BLOCK, LAST)
    cache.touch(normal, BLOCK, NORMAL)
    assert cache.device_read == 3 * BLOCK
    cache.touch(first, BLOCK, FIRST)
    assert cache.device_read == 4 * BLOCK


class Counted:
    """Bytes that the interpreter's kernels load from and store to each array."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        self.ranges: dict[str, list[tuple[int, int]]] = {}
        self.loaded, self.stored = Counter(), Counter()
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(me, ptrs, mask, *rest):
            self.add(self.loaded, ptrs, mask)
            return load(me, ptrs, mask, *rest)

        def counted_store(me, ptrs, value, mask, *rest):
            self.add(self.stored, ptrs, mask)
            return store(me, ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    def watch(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.ranges[name] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]

    def add(self, counts: Counter, ptrs, mask) -> None:
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        for name, ranges in self.ranges.items():
            for begin, end in ranges:
                inside = (addresses >= begin) & (addresses < end)
                counts[name] += int(inside.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8


@pytest.mark.skipif("cpu" not in backend.DEVICES, reason="counts in Triton's interpreter")
def test_bytes_equal_those_of_the_triton_kernels(monkeypatch):
    from srn_kernels.backends.triton import launch
    from srn_kernels.core import ops
    from srn_kernels.maths.scalars import STATS

    config = LaunchConfig(
        programs=2, block=4096, tile_bytes=16 * KB, min_rows=4, column_bytes=3 * KB
    )
    monkeypatch.setattr(launch, "device_config", lambda *_: config)
    launch.plan_for.cache_clear()
    counted = Counted(monkeypatch)
    shapes = [(60, 260), (9, 1100), (40, 27), (50, 64)]
    weights, outs, grads, results = ([torch.randn(s) for s in shapes] for _ in range(4))
    for name, tensors in (("weight", weights), ("out", outs), ("grad", grads), ("result", results)):
        counted.watch(name, tensors)
    us, vs = [torch.randn(r) for r, _ in shapes], [torch.randn(c) for _, c in shapes]
    offsets, size = ops.state_layout(shapes)
    n = len(shapes)
    state, stats = torch.empty(size), torch.empty(n, len(STATS), dtype=torch.float64)
    settings = [4.0] * n, [1] * n, [0] * n, [1e-12] * n
    launch.normalize(weights, us, vs, outs, state, stats, offsets, *settings)
    forward = expected(Replay(shapes, H200, False, config=config))
    assert counted.loaded["weight"] == forward["weight", False]
    assert counted.stored["out"] == forward["out", True]
    assert counted.loaded["out"] == counted.stored["weight"] == 0
    counted.loaded.clear()
    launch.normalize_backward(grads, weights, state, stats, results, range(n), offsets, [0] * n)
    backward = expected(Replay(shapes, H200, True, config=config))
    assert counted.loaded["weight"] == backward["weight", False]
    assert counted.loaded["grad"] == backward["grad", False]
    assert counted.stored["result"] == backward["out", True]
    launch.plan_for.cache_clear()


def expected(replay: Replay) -> Counter:
    """Bytes by array and direction, as the model has them."""
    counts = Counter()
    for tile in replay.schedule.tiles:
        for access in replay.tile(tile):
            counts[access.array, access.write] += access.size
    return counts


def test_the_stored_predictions_are_those_of_this_source_and_the_document_shows_them():
    rows = stored()
    subjects = [(r.workload, r.output_dtype, r.direction) for r in rows]
    assert subjects == [(w, o, d) for o in OUTPUTS for w in WORKLOADS for d in DIRECTIONS]
    stamp = dict.fromkeys(("commit", "dirty", "date"), "")
    for name in SMALL_LAYERS[:3]:
        for output in OUTPUTS:
            now = predict(WORKLOADS[name], output, H200)
            then = [r for r in rows if (r.workload, r.output_dtype) == (name, output)]
            assert [replace(r, **stamp) for r in now] == [replace(r, **stamp) for r in then]
    assert not documents.difference(DOCUMENT, table(rows))


def test_partial_sums_are_written_and_read_once():
    replay = Replay([(1536, 6912), (96, 864)], H200, backward=False)
    counts = expected(replay)
    assert counts["shares", True] == counts["shares", False]
    tiles = [t for t in replay.schedule.tiles if t.phase == Phase.COLUMNS]
    assert len(tiles) == sum(c.column_tiles for c in replay.schedule.layers)
