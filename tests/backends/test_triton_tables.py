"""The slots behind a launch, with a device whose progress the test decides."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from srn_kernels.backends.triton.tables import SPARE, Slot, Slots

OLD, NEW = (1, 2, 3), (4, 5, 6)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at = device, 0

    def record(self) -> None:
        self.device.issued += 1
        self.at = self.device.issued

    def query(self) -> bool:
        return self.at <= self.device.done


class FakeDevice:
    """Launches are numbered as issued; all up to ``done`` have completed."""

    def __init__(self) -> None:
        self.issued = self.done = 0
        self.current, self.capture = "main", False
        self.told: list[tuple[str, int]] = []  # of a stream's use of memory

    def tables(self, count: int, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        assert not self.capture  # CUDA refuses
        host, device = (torch.zeros(count, words, dtype=torch.int64) for _ in range(2))
        return host, device, torch.zeros(count, counters, dtype=torch.int32)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def stream(self) -> str:
        return self.current

    def uses(self, tensors: Sequence[Tensor]) -> None:
        self.told += [(self.current, t.data_ptr()) for t in tensors]

    def capturing(self) -> bool:
        return self.capture


def launch(slots: Slots, values: tuple[int, ...]) -> Slot:
    with slots.holding(values) as slot:
        assert tuple(slot.device.tolist()) == values
    return slot


def made() -> tuple[FakeDevice, Slots]:
    device = FakeDevice()
    return device, Slots(device, 3, 64)


def uploads(slot: Slot) -> int:
    return slot.device._version


def test_values_that_stand_are_not_uploaded_again():
    _, slots = made()
    first = launch(slots, OLD)
    before = uploads(first)
    assert all(launch(slots, OLD) is first for _ in range(5))  # all in flight, on one stream
    assert uploads(first) == before


def test_a_table_in_flight_is_never_overwritten():
    device, slots = made()
    first = launch(slots, OLD)
    second = launch(slots, NEW)
    assert second is not first
    assert tuple(first.host.tolist()) == tuple(first.device.tolist()) == OLD
    device.done = device.issued
    third = launch(slots, (7, 8, 9))
    assert third in (first, second)  # memory of a completed launch


def test_alternating_values_settle_without_uploads():
    device, slots = made()
    kept = [launch(slots, OLD), launch(slots, NEW)]
    before = [uploads(s) for s in kept]
    for _ in range(4):
        device.done = device.issued
        assert [launch(slots, OLD), launch(slots, NEW)] == kept
    assert [uploads(s) for s in kept] == before


def test_the_ring_grows_only_while_the_device_is_behind():
    device, slots = made()
    behind = 3 * SPARE
    grown = {id(launch(slots, (i, i, i))) for i in range(behind)}
    assert len(grown) == behind
    for i in range(2 * behind):
        device.done = device.issued
        assert id(launch(slots, (i, -i, i))) in grown


def test_two_streams_never_share_counters_in_flight():
    device, slots = made()
    first = launch(slots, OLD)
    device.current = "side"
    second = launch(slots, OLD)
    assert second.counters.data_ptr() != first.counters.data_ptr()
    device.done = device.issued
    assert launch(slots, OLD) in (first, second)


def test_a_captured_launch_keeps_its_slot():
    device, slots = made()
    warm = launch(slots, OLD)
    device.done = device.issued
    device.capture = True
    captured = [launch(slots, OLD) for _ in range(SPARE)]
    device.capture = False
    assert len({id(s) for s in (warm, *captured)}) == 1 + SPARE
    for i in range(8):
        assert launch(slots, (i, i, i)) not in captured
        device.done = device.issued
    assert all(tuple(s.host.tolist()) == OLD for s in captured)  # what replays upload again


def test_captured_slots_outlive_their_plan():
    device, slots = made()
    seen = weakref.ref(slots)
    launch(slots, OLD)
    del slots
    gc.collect()
    assert seen() is None
    device, slots = made()
    seen = weakref.ref(slots)
    device.capture = True
    slot = launch(slots, OLD)
    constants = [weakref.ref(t) for t in slots._constants]
    del slots
    gc.collect()
    assert slot in seen().all()
    assert all(t() is not None for t in constants)


def test_a_capture_beyond_the_spare_slots_says_so():
    device, slots = made()
    launch(slots, OLD)
    device.capture = True
    with pytest.raises(RuntimeError, match=f"capture {SPARE} rounds"):
        for i in range(10 * SPARE):
            launch(slots, (i, i, i))


def test_a_slot_whose_launch_failed_is_not_used_again():
    """Nobody knows what its counters hold."""
    device, slots = made()
    launch(slots, OLD)
    with pytest.raises(KeyboardInterrupt), slots.holding(NEW) as failed:
        failed.counters[0] = 7
        raise KeyboardInterrupt
    device.done = device.issued
    for i in range(2 * SPARE):
        slot = launch(slots, NEW if i % 2 else (i, i, i))
        assert slot is not failed
        assert not slot.counters.any()
    assert failed not in slots.all()


def test_the_allocator_hears_of_every_stream_before_its_first_launch():
    device = FakeDevice()
    tiles = torch.zeros(3)
    slots = Slots(device, 3, 64, [tiles])
    launch(slots, OLD)
    assert not device.told  # memory of the stream it was made on
    for stream in ("side", "main", "side", "third"):
        device.current = stream
        launch(slots, OLD)
    heard = {stream for stream, at in device.told if at == tiles.data_ptr()}
    assert heard == {"side", "third"}
    tables = {t.untyped_storage().data_ptr() for s in slots.all() for t in (s.device, s.counters)}
    assert tables <= {at for stream, at in device.told if stream == "third"}
