"""Compiles csrc/cuda/*.cu to machine code, on any machine with nvcc: registers, spills, loops.

    python -m srn_kernels.backends.cuda.compile [--arch 80 90a 100] [--full]

Fails if a kernel spills, if a target lost its asynchronous 16-byte or bulk copies, or if an inner
loop takes more instructions or global loads for a unit of W than sass.py allows, or is not found.
The kernels for many layers, the same code with a larger table, are compiled with --full. Needs
neither a GPU nor a CUDA build of torch. Where nvcc is not found it says so and succeeds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from srn_kernels.backends.cuda.sass import LIMITS, Loop, disassemble, find_disassembler, loops

CSRC = Path(__file__).parents[3] / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr")  # as in setup.py
FEW_LAYERS = "-DSRN_FEW_LAYERS"
TYPES = {"f": "float32", "d": "float64"}
# What must be found in each kernel: the loops of its phases, for each of its types.
PHASES = {"normalize": ("slab", "rescale"), "backward": ("gather", "gradient")}
ELEMENTS = {"float32": ("float32", "bfloat16", "float16"), "float64": ("float64",)}


class Report(NamedTuple):
    """What the assembler made of one kernel."""

    name: str
    registers: int
    stack: int  # bytes of a thread
    spills: int  # bytes stored and loaded
    shared: int  # static; the slots come on top at the launch

    @property
    def faults(self) -> list[str]:
        return ["spills"] if self.spills or self.stack else []


class Compiled(NamedTuple):
    kernels: list[Report]
    loops: list[Loop]
    faults: list[str]
    seconds: float


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def readable(mangled: str) -> str:
    """normalize_kernelIfLi62E... -> "normalize, float32, up to 62 layers"."""
    found = re.search(r"(normalize|backward)_kernelI([fd])Li(\d+)E", mangled)
    return f"{found[1]}, {TYPES[found[2]]}, up to {found[3]} layers" if found else mangled


def parse(report: str) -> list[Report]:
    """ptxas -v, which tells of a kernel in several lines."""
    kernels = []
    for block in report.split("Compiling entry function ")[1:]:
        name = readable(block.split("'")[1])
        # A kernel's own figures, and those of functions that it calls.
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        used = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        kernels.append(
            Report(
                name,
                int(used[1]),
                sum(int(stack) for stack, _, _ in frames),
                sum(int(stores) + int(loads) for _, stores, loads in frames),
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def copies_of(ptx: str, architecture: str) -> list[str]:
    """What is missing of the copies that a target should have."""
    bulk = int(re.match(r"\d+", architecture)[0]) >= 90
    wanted = "cp.async.bulk.shared::cluster.global" if bulk else "cp.async.cg.shared.global"
    return [] if wanted in ptx else [f"no {wanted}"]


def missing(kernels: Sequence[Report], found: Sequence[Loop]) -> list[str]:
    """The loops that should have been counted and were not."""
    counted = {(readable(loop.kernel), loop.phase, loop.types) for loop in found}
    faults = []
    for kernel in kernels:
        direction, _, rest = kernel.name.partition(", ")
        for phase in PHASES.get(direction, ()):
            faults += [
                f"{kernel.name}: no loop of {phase} of {elements} was found"
                for elements in ELEMENTS[rest.partition(", ")[0]]
                if (kernel.name, phase, elements) not in counted
            ]
    return faults


def compile_for(nvcc: str, source: Path, architecture: str, full: bool) -> Compiled:
    start = time.perf_counter()
    found: list[Loop] = []
    with tempfile.TemporaryDirectory() as folder:
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, *FLAGS, "-Xptxas", "-v", "-gencode", target, "-cubin", "--keep"]
        command += [] if full else [FEW_LAYERS]
        command += ["--keep-dir", folder, "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return Compiled([], [], [done.stderr.strip()], time.perf_counter() - start)
        ptx = "".join(p.read_text() for p in Path(folder).glob("*.ptx"))
        faults = copies_of(ptx, architecture)
        if tool := find_disassembler():
            found = loops(disassemble(tool, cubin))
            faults += [] if found else ["no inner loop was found"]
        else:
            faults.append("no cuobjdump to count instructions with: triton's wheel has one")
    kernels = parse(done.stderr)
    faults += missing(kernels, found) if kernels else ["no kernel was compiled"]
    return Compiled(kernels, found, faults, time.perf_counter() - start)


def summary(found: Sequence[Loop]) -> list[tuple[str, list[str]]]:
    """A line for each kernel's phase and types, and its faults."""
    groups: dict[tuple[str, str, str], list[Loop]] = {}
    for loop in found:
        groups.setdefault((readable(loop.kernel), loop.phase, loop.types), []).append(loop)
    lines = []
    for (kernel, phase, types), same in sorted(groups.items()):
        each = [loop.each for loop in same]
        loads = max(loop.global_loads / loop.units for loop in same)
        text = (
            f"{kernel}: {phase} of {types}, {min(each):.1f} to {max(each):.1f} instructions and "
            f"{loads:.1f} global loads a unit, aim {LIMITS[phase]:g}, at most {same[0].limit:g}"
        )
        lines.append((text, sorted({fault for loop in same for fault in loop.faults})))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--full", action="store_true", help="the kernels for many layers too")
    parser.add_argument("--csrc", type=Path, default=CSRC, help="the folder of the sources")
    chosen = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("csrc/cuda: nvcc was not found, nothing was compiled")
        return 0
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    print(f"nvcc {re.search(r'V([0-9.]+)', version)[1]}")
    print("{:54}{:>10}{:>8}{:>8}{:>8}".format("kernel", "registers", "shared", "stack", "spills"))
    # The longest first, so that no core is left with one at the end: forward takes twice as long.
    jobs = [(s, a) for s in sorted(chosen.csrc.glob("*.cu"), reverse=True) for a in chosen.arch]
    failed = not jobs
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, a), made in zip(
            jobs, pool.map(lambda job: compile_for(nvcc, *job, chosen.full), jobs), strict=True
        ):
            for k in made.kernels:
                print(
                    f"{f'sm_{a} {k.name}':54}{k.registers:10}{k.shared:8}{k.stack:8}{k.spills:8}"
                    f"  {', '.join(k.faults)}"
                )
                failed |= bool(k.faults)
            for text, faults in summary(made.loops):
                print(f"sm_{a} {text}{''.join(f': {fault}' for fault in faults)}")
                failed |= bool(faults)
            for fault in made.faults:
                print(f"sm_{a} {source.name}: {fault}")
                failed = True
            print(f"sm_{a} {source.name}: {made.seconds:.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
