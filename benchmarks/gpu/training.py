"""Whole training steps of discriminators on a GPU: what normalising takes of them, and memory.

The forwards run under bfloat16 autocast. Without their generator the images themselves get its
gradient. Also the whole step as one CUDA graph, where the host's work is gone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import steps
from benchmarks.cases.runner import Body
from benchmarks.gpu import program
from benchmarks.gpu.program import Fail
from benchmarks.gpu.rows import Row
from benchmarks.gpu.timing import CudaTimer, HostTimer, Times, measure
from benchmarks.measure.memory import peak_mebibytes
from benchmarks.measure.suite import Key
from benchmarks.measure.timing import spread

# Images of one step as they are trained: (batch, channels, height, width).
IMAGES = {"biggan_128_D_ch96": (32, 3, 128, 128), "real_esrgan_unet_D": (12, 3, 256, 256)}
WARM_UP = 3  # steps before a capture


def graphed(step: steps.Step) -> steps.Step:
    """The step as one graph; its memory stays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak(step: steps.Step, device: torch.device) -> float | None:
    """MiB that a step takes beyond what it keeps."""
    if device.type != "cuda":
        return peak_mebibytes(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True)
class Training:
    """The steps of one discriminator: plain, with torch's normalisation and with ours."""

    workload: str
    images: tuple[int, int, int, int]
    backends: Sequence[str]
    repeats: int
    budget: float

    def hows(self, device: torch.device) -> dict[Key, steps.How]:
        common = {"device": device, "autocast": torch.bfloat16}
        made = {
            ("plain", None): steps.How("plain", None, **common),
            ("torch_sn", 1.0): steps.How("torch_sn", 1.0, **common),
        }
        for name in self.backends:
            for ratio in (1.0, 0.7):
                how = steps.How("module", ratio, backend=name, **common)
                made[f"module_{name}", ratio] = how
        return made

    def __call__(self, device: torch.device, base: Row, fail: Fail) -> Iterator[Row]:
        spec = replace(steps.MODELS[self.workload], images=self.images, generator=None)
        base = replace(base, workload=self.workload)
        timer = CudaTimer() if device.type == "cuda" else HostTimer()
        kinds: dict[str, Callable[[steps.Step], steps.Step]] = {"step": lambda step: step}
        if device.type == "cuda":
            kinds["graphed step"] = graphed
        for mode, prepare in kinds.items():
            made: dict[Key, steps.Step] = {}
            for key, how in self.hows(device).items():
                row = replace(base, mode=mode).of(key)
                try:
                    made[key] = prepare(steps.make_step(spec, how))
                    made[key]()
                    mebibytes = peak(made[key], device)
                except RuntimeError as error:
                    made.pop(key, None)
                    fail(f"{self.workload}, {mode}, {key}: {error}")
                    continue
                if mode == "step" and mebibytes is not None:
                    yield row.with_result("peak_memory_mib", spread([mebibytes]))
            bodies = {key: Body(step) for key, step in made.items()}
            yield from self.rows(measure(bodies, timer, self.repeats, self.budget), base, mode)

    def rows(self, samples: Times, base: Row, mode: str) -> Iterator[Row]:
        for key in samples.step:
            row = replace(base, mode=mode).of(key)
            for name, kind in zip(Times._fields, samples, strict=True):
                yield row.with_result(f"{name}_ms", kind.spread(key), 1e3)
            share = samples.step.paired(key, ("plain", None), lambda t, b: 100 * (t - b) / t)
            if share and key[0] != "plain":
                yield row.with_result("share_of_step_percent", share)
            faster = samples.step.paired(key, ("torch_sn", 1.0), lambda t, b: b / t)
            if faster and key[0] not in ("plain", "torch_sn"):
                yield row.with_result("step_speedup_over_torch_sn_x", faster)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    program.add_arguments(parser)
    parser.add_argument("--workload", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--images", nargs=4, type=int, help="batch, channels, height, width")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a candidate")


def run(chosen: argparse.Namespace) -> int:
    backends = program.backends_of(chosen)
    parts = [
        Training(
            name,
            tuple(chosen.images or IMAGES[name]),
            backends,
            chosen.repeats,
            chosen.budget,
        )
        for name in chosen.workload
    ]
    return program.run_parts(chosen, parts)
