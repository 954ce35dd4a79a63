"""Compiles the kernels ahead of time, on any machine, and reports what the assembler made of them.

    python -m srn_kernels.backends.triton.compile [--full] [--arch 80 90 gfx942] [--case NAME ...]

Fails if a kernel spills, if one whose rows are aligned does not load them 16 bytes at a time, or if
one does not order memory between CTAs; AMD targets are reported, not judged. Nothing comes from
Triton's cache.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srn_kernels.backends.triton import launch
from srn_kernels.backends.triton.backward import backward_kernel
from srn_kernels.backends.triton.forward import normalize_kernel
from srn_kernels.maths.matrix import state_layout

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ARCHITECTURES = ("80", "90", "100")
ARGUMENTS = ("*i32", "i32", "i32", "*i64", "*i64", "*i32", "*fp32", "*fp32", "*fp64")
# Bytes of a launch's asynchronous copies that must move 16 at a time where rows are aligned: the
# rest are u, and the odd tile of a mixed launch.
WIDE_SHARE = 0.85


class Case(NamedTuple):
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype = F32
    other: torch.dtype = F32  # of W_hat and G
    dim: int = 0
    wide: bool = True  # every row is aligned


# What `make test` compiles: few launches, which between them have every kind of body.
QUICK = {
    "wide and normal rows": Case([(1024, 1152), (1536, 13824), (4096, 64)]),
    "rows of 3072 to bfloat16": Case([(768, 3072)], F32, BF16),
    "odd rows and transposes": Case([(512, 27), (512, 256, 4, 4)], dim=1, wide=False),
}
# Every kind of block alone, at both ends of what a row in registers may be, then whole models.
CASES = {
    "narrow rows": Case([(4096, 64)]),
    "rows of 1152": Case([(1024, 1152)]),
    "rows of 8192": Case([(1024, 8192)]),
    "rows of 13824": Case([(1536, 13824)]),
    "rows of 25088": Case([(4096, 25088)]),
    "rows of 1152, bfloat16": Case([(1024, 1152)], BF16, BF16),
    "rows of 13824, bfloat16": Case([(1536, 13824)], BF16, BF16),
    "rows of 3072 to bfloat16": Case([(768, 3072)], F32, BF16),
    "rows of 3072, float16": Case([(768, 3072)], F16, F16),
    "odd rows": Case([(512, 27), (64, 1023)], wide=False),
    "odd rows, bfloat16": Case([(512, 27), (64, 1023)], BF16, BF16, wide=False),
    "conv transpose 4x4": Case([(512, 256, 4, 4)], dim=1),
    "conv transpose 3x3": Case([(512, 256, 3, 3)], dim=1, wide=False),
    "conv transpose 2x2": Case([(512, 256, 2, 2)], dim=1),
    "columns first": Case([(512, 256)], dim=1),
    "vit_b16": Case([(768, 768), (2304, 768), (3072, 768), (768, 3072), (1000, 768)]),
    "biggan_128_D": Case(
        [
            *((96, 27), (96, 864), (96, 3), (12, 96), (12, 96), (48, 96), (96, 48), (192, 864)),
            *((192, 1728), (192, 96), (384, 1728), (384, 3456), (384, 192), (768, 3456)),
            *((768, 6912), (768, 384), (1536, 6912), *[(1536, 13824)] * 3, (1536, 768)),
            *((1, 1536), (1000, 1536)),
        ],
        wide=False,
    ),
}


class Report(NamedTuple):
    """What the assembler made of one kernel."""

    architecture: str
    case: str
    backward: bool

    registers: int
    stack: int  # bytes a thread
    shared: int
    spills: int  # loads and stores of registers
    wide: float  # of the bytes of asynchronous copies (gfx: of loads), those moved 16 at a time
    ordered: bool  # waits acquire, and arrivals release
    seconds: float

    def faults(self, case: Case) -> list[str]:
        if self.architecture.startswith("gfx"):
            return []
        found = ["spills"] if self.spills or self.stack else []
        if case.wide and self.wide < WIDE_SHARE:
            found.append("lost its wide loads")
        if not self.ordered:
            found.append("does not order memory")
        return found


def make_plan(case: Case, backward: bool) -> launch.Plan:
    rows = [s[case.dim] for s in case.shapes]
    matrices = [(r, torch.Size(s).numel() // r) for r, s in zip(rows, case.shapes, strict=True)]
    offsets, _ = state_layout(matrices)
    layers = []
    for i, shape in enumerate(case.shapes):
        strides = torch.empty(shape, device="meta").stride()
        dtypes = (case.dtype, case.other)
        places = (offsets[i], i, None, True)
        layers.append(launch.Layer(shape, strides, case.dim, *dtypes, True, 1, *places))
    return launch.Plan(tuple(layers), torch.device("cpu"), backward)


def compile_plan(plan: launch.Plan, architecture: str) -> Any:
    kernel = backward_kernel if plan.backward else normalize_kernel
    names = kernel.arg_names
    constants = (plan.variants.slabs, plan.variants.rescales)
    signature = dict(zip(names, ARGUMENTS + ("constexpr",) * 2, strict=True))
    pointers = [i for i, kind in enumerate(ARGUMENTS) if kind[0] == "*"]
    source = ASTSource(
        kernel,
        signature,
        dict(zip(names[len(ARGUMENTS) :], constants, strict=True)),
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture), 32)
    return triton.compile(source, target=target, options=plan.options(target.backend))


def disassemble(cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run(
            [tool, *options, file.name], check=True, capture_output=True, text=True
        ).stdout


def wide_share(widths: Sequence[int]) -> float:
    return sum(b for b in widths if b == 16) / max(1, sum(widths))


def orders_memory(ptx: str) -> bool:
    """Every CTA acquires where it polls a counter, and where it adds to one after a barrier."""
    polls = re.findall(r"\bld\.global\.gpu\.acquire\b|\batom\.global\.gpu\.acquire\b", ptx)
    lines = [line.strip() for line in ptx.splitlines()]
    barrier, arrivals = 0, []
    for at, line in enumerate(lines):
        barrier = at if line.startswith("bar.sync") else barrier
        if re.search(r"\batom\.global\.gpu\.acq_rel\.add\b", line):
            # Nothing of the tile may be written between the barrier and the release.
            arrivals.append(not any("st.global" in x for x in lines[barrier:at]))
    return bool(polls) and len(arrivals) >= 2 and all(arrivals)


def make_report(architecture: str, name: str, case: Case, backward: bool) -> Report:
    plan = make_plan(case, backward)
    start = time.perf_counter()
    compiled = compile_plan(plan, architecture)
    seconds = time.perf_counter() - start
    shared = compiled.metadata.shared
    report = functools.partial(Report, architecture, name, backward)
    if architecture.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        count = {k: int(n) for k, n in re.findall(r"\.(\w+_count):\s*(\d+)", code)}
        loads = re.findall(r"\b(?:buffer|global)_load_(ushort|dwordx4|dwordx2|dword)\b", code)
        widths = [{"ushort": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}[x] for x in loads]
        spills = count["vgpr_spill_count"]
        return report(count["vgpr_count"], 0, shared, spills, wide_share(widths), True, seconds)
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", disassemble(cubin, "-res-usage"))
    code = disassemble(cubin, "-sass")
    widths = re.findall(r"\bLDGSTS\.E(?:\.BYPASS)?(?:\.LTC\d+B)?(\.64|\.128)?", code)
    return report(
        int(usage[1]),
        int(usage[2]),
        shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_share([{"": 4, ".64": 8, ".128": 16}[w] for w in widths]),
        orders_memory(compiled.asm["ptx"]),
        seconds,
    )


def never_cached() -> None:
    triton.knobs.compilation.always_compile = True


def run_all(work: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Report]:
    never_cached()
    if jobs == 1:
        yield from itertools.starmap(make_report, work)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(work)), context, never_cached
    ) as pool:
        yield from pool.map(make_report, *zip(*work, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    cases = {**CASES, **QUICK}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--full", action="store_true", help="every kind of block, whole models")
    parser.add_argument("--case", nargs="+", choices=cases)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    names = chosen.case or list(CASES if chosen.full else QUICK)
    work = [
        (architecture, name, cases[name], backward)
        for architecture, name, backward in itertools.product(chosen.arch, names, (False, True))
    ]
    print(f"triton {triton.__version__}, {len(work)} kernels")
    head = ("kernel", "registers", "shared", "spills", "16-byte", "seconds")
    print("{:50}{:>10}{:>9}{:>7}{:>9}{:>9}".format(*head))
    failed = 0
    for r in run_all(work, chosen.jobs):
        faults = r.faults(cases[r.case])
        failed += bool(faults)
        target = r.architecture if r.architecture.startswith("gfx") else f"sm_{r.architecture}"
        title = f"{target} {r.case}, {'backward' if r.backward else 'forward'}"
        print(
            f"{title:50}{r.registers:10}{r.shared:9}{r.spills:7}{r.wide:9.0%}"
            f"{r.seconds:9.1f}  {', '.join(faults)}",
            flush=True,
        )
    print(f"{failed} of {len(work)} kernels failed" if failed else "no kernel failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
