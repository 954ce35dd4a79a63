"""The slots behind a launch, with a device whose progress the test decides."""

from __future__ import annotations

import torch
from torch import Tensor

from srn_kernels.backends.triton.tables import Slot, Slots

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
        self.allocated_in_capture = 0

    def tables(self, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        self.allocated_in_capture += self.capture
        host, device = (torch.zeros(words, dtype=torch.int64) for _ in range(2))
        return host, device, torch.zeros(counters, dtype=torch.int32)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def stream(self) -> str:
        return self.current

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
    for i in range(5):
        launch(slots, (i, i, i))
    grown = len(slots.all())
    for i in range(50):
        device.done = device.issued
        launch(slots, (i, -i, i))
    assert len(slots.all()) == grown


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
    captured = launch(slots, OLD)
    assert device.allocated_in_capture == 0
    again = launch(slots, OLD)
    device.capture = False
    assert len({id(s) for s in (warm, captured, again)}) == 3
    for i in range(8):
        assert launch(slots, (i, i, i)) not in (captured, again)
        device.done = device.issued
    assert tuple(captured.host.tolist()) == OLD  # what replays upload again
    assert captured in slots.all()
