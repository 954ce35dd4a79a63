"""What a CUDA launch is told: the sizes of its tables, and how slabs pass through shared memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.cases import workloads
from benchmarks.gpu import events
from srn_kernels.backends.cuda import planning
from srn_kernels.backends.tiling import staging
from srn_kernels.backends.tiling.config import KB, MB, LaunchConfig
from srn_kernels.backends.tiling.schedule import Phase, Schedule, Tile, check

# The extension's own figures are compared below where there is one.
MACHINE = events.KERNELS
# SMs, L2 and shared memory of a CTA: sm_90 and sm_100, sm_80, and sm_86, 89, 120.
CARDS = {227: (132, 50 * MB), 164: (108, 40 * MB), 99: (84, 6 * MB)}
F32, BF16 = planning.FLOAT32, planning.BFLOAT16


def use_card(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    processors, l2 = CARDS[shared]

    def config(device: int, model_bytes: int, backward: bool) -> tuple[LaunchConfig, int]:
        made = planning.config_for(processors, l2, shared * KB, model_bytes, backward)
        return made, shared * KB

    monkeypatch.setattr(planning, "device_config", config)


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    use_card(monkeypatch, 227)
    # The shim's are smaller.
    monkeypatch.setattr(staging, "SLOT_BYTES", (16 * KB, 32 * KB))
    monkeypatch.setattr(staging, "IN_FLIGHT", 64 * KB)


def key(shapes, backward=False, types=(F32, F32), iterations=1, aligned=True, dim=0, gain=(F32, 1)):
    words = [0, int(backward), 0]
    for i, shape in enumerate(shapes):
        strides = torch.empty(shape, device="meta").stride()
        words += [len(shape), dim, *types, int(aligned), iterations, 0, i, *gain]
        words += [*shape, *strides]
    return words


def unpacked(made: planning.Blueprint):
    """Records as dictionaries of plan.h's names, and tiles."""
    records = [planning.Record(*x)._asdict() for x in planning.RECORD.iter_unpack(made.records)]
    phases = {op: phase for phase, op in planning.OPS.items()}
    words = torch.frombuffer(bytearray(made.tiles), dtype=torch.int32).view(-1, 4).tolist()
    return records, [Tile(a, phases[b], c, d) for a, b, c, d in words]


@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (F32, BF16)])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", workloads.load())
@pytest.mark.parametrize("shared", CARDS)
def test_every_workload_fits_the_machine(monkeypatch, shared, name, backward, types):
    use_card(monkeypatch, shared)
    shapes = workloads.load()[name].shapes
    made = planning.plan(key(shapes, backward, types), MACHINE)
    records, tiles = unpacked(made)
    slots = made.stream_slots + made.resident_slots
    assert slots <= MACHINE.most_slots and made.slot_bytes % 128 == 0
    assert slots * made.slot_bytes + MACHINE.control_bytes[0] <= shared * KB
    # Four slots of the stream before anything is kept, and copies in flight beside what is read.
    assert 16 * KB <= made.slot_bytes <= 32 * KB and made.stream_slots >= 4
    held = 1 if backward else max(r["row_pieces"] for r in records)
    if made.resident_slots:
        assert (made.stream_slots - held) * made.slot_bytes >= 64 * KB
    size, other = planning.BYTES[types[0]], planning.BYTES[types[1]] if backward else 0
    for r, shape in zip(records, shapes, strict=True):
        assert (r["rows"], r["columns"]) == shape
        assert r["slabs"] == -(-r["rows"] // r["slab_rows"])
        # Nothing is read element by element from memory, on no card.
        width = 4 if r["columns"] % 4 == 0 else 1
        assert r["path"] == (staging.VECTORS if width == 4 else staging.SCALARS)
        pieces = -(-r["slab_rows"] // r["piece_rows"]) * r["row_pieces"]
        assert 1 <= pieces <= MACHINE.most_pieces and r["slab_rows"] <= MACHINE.most_rows
        assert r["row_pieces"] == 1 or r["piece_rows"] == 1
        assert r["row_pieces"] * r["piece_columns"] >= r["columns"]
        span = r["piece_rows"] * r["piece_columns"]
        # A span is moved by up to 15 bytes, to lie in its slot as it lies in memory.
        if backward:
            assert r["other_offset"] % 16 == 0 and r["other_offset"] >= span * size + 15
            assert r["other_offset"] + span * other + 15 <= made.slot_bytes
        else:
            assert span * size + 15 <= made.slot_bytes
        # Only a thread's last unit may be missing, also in the last panel.
        across = r["group_warps"] * 32
        whole = (r["piece_columns"] if backward else r["columns"]) // width
        last = r["columns"] // width - (r["row_pieces"] - 1) * whole if backward else whole
        assert r["group_warps"] <= 15 and r["vectors"] * across >= whole
        assert (r["vectors"] - 1) * across <= last
    # Every SM has at least two slabs, where rows suffice.
    processors = CARDS[shared][0]
    total = sum(a * b for a, b in shapes) * (size + other)
    fewest = max(16 * KB, max(4 * r["columns"] * (size + other) for r in records))
    if total > 2.5 * processors * fewest:
        assert sum(r["slabs"] for r in records) >= 2 * processors
    # The list is complete, and tiles wait for earlier tiles only.
    cuts = [
        planning.cut_staged(
            planning.Work(r["rows"], r["columns"], size + other, 1, 1, not backward),
            LaunchConfig.for_device(132, 50 * MB, 227 * KB, 0, backward, planning.FEWEST_SLABS),
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
        (2879, True, staging.SCALARS),
        (2881, True, staging.DIRECT),
        (13824, True, staging.VECTORS),
        (16384, True, staging.VECTORS),
        (17280, True, staging.VECTORS),
        (17284, True, staging.DIRECT),
    ],
)
def test_the_path_of_a_row(columns, aligned, path):
    (record,), _ = unpacked(planning.plan(key([(64, columns)], aligned=aligned), MACHINE))
    assert record["path"] == path


@pytest.mark.parametrize(
    "shared, columns, path",
    [
        (227, 8192, staging.VECTORS),
        (164, 8192, staging.VECTORS),
        (99, 6656, staging.VECTORS),  # its parts must fit four slots
        (99, 8192, staging.DIRECT),
        (227, 8642, staging.DIRECT),
    ],
)
def test_float64_is_staged_up_to_8192_columns(monkeypatch, shared, columns, path):
    use_card(monkeypatch, shared)
    words = key([(64, columns)], types=(planning.FLOAT64, planning.FLOAT64))
    words[2] = 1
    (record,), _ = unpacked(planning.plan(words, MACHINE))
    assert record["path"] == path


@pytest.mark.parametrize(
    "types, path",
    [
        ((F32, BF16), staging.VECTORS),
        ((BF16, BF16), staging.VECTORS),
        ((BF16, F32), staging.SCALARS),
        ((BF16, planning.FLOAT16), staging.SCALARS),
    ],
)
def test_pairs_of_types_that_are_not_compiled_in_are_read_by_elements(types, path):
    (record,), _ = unpacked(planning.plan(key([(64, 1152)], types=types), MACHINE))
    assert record["path"] == path


def test_no_model_is_cut_coarser_than_a_slightly_smaller_one():
    """Around 17.3 MB too, where slabs used to become twice as coarse."""
    slabs = []
    for rows in range(900, 1300, 20):
        records, _ = unpacked(planning.plan(key([(rows, 4096)]), MACHINE))
        slabs.append(records[0]["slabs"])
    assert all(
        n >= min(2 * 132, rows // 4) for n, rows in zip(slabs, range(900, 1300, 20), strict=True)
    )
    assert all(b >= 0.8 * a for a, b in itertools.pairwise(slabs))


def test_rows_that_are_not_contiguous_are_read_directly():
    (record,), _ = unpacked(planning.plan(key([(64, 48, 3, 3)], dim=1), MACHINE))
    assert (record["path"], record["inner"], record["columns"]) == (staging.DIRECT, 9, 576)


@pytest.mark.parametrize("backward", [False, True])
def test_a_gain_changes_no_tile(backward):
    shapes = workloads.load()["biggan_128_D_ch96"].shapes
    plain, gained = (
        planning.plan(key(shapes, backward, gain=gain), MACHINE) for gain in ((F32, 1), (BF16, 0))
    )
    assert plain.tiles == gained.tiles and plain.ctas == gained.ctas
    (records, _), (others, _) = unpacked(plain), unpacked(gained)
    assert {(r.pop("gain_type"), r.pop("through")) for r in records} == {(F32, 1)}
    assert {(r.pop("gain_type"), r.pop("through")) for r in others} == {(BF16, 0)}
    assert records == others


def test_tables_of_columns_follow_each_other():
    strides = torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last).stride()
    words = [0, 0, 0]
    for i in range(2):
        words += [4, 0, F32, F32, 1, 1, 0, i, F32, 1, 8, 4, 3, 3, *strides]
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
