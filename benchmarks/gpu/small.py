"""Every phase of the kernels once, on layers of a few tiles: for compute-sanitizer."""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.cases import workloads
from benchmarks.cases.workloads import Workload
from benchmarks.gpu import launches, program
from benchmarks.gpu.candidates import build, candidates, on_device

LAYERS = Workload("small", "", ((96, 1152), (600, 64)))
add_arguments = program.add_arguments


def run(chosen: argparse.Namespace) -> int:
    device = program.device_of(chosen)
    for backend in program.backends_of(chosen):
        launches.steps(device, backend)
        problem = on_device(workloads.make_problem(LAYERS), device)
        name = f"functional_{backend}"
        build(problem, {name: candidates(device, [backend], LAYERS)[name]}, sys.exit)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("ran every phase")
    return 0
