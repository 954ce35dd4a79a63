"""Device copies of what changes from call to call: pointers, target ranks, eps.

A launch holds one slot: a pinned table, its device copy and the counters of the kernel's tiles. A
slot whose values still stand is used as it is; one with other values is overwritten only after the
event behind its last launch. No call waits for the device: while all slots are in flight, there is
one more. A launch that a CUDA graph captures keeps its slot for good, since replays read the pinned
table again.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    def record(self) -> None: ...

    def query(self) -> bool: ...


class Runtime(Protocol):
    """What the slots need of a device."""

    def tables(self, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        """A pinned table and its device copy (int64), and zeroed counters (int32)."""

    def event(self) -> Event: ...

    def stream(self) -> Any:
        """What identifies the current stream."""

    def capturing(self) -> bool: ...


class HostEvent:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


class HostRuntime:
    """CPU tensors, in Triton's interpreter."""

    def tables(self, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        host = torch.zeros(words, dtype=torch.int64)
        return host, host, torch.zeros(counters, dtype=torch.int32)

    def event(self) -> Event:
        return HostEvent()

    def stream(self) -> Any:
        return None

    def capturing(self) -> bool:
        return False


class CudaRuntime:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def tables(self, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        host = torch.empty(words, dtype=torch.int64, pin_memory=True)
        device = torch.empty(words, dtype=torch.int64, device=self.device)
        return host, device, torch.zeros(counters, dtype=torch.int32, device=self.device)

    def event(self) -> Event:
        return torch.cuda.Event()

    def stream(self) -> Any:
        return torch.cuda.current_stream(self.device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


class Slot:
    def __init__(self, runtime: Runtime, words: int, counters: int) -> None:
        self.host, self.device, self.counters = runtime.tables(words, counters)
        self.event = runtime.event()
        self.stream: Any = None
        self.values: Sequence[int] | None = None
        self._words = (ctypes.c_int64 * words).from_address(self.host.data_ptr())

    def write(self, values: Sequence[int]) -> None:
        self._words[:] = values
        self.values = values
        if self.device is not self.host:
            self.device.copy_(self.host, non_blocking=True)


class Slots:
    """All slots of one plan, the least recently used first."""

    def __init__(self, runtime: Runtime, words: int, counters: int) -> None:
        self._runtime, self._sizes = runtime, (words, counters)
        self._ring: list[Slot] = []
        self._spare: Slot | None = None  # allocated ahead of a capture
        self._captured: list[Slot] = []
        self._lock = threading.Lock()

    def _new(self) -> Slot:
        return Slot(self._runtime, *self._sizes)

    def all(self) -> list[Slot]:
        return [*self._ring, *self._captured, *([self._spare] if self._spare else [])]

    @contextlib.contextmanager
    def holding(self, values: tuple[int, ...]) -> Iterator[Slot]:
        """A slot with these values on the device, once the current stream gets there.

        The launch that uses it happens within: until its event is recorded, no other thread may
        take the slot for a completed one.
        """
        with self._lock:
            if self._runtime.capturing():
                slot, self._spare = self._spare or self._new(), None
                self._captured.append(slot)
                slot.write(values)
                yield slot
                return
            if self._spare is None:
                self._spare = self._new()
            slot = self._take(values, self._runtime.stream())
            yield slot
            slot.stream = self._runtime.stream()
            slot.event.record()

    def _take(self, values: tuple[int, ...], stream: Any) -> Slot:
        ring = self._ring
        for slot in ring:
            # On the stream of its last launch a slot may be in flight still: the order is the same.
            if slot.values == values and (slot.stream == stream or slot.event.query()):
                break
        else:
            slot = ring[0] if ring and ring[0].event.query() else self._new()
            slot.write(values)
        if slot in ring:
            ring.remove(slot)
        ring.append(slot)
        return slot
