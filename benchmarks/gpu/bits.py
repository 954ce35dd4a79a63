"""Whether rounds give the same bits: again, beside other work, on two streams, from a graph."""

from __future__ import annotations

import argparse
import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import srn_kernels as srn
from benchmarks.gpu import program
from benchmarks.gpu.launches import mixed_layers
from benchmarks.gpu.program import Fail
from benchmarks.gpu.rows import Row

WIDE = ((512, 4608), (96, 13824))  # several tiles each, beside the small layers


class Rounds:
    """A model's rounds, forward and backward, from one start; u and v move on."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.backend = backend
        weights, self.dims = mixed_layers(device)
        wide = WIDE if device.type == "cuda" else ()  # an interpreter would take minutes
        weights += [torch.randn(shape).to(device) / shape[1] ** 0.5 for shape in wide]
        self.dims += [0] * len(wide)
        sides = [(w, w.shape[d]) for w, d in zip(weights, self.dims, strict=True)]
        shapes = [(rows, w.numel() // rows) for w, rows in sides]
        self.us = [torch.ones(r, device=device) / math.sqrt(r) for r, _ in shapes]
        self.vs = [torch.ones(c, device=device) / math.sqrt(c) for _, c in shapes]
        self.ranks = [max(1.0, 0.5 * min(s)) for s in shapes]
        self.leaves = [w.requires_grad_() for w in weights]
        self.upstream = [torch.randn_like(w) for w in weights]

    def step(self) -> Tensor:
        """One round; a number for each result that is another for nearly every other result."""
        outs = srn.functional.stable_rank_normalize(
            self.leaves, self.us, self.vs, self.ranks, dims=self.dims, backend=self.backend
        )
        grads = torch.autograd.grad(outs, self.leaves, self.upstream)
        return torch.stack([digest(t.detach()) for t in (*outs, *grads, *self.us, *self.vs)])

    def run(self, rounds: int) -> Tensor:
        return torch.stack([self.step() for _ in range(rounds)])


def digest(t: Tensor) -> Tensor:
    """A checksum of bits and places, modulo 2^64."""
    bits = t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])
    bits = bits.reshape(-1).long()
    return (bits * (2 * torch.arange(len(bits), device=t.device) + 1)).sum()


@contextlib.contextmanager
def other_work(device: torch.device) -> Iterator[None]:
    """Matrix products on a stream, or in a thread, of their own meanwhile."""
    stop = threading.Event()
    a = torch.randn(2048, 2048, device=device) if device.type == "cuda" else torch.randn(64, 64)
    stream = torch.cuda.Stream() if device.type == "cuda" else None

    def work() -> None:
        while not stop.is_set():
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                for _ in range(20):
                    torch.mm(a, a)
            if stream:
                stream.synchronize()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def two_streams(make: Callable[[], Rounds], rounds: int) -> Tensor:
    """Both halves, each (rounds, results)."""
    both = [make(), make()]
    streams = [torch.cuda.Stream() for _ in both]
    digests: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(rounds):
        for model, stream, found in zip(both, streams, digests, strict=True):
            with torch.cuda.stream(stream):
                found.append(model.step())
    torch.cuda.synchronize()
    return torch.stack([torch.stack(found) for found in digests])


def replayed(make: Callable[[], Rounds], rounds: int) -> Tensor:
    """One round, captured once."""
    model = make()
    starts = [t.clone() for t in (*model.us, *model.vs)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = model.step()
    for t, start in zip((*model.us, *model.vs), starts, strict=True):
        t.data.copy_(start)
    found = []
    for _ in range(rounds):
        graph.replay()
        found.append(static.clone())
    return torch.stack(found)


@dataclass(frozen=True)
class Bits:
    """The rounds of one backend, every way that the device has."""

    backend: str
    rounds: int

    def __call__(self, device: torch.device, base: Row, fail: Fail) -> Iterator[Row]:
        def make() -> Rounds:
            torch.manual_seed(0)
            return Rounds(self.backend, device)

        def beside() -> Tensor:
            with other_work(device):
                return make().run(self.rounds)

        expected = make().run(self.rounds)
        ways = {"again": lambda: make().run(self.rounds), "beside other work": beside}
        if device.type == "cuda":
            ways["two streams"] = lambda: two_streams(make, self.rounds)
            ways["graph replay"] = lambda: replayed(make, self.rounds)
        for way, run in ways.items():
            differing = (run() != expected).any(-1)
            n = int(differing.sum())
            row = replace(base, workload="mixed", provider=self.backend, mode=way)
            yield row.with_count("rounds_that_differ", n)
            if n:
                first = int(differing.nonzero()[0, -1])
                fail(f"{self.backend}, {way}: {n} rounds differ, the first is round {first}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    program.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=1000)


def run(chosen: argparse.Namespace) -> int:
    backends = program.backends_of(chosen)
    return program.run_parts(chosen, [Bits(name, chosen.rounds) for name in backends])
