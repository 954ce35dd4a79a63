"""Launches of every kind of call, counted: each must be one kernel."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import srn_kernels as srn
from benchmarks.cases.runner import WeightReader
from benchmarks.gpu import program
from benchmarks.gpu.program import Fail
from benchmarks.gpu.rows import Row


def count_cuda(body: Callable[[], object]) -> tuple[int, int]:
    """Kernels and copies on the device during ``body``."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        body()
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
    copies = [n for n in names if n.startswith(("Memcpy", "Memset"))]
    others = [n for n in names if not n.startswith(("Memcpy", "Memset", "Activity Buffer"))]
    return len(others), len(copies)


def count_interpreted(body: Callable[[], object]) -> tuple[int, int]:
    """Kernels that the interpreter runs during ``body``; there are no copies to count."""
    from triton.runtime.interpreter import InterpretedFunction

    run, launches = InterpretedFunction.run, []

    def counted(self, *args, **kwargs):
        launches.append(self)
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted
    try:
        body()
    finally:
        InterpretedFunction.run = run
    return len(launches), 0


MIXED = (
    ((40, 27), torch.float32),
    ((64, 96), torch.bfloat16),
    ((1, 96), torch.float16),
    ((16, 8, 3, 3), torch.float32),
    ((20, 200), torch.float32),
)


def mixed_layers(device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Weights of several dtypes, shapes and layouts, and their output dimensions."""
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(device, dtype) for shape, dtype in MIXED]
    weights.append(torch.randn(8, 12, 4, 4).to(device))
    weights.append(torch.randn(12, 8, 3, 3).to(device, memory_format=torch.channels_last))
    return weights, [0] * len(MIXED) + [1, 0]


def steps(device: torch.device, backend: str) -> dict[str, Callable[[], object]]:
    """What must be one launch, by name; their first calls compile."""
    weights, dims = mixed_layers(device)
    shapes = [(w.shape[d], w.numel() // w.shape[d]) for w, d in zip(weights, dims, strict=True)]
    us = [torch.ones(r, device=device) / math.sqrt(r) for r, _ in shapes]
    vs = [torch.ones(c, device=device) / math.sqrt(c) for _, c in shapes]
    ranks = [max(1.0, 0.5 * min(s)) for s in shapes]
    arguments = {"dims": dims, "backend": backend}
    leaves = [w.detach().requires_grad_() for w in weights]
    grads = [torch.randn_like(w) for w in weights]
    kept: list[Tensor] = []

    def normalize(**keywords) -> list[Tensor]:
        return srn.functional.stable_rank_normalize(leaves, us, vs, ranks, **arguments, **keywords)

    def backward() -> None:
        torch.autograd.grad(kept, leaves, grads, retain_graph=True)

    def project() -> None:
        copies = project.copies
        srn.functional.stable_rank_project_(copies, us, vs, ranks, **arguments)

    project.copies = [w.clone() for w in weights]
    model = WeightReader([torch.nn.Parameter(w.flatten(1).float()) for w in weights])
    srn.apply_stable_rank_norm(model, 0.7, backend=backend)
    upstream = [torch.randn_like(p) for p in (layer.weight for layer in model.layers)]
    round_outputs: list[Tensor] = []

    def model_forward() -> None:
        round_outputs[:] = model()

    def model_backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        torch.autograd.backward(round_outputs, upstream, retain_graph=True)

    made = {
        "forward": lambda: kept.__setitem__(slice(None), normalize()),
        "backward": backward,
        "three iterations": lambda: normalize(n_power_iterations=3),
        "evaluation": lambda: normalize(training=False),
        "projection": project,
        "model forward": model_forward,
        "model backward": model_backward,
    }
    for body in made.values():
        body()
        body()
    return made


@dataclass(frozen=True)
class Launches:
    """The launches of one backend."""

    backend: str

    def __call__(self, device: torch.device, base: Row, fail: Fail) -> Iterator[Row]:
        count = count_cuda if device.type == "cuda" else count_interpreted
        for what, body in steps(device, self.backend).items():
            kernels, copies = count(body)
            row = replace(base, workload="mixed", provider=self.backend, mode=what)
            yield row.with_count("launches", kernels)
            yield row.with_count("copies", copies)
            # Gradients of a step may lie elsewhere than those of the last one: one table moves.
            if kernels != 1 or copies > 1:
                found = f"{kernels} kernels and {copies} copies, not one kernel"
                fail(f"{self.backend}: {what} took {found}")


add_arguments = program.add_arguments


def run(chosen: argparse.Namespace) -> int:
    return program.run_parts(chosen, map(Launches, program.backends_of(chosen)))
