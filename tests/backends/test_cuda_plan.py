"""What a CUDA launch is told: the sizes of its tables, and how slabs pass through shared memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import workloads
from srn_kernels.backends.cuda import planning
from srn_kernels.backends.tiling import staging
from srn_kernels.backends.tiling.config import KB, MB, LaunchConfig
from srn_kernels.backends.tiling.schedule import Phase, Schedule, Tile, check

# As plan.h has them; the extension's own figures are compared below where there is one.
MACHINE = staging.Machine(15, 2, 9, 4, 16, 32, (11 * KB, 18 * KB))
SHARED = 227 * KB
F32, BF16 = planning.FLOAT32, planning.BFLOAT16


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(device: int, model_bytes: int, backward: bool) -> tuple[LaunchConfig, int]:
        return LaunchConfig.for_device(132, 50 * MB, SHARED, model_bytes, backward), SHARED

    monkeypatch.setattr(planning, "device_config", config)


def key(shapes, backward=False, types=(F32, F32), iterations=1, aligned=True, dim=0):
    words = [0, int(backward), 0]
    for i, shape in enumerate(shapes):
        strides = torch.empty(shape, device="meta").stride()
        words += [len(shape), dim, *types, int(aligned), iterations, 0, i, *shape, *strides]
    return words


def unpacked(made: planning.Blueprint):
    """Records as dictionaries of plan.h's names, and tiles."""
    names = [
        "round",
        "scratch",
        "rows",
        "columns",
        "inner",
        "column_of",
        "slab_rows",
        "slabs",
        "column_width",
        "column_tiles",
        "arrivals",
        "passes",
        "iterations",
        "stats_row",
        "type",
        "other_type",
        "path",
        "vectors",
        "group_warps",
        "piece_rows",
        "row_pieces",
        "piece_columns",
        "other_offset",
        "first_protected",
    ]
    records = [dict(zip(names, x, strict=True)) for x in planning.RECORD.iter_unpack(made.records)]
    phases = {op: phase for phase, op in planning._OPS.items()}
    words = torch.frombuffer(bytearray(made.tiles), dtype=torch.int32).view(-1, 4).tolist()
    return records, [Tile(a, phases[b], c, d) for a, b, c, d in words]


@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (F32, BF16)])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", workloads.load())
def test_every_workload_fits_the_machine(name, backward, types):
    shapes = workloads.load()[name].shapes
    made = planning.plan(key(shapes, backward, types), MACHINE)
    records, tiles = unpacked(made)
    slots = made.stream_slots + made.resident_slots
    assert made.stream_slots >= 2 and slots <= MACHINE.most_slots
    assert made.slot_bytes % 128 == 0 and made.v_bytes % 128 == 0
    assert slots * made.slot_bytes + made.v_bytes + MACHINE.control_bytes[0] <= SHARED
    size, other = planning.BYTES[types[0]], planning.BYTES[types[1]] if backward else 0
    for r, shape in zip(records, shapes, strict=True):
        assert (r["rows"], r["columns"]) == shape
        assert r["slabs"] == -(-r["rows"] // r["slab_rows"])
        if r["path"] == staging.DIRECT:
            assert r["columns"] > 4 * 15 * 32 * 9
            continue
        pieces = -(-r["slab_rows"] // r["piece_rows"]) * r["row_pieces"]
        assert 1 <= pieces <= MACHINE.most_pieces
        assert r["row_pieces"] == 1 or (backward and r["piece_rows"] == 1)
        assert r["row_pieces"] * r["piece_columns"] >= r["columns"]
        span = r["piece_rows"] * r["piece_columns"]
        # A span is moved by up to 15 bytes, to lie in its slot as it lies in memory.
        if backward:
            assert r["other_offset"] % 16 == 0 and r["other_offset"] >= span * size + 15
            assert r["other_offset"] + span * other + 15 <= made.slot_bytes
        else:
            assert span * size + 15 <= made.slot_bytes
            lanes = r["group_warps"] * 32 * r["vectors"]
            width = 4 if r["path"] == staging.VECTORS else 1
            assert r["group_warps"] <= 15 and lanes * width >= r["columns"]
            if r["vectors"] == MACHINE.many_vectors:
                assert 4 * r["columns"] <= made.v_bytes
        assert r["path"] == (staging.VECTORS if r["columns"] % 4 == 0 else staging.SCALARS)
    # The list is complete, and tiles wait for earlier tiles only.
    cuts = [
        planning.cut_staged(
            planning.Work(r["rows"], r["columns"], size + other, 1, 1, not backward),
            LaunchConfig.for_device(132, 50 * MB, SHARED, 0, backward),
            r["slab_rows"],
        )._replace(slab_rows=r["slab_rows"], slabs=r["slabs"], column_tiles=r["column_tiles"])
        for r in records
    ]
    check(Schedule(cuts, tiles))


def test_small_models_stay_in_shared_memory():
    shapes = workloads.load()["sngan_cifar_resnet_D"].shapes
    made = planning.plan(key(shapes), MACHINE)
    records, tiles = unpacked(made)
    slabs = [t for t in tiles if t.phase == Phase.SLAB]
    pieces = max(
        -(-r["slab_rows"] // r["piece_rows"]) for r in records if r["path"] != staging.DIRECT
    )
    assert -(-len(slabs) // 132) * pieces <= made.resident_slots


@pytest.mark.parametrize(
    "columns, aligned, path",
    [
        (1152, True, staging.VECTORS),
        (1152, False, staging.SCALARS),
        (27, True, staging.SCALARS),
        (1921, True, staging.DIRECT),
        (13824, True, staging.VECTORS),
        (16384, True, staging.VECTORS),
        (17284, True, staging.DIRECT),
    ],
)
def test_the_path_of_a_row(columns, aligned, path):
    (record,), _ = unpacked(planning.plan(key([(64, columns)], aligned=aligned), MACHINE))
    assert record["path"] == path


def test_rows_that_are_not_contiguous_are_read_directly():
    (record,), _ = unpacked(planning.plan(key([(64, 48, 3, 3)], dim=1), MACHINE))
    assert (record["path"], record["inner"], record["columns"]) == (staging.DIRECT, 9, 576)


def test_tables_of_columns_follow_each_other():
    strides = torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last).stride()
    words = [0, 0, 0]
    for i in range(2):
        words += [4, 0, F32, F32, 1, 1, 0, i, 8, 4, 3, 3, *strides]
    made = planning.plan(words, MACHINE)
    assert [r["column_of"] for r in unpacked(made)[0]] == [0, 36]
    tables = torch.frombuffer(bytearray(made.columns), dtype=torch.int32).view(2, 36)
    w = torch.arange(36).view(1, 4, 3, 3).expand(8, 4, 3, 3)
    in_memory = w.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)[0].flatten()
    assert torch.equal(tables[0].long(), in_memory) and torch.equal(tables[0], tables[1])


def test_a_layer_beyond_2_to_the_31_bytes_is_cut_without_touching_memory():
    (record,), tiles = unpacked(planning.plan(key([(50257, 16384)]), MACHINE))
    assert record["rows"] * record["columns"] * 4 > 2**31
    assert record["slab_rows"] * record["columns"] < 2**31
    assert sum(t.phase == Phase.SLAB for t in tiles) == record["slabs"]


def test_the_parameter_block_is_as_large_as_cuda_allows(pytestconfig):
    from srn_kernels.backends import cuda

    if cuda.extension is None:
        pytest.skip("needs the extension, or --cuda-shim")
    sizes = cuda.extension.layout()
    forward, backward = cuda.extension.capacities()
    limit, common = sizes["parameter_bytes"], sizes["common_bytes"]
    assert limit == 32764 and sizes["record_bytes"] == planning.RECORD.size
    for capacity, small, each in (
        (forward, sizes["small_forward"], sizes["forward_pointer_bytes"]),
        (backward, sizes["small_backward"], sizes["backward_pointer_bytes"]),
    ):
        assert common % 8 == 0 and each % 8 == 0
        assert common + capacity * each <= limit < common + (capacity + 1) * each + 8
        assert common + small * each <= 4096 < common + (small + 1) * each
    assert forward >= 500
