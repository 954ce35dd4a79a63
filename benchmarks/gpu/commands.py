"""The commands of a GPU machine: ``python -m benchmarks gpu --help``; torch and Triton suffice."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# Name: module with add_arguments and run, which is imported only where it is asked for, and help.
COMMANDS = {
    "check": ("check", "all of it, in stages with limits (make gpu-check)"),
    "measure": ("measure", "times of workloads, against peers and the floor"),
    "build": ("build", "both extensions, for this device alone"),
    "reduce": ("reduce", "a failing test's call to the smallest that fails"),
    "bits": ("bits", "whether rounds repeat bit by bit"),
    "training": ("training", "whole training steps of discriminators"),
    "counters": ("counters", "hardware counters of the kernels, through ncu"),
    "publish": ("publish", "rows into the store, and docs/gpu.md from it; needs the extra bench"),
    "launches": ("launches", "kernels that each kind of call takes"),
    "small": ("small", "every phase of the kernels once, for compute-sanitizer"),
    "traffic": ("traffic", "predicts what a launch moves; needs the extra bench"),
    "events": ("events", "simulates the CUDA kernels' launches; needs the extra bench"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    lines = "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"commands:\n{lines}"
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    chosen = parser.parse_args(arguments)
    module = importlib.import_module(f"benchmarks.gpu.{COMMANDS[chosen.command][0]}")
    inner = argparse.ArgumentParser(
        prog=f"python -m benchmarks gpu {chosen.command}",
        description=module.__doc__.split("\n")[0],
    )
    module.add_arguments(inner)
    return module.run(inner.parse_args(chosen.rest))
