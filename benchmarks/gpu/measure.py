"""The workloads on a GPU: gated candidates, times, and their ratios to the floor and the peers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import workloads
from benchmarks.cases.runner import Body
from benchmarks.cases.workloads import Workload
from benchmarks.gpu import program
from benchmarks.gpu.candidates import MODES, build, candidates, on_device
from benchmarks.gpu.launches import count_cuda
from benchmarks.gpu.program import Fail
from benchmarks.gpu.rows import Row
from benchmarks.gpu.timing import CudaTimer, HostTimer, measure, result_rows
from benchmarks.measure.suite import Key
from benchmarks.measure.timing import Spread

# Small and large models, many layers, one matrix, half precision.
WORKLOADS = (
    "biggan_128_D_ch96",
    "vit_b16",
    "real_esrgan_unet_D",
    "sngan_cifar_resnet_D",
    "1x4096x4096",
    "emulator_175",
    "densenet40_k12",
    "real_esrgan_unet_D@bfloat16",
)


def count_rows(bodies: Mapping[Key, Body], base: Row) -> Iterator[Row]:
    """The kernels that each candidate launches."""
    for key, body in bodies.items():
        body.prepare()
        kernels, copies = count_cuda(body.run)
        yield base.of(key).with_count("launches", kernels)
        yield base.of(key).with_count("copies", copies)


@dataclass(frozen=True)
class Measurement:
    """One workload, on some backends."""

    workload: Workload
    backends: Sequence[str]
    repeats: int
    budget: float  # seconds for a candidate and mode

    def __call__(self, device: torch.device, base: Row, fail: Fail) -> Iterator[Row]:
        problem = on_device(workloads.make_problem(self.workload), device)
        chosen = candidates(device, self.backends, self.workload)
        runners = build(problem, chosen, fail)
        timer = CudaTimer() if device.type == "cuda" else HostTimer()
        for mode in MODES:
            taking_part = {k: r for k, r in runners.items() if mode in chosen[k[0]].modes}
            for runner in taking_part.values():
                runner.train(mode != "evaluation")
            bodies = {key: runner.body(mode) for key, runner in taking_part.items()}
            samples = measure(bodies, timer, self.repeats, self.budget)
            size = workloads.floor_bytes(self.workload, mode)
            row = replace(base, workload=self.workload.name, mode=mode, bytes=size)
            if device.type == "cuda" and mode != "evaluation":  # it launches as the forward
                yield from count_rows(bodies, row)
            for made in result_rows(samples, row):
                yield made
                if made.provider == "copy" and made.metric == "device_ms":
                    seconds = (made.p80 / 1e3, made.p50 / 1e3, made.p20 / 1e3)
                    rate = Spread(*(size / t for t in seconds), made.repeats)
                    yield made.with_result("copy_gb_per_s", rate, 1e-9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    program.add_arguments(parser)
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a candidate and mode")


def run(chosen: argparse.Namespace) -> int:
    backends = program.backends_of(chosen)
    found = [workloads.find(name) for name in chosen.workload]
    parts = [Measurement(w, backends, chosen.repeats, chosen.budget) for w in found]
    return program.run_parts(chosen, parts)
