"""Timing on a device: paired, in changing order, from an idle device and an L2 of other bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from benchmarks.cases.runner import Body
from benchmarks.gpu.rows import Row
from benchmarks.measure.suite import Key
from benchmarks.measure.timing import (
    WARM_UPS,
    Samples,
    no_garbage_collection,
    share_of_repeats,
    takes_part,
)


class Times(NamedTuple):
    """Seconds: of the device alone; from idle to done, the host's work included; of the host."""

    device: float
    step: float
    host: float


class CudaTimer:
    """Every run starts with an idle device and an L2 full of other, written bytes."""

    def __init__(self) -> None:
        p = torch.cuda.get_device_properties(0)
        self.other = torch.empty(max(2 * p.L2_cache_size, 1 << 28), dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.hertz = 2e9  # of the device's clock, at most

    def _run(self, body: Body, hidden: float) -> tuple[float, float]:
        body.prepare()
        self.other.zero_()
        torch.cuda.synchronize()
        if hidden:
            torch.cuda._sleep(int(hidden * self.hertz))
        self.start.record()
        begin = time.perf_counter()
        body.run()
        host = time.perf_counter() - begin
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3, host

    def __call__(self, body: Body) -> Times:
        step, host = self._run(body, 0.0)
        # While the device sleeps the host issues everything.
        device, _ = self._run(body, 2 * host + 1e-4)
        return Times(device, step, host)


class HostTimer:
    """For rehearsals."""

    def __call__(self, body: Body) -> Times:
        body.prepare()
        begin = time.perf_counter()
        body.run()
        seconds = time.perf_counter() - begin
        return Times(seconds, seconds, seconds)


def measure(
    bodies: Mapping[Key, Body],
    timer: Callable[[Body], Times],
    repeats: int,
    budget: float,
) -> Times:
    """A ``Samples`` for each time; every candidate once a repeat, in changing order."""
    samples = Times(*(Samples({key: [] for key in bodies}) for _ in Times._fields))
    generator = random.Random(0)
    with no_garbage_collection():
        shares = {}
        for key, body in bodies.items():
            seconds = min(sum(timer(body)[:2]) for _ in range(WARM_UPS))
            shares[key] = share_of_repeats(seconds, repeats, budget)
        for repeat in range(repeats):
            for key in generator.sample(list(bodies), len(bodies)):
                part = takes_part(repeat, shares[key], repeats)
                times = timer(bodies[key]) if part else Times(None, None, None)
                for kind, seconds in zip(samples, times, strict=True):
                    kind[key].append(seconds)
    return samples


def result_rows(samples: Times, base: Row) -> Iterator[Row]:
    """Times, and their ratios within each repeat to the floor and to torch's spectral norm."""
    for key in samples.device:
        row = base.of(key)
        for name, kind in zip(Times._fields, samples, strict=True):
            yield row.with_result(f"{name}_ms", kind.spread(key), 1e3)
        floor = samples.device.paired(key, ("copy", None), lambda t, b: t / b)
        if floor and key[0] != "copy":
            yield row.with_result("device_over_copy_x", floor)
        for name in ("torch_sn", "foreach"):
            faster = samples.step.paired(key, (name, 1.0), lambda t, b: b / t)
            if faster and key[0] not in ("copy", name):
                yield row.with_result(f"step_speedup_over_{name}_x", faster)
