"""Device copies of what changes from call to call: pointers, target ranks, eps.

A launch holds one slot: a pinned table, its device copy and the counters of the kernel's tiles. A
slot whose values still stand is used as it is; one with other values is overwritten only after the
event behind its last launch. No call waits for the device: while all slots are in flight, there is
one more (the first of every 32 that are added waits until they are zero). A launch that a CUDA
graph captures keeps its slot, and all that it reads, for the life of the process: replays read the
pinned table again, and nothing tells when a graph dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

SPARE = 32  # slots that stand ready at least: a capture cannot allocate them


class Event(Protocol):
    def record(self) -> None: ...

    def query(self) -> bool: ...


class Runtime(Protocol):
    """What the slots need of a device."""

    def tables(self, count: int, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pinned tables and their device copies (int64), and counters that are zero by now (int32).

        One row for each of ``count`` slots.
        """

    def event(self) -> Event: ...

    def stream(self) -> Any:
        """What identifies the current stream."""

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """Tells the allocator that the current stream, not its own, uses the tensors."""

    def capturing(self) -> bool: ...


class HostEvent:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


class HostRuntime:
    """CPU tensors, in Triton's interpreter."""

    def tables(self, count: int, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        host = torch.zeros(count, words, dtype=torch.int64, device="cpu")
        return host, host, torch.zeros(count, counters, dtype=torch.int32, device="cpu")

    def event(self) -> Event:
        return HostEvent()

    def stream(self) -> Any:
        return None

    def uses(self, tensors: Sequence[Tensor]) -> None:
        pass

    def capturing(self) -> bool:
        return False


class CudaRuntime:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def tables(self, count: int, words: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
        host = torch.empty(count, words, dtype=torch.int64, pin_memory=True, device="cpu")
        device = torch.empty(count, words, dtype=torch.int64, device=self.device)
        zeros = torch.zeros(count, counters, dtype=torch.int32, device=self.device)
        torch.cuda.current_stream(self.device).synchronize()  # any stream may use them from now on
        return host, device, zeros

    def event(self) -> Event:
        return torch.cuda.Event()

    def stream(self) -> Any:
        return torch.cuda.current_stream(self.device).cuda_stream

    def uses(self, tensors: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        for tensor in tensors:
            tensor.record_stream(stream)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


class Slot:
    def __init__(self, host: Tensor, device: Tensor, counters: Tensor, event: Event) -> None:
        self.host, self.device, self.counters, self.event = host, device, counters, event
        self.copied = device.data_ptr() != host.data_ptr()
        self.stream: Any = None  # of the last launch
        self.values: Sequence[int] | None = None
        self._words = (ctypes.c_int64 * host.numel()).from_address(host.data_ptr())

    def write(self, values: Sequence[int]) -> None:
        self._words[:] = values
        self.values = values
        if self.copied:
            self.device.copy_(self.host, non_blocking=True)


_in_graphs: list[Slots] = []  # never freed


class Slots:
    """All slots of one plan; ``constants`` are the plan's own tensors that a launch reads."""

    def __init__(
        self, runtime: Runtime, words: int, counters: int, constants: Sequence[Tensor] = ()
    ) -> None:
        self._runtime, self._sizes, self._constants = runtime, (words, counters), list(constants)
        self._ring: list[Slot] = []  # the least recently used first
        self._spare: list[Slot] = []
        self._captured: list[Slot] = []
        self._streams = {runtime.stream()}  # that the allocator knows of
        self._lock = threading.Lock()
        self._more()

    def _more(self) -> None:
        tables = self._runtime.tables(2 * SPARE, *self._sizes)
        for rows in zip(*(t.unbind() for t in tables), strict=True):
            self._spare.append(Slot(*rows, self._runtime.event()))
        self._constants += tables[1:]
        self._streams = {self._runtime.stream()}

    def all(self) -> list[Slot]:
        return [*self._ring, *self._captured, *self._spare]

    @contextlib.contextmanager
    def holding(self, values: tuple[int, ...]) -> Iterator[Slot]:
        """A slot with these values on the device, once the current stream gets there.

        The launch that uses it happens within: until its event is recorded, no other thread may
        take the slot for a completed one. A slot whose launch raises is not used again: nobody
        knows its counters.
        """
        with self._lock:
            if self._runtime.capturing():
                if not self._spare:
                    raise RuntimeError(
                        f"a CUDA graph can capture {SPARE} rounds of one model: the tables of more "
                        "cannot be allocated during the capture"
                    )
                if not self._captured:
                    _in_graphs.append(self)
                slot = self._spare.pop()
                self._captured.append(slot)
                slot.write(values)
                yield slot
                return
            if len(self._spare) < SPARE:
                self._more()
            stream = self._runtime.stream()
            if stream not in self._streams:
                self._runtime.uses(self._constants)
                self._streams.add(stream)
            slot = self._take(values, stream)
            yield slot
            slot.stream = stream
            slot.event.record()
            self._ring.append(slot)

    def _take(self, values: tuple[int, ...], stream: Any) -> Slot:
        ring = self._ring
        for slot in ring:
            # On the stream of its last launch a slot may be in flight still: the order is the same.
            if slot.values == values and (slot.stream == stream or slot.event.query()):
                ring.remove(slot)
                return slot
        slot = ring.pop(0) if ring and ring[0].event.query() else self._spare.pop()
        slot.write(values)
        return slot
