"""The stages of gpu-check: for 30 minutes on a GPU, and their rehearsal without one.

Limits are for one device and 16 cores; a stage that hangs costs its limit and no more. What would
make all other results worthless comes first, since time on a GPU may end early.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.measure import WORKLOADS
from benchmarks.gpu.training import IMAGES
from benchmarks.measure.store import ROOT

TOTAL = 30 * 60.0  # seconds, for all stages together
PLAIN = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own
INTERPRET = {"TRITON_INTERPRET": "1"}
RECORDS = ROOT / "build" / "gpu_check"  # last calls of the kernel tests


@dataclass(frozen=True)
class Stage:
    """A command in a process group of its own.

    limit: seconds; needs: the name of a tool without which it is skipped; after: it runs only if
    this stage failed; advisory: its failure is reported and does not count.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: str | None = None
    variables: dict[str, str] | None = None
    after: str | None = None
    advisory: bool = False


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def gpu(*arguments: str) -> tuple[str, ...]:
    return python("-m", "benchmarks", "gpu", *arguments)


def tests(name: str) -> str:
    """A test file or folder, wherever it lies under tests/."""
    (found,) = (ROOT / "tests").glob(f"**/{name}")
    return str(found.relative_to(ROOT))


def pytest(*arguments: str, workers: bool = False) -> tuple[str, ...]:
    """On all cores where compiling is most of the work and pytest-xdist is there."""
    parallel: tuple[str, ...] = ()
    if workers and importlib.util.find_spec("xdist"):
        parallel = ("-n", str(min(12, os.cpu_count() or 1)))
    # The project's own options ask for pytest-benchmark, which a GPU machine may lack.
    options = ("-o", "addopts=--strict-markers", "-x", "-v", "--tb=short", "-p", "no:cacheprovider")
    return python("-m", "pytest", *options, *parallel, *arguments)


def kernel_tests(
    backend: str, out: Path, *options: str, limit: float, reduce: float, device: str
) -> list[Stage]:
    """A backend's own tests up to the first failure, and what it asked for reduced to a layer."""
    records = RECORDS / backend
    record = ("-p", "benchmarks.gpu.recorder", "--record-backend", backend)
    record += ("--record-to", str(records), "--require-backend", backend)
    files = (tests(f"test_{backend}_kernels.py"), tests("test_gpu_kernels.py"))
    # "-k" of a later option wins: options that choose tests name the backend themselves
    chosen = ("-k", backend)
    name = f"tests {backend}"
    kept = ("--records", str(records), "--to", str(out / f"failing_{backend}.json"))
    seconds = ("--seconds", str(reduce - 10), "--device", device)
    return [
        Stage(name, pytest(*chosen, *options, *record, *files, workers=backend == "triton"), limit),
        Stage(
            f"reduce {backend}",
            gpu("reduce", "--backend", backend, *kept, *seconds),
            reduce,
            after=name,
        ),
    ]


def gpu_stages(out: Path, commit: Sequence[str] = ()) -> list[Stage]:
    rows = ("--out", str(out / "results.jsonl"), *commit)
    sanitizer = "compute-sanitizer"
    check = ("--error-exitcode", "9", "--launch-timeout", "0")
    small = gpu("small", "--backend", "cuda")
    memcheck = (sanitizer, "--tool", "memcheck", *check, *small)
    racecheck = (sanitizer, "--tool", "racecheck", *check, *small)
    return [
        Stage("build", gpu("build"), 150),
        Stage("memcheck", memcheck, 60, sanitizer, PLAIN),
        *kernel_tests("cuda", out, limit=120, reduce=45, device="cuda"),
        Stage("bits cuda", gpu("bits", "--backend", "cuda", *rows), 50),
        *kernel_tests("triton", out, limit=170, reduce=45, device="cuda"),
        Stage("bits triton", gpu("bits", "--backend", "triton", *rows), 50),
        Stage("launches", gpu("launches", *rows), 60),
        Stage("compile", warm_up(*WORKLOADS), 110),
        *(Stage(f"measure {w}", gpu("measure", "--workload", w, *rows), 75) for w in WORKLOADS),
        *(Stage(f"train {w}", gpu("training", "--workload", w, *rows), 80) for w in IMAGES),
        Stage("counters", gpu("counters", *rows), 60, "ncu"),
        Stage("device tests", pytest("--device", "cuda", tests("test_functional.py")), 60),
        Stage("racecheck", racecheck, 45, sanitizer, advisory=True),
    ]


def warm_up(*names: str, device: str = "cuda") -> tuple[str, ...]:
    """Compiles the kernels of these workloads at once, into Triton's cache."""
    program = (
        "import subprocess, sys; once = [sys.executable, *'-m benchmarks gpu measure --repeats 1 "
        f"--budget 0 --backend triton --device {device} --workload'.split()]; "
        "running = [subprocess.Popen([*once, name]) for name in sys.argv[1:]]; "
        "sys.exit(max(abs(p.wait()) for p in running))"
    )
    return python("-c", program, *names)


def shim(*arguments: str) -> tuple[str, ...]:
    """A command of this package with the CUDA kernels on the CPU."""
    program = (
        "import sys; sys.path.insert(0, 'tests/support'); import cuda_shim; cuda_shim.install(); "
        "from benchmarks.gpu.commands import main; sys.exit(main(sys.argv[1:]))"
    )
    return python("-c", program, *arguments, "--backend", "cuda", "--device", "cpu")


def rehearsal_stages(out: Path, commit: Sequence[str] = ()) -> list[Stage]:
    """The same programs without a GPU: the CUDA kernels on the shim, Triton's in its interpreter.

    Their times mean nothing.
    """
    shim_rows = ("--out", str(out / "results.jsonl"), *commit)
    rows = ("--device", "cpu", *shim_rows)
    cpu, triton = ("--backend", "cpu"), ("--backend", "triton")
    sanitizer = ("compute-sanitizer", "--version")
    on_cpu = pytest("--device", "cpu", tests("test_functional.py"), "-k", "cpu")
    once = ("--repeats", "1", "--budget", "0")
    few = ("-k", "triton and (mixed or unaligned or projection or padding)")
    tiny = ("--images", "1", "3", "32", "32")
    interpreted = [
        Stage(s.name, s.command, s.limit, variables=INTERPRET, after=s.after)
        for s in kernel_tests("triton", out, *few, limit=600, reduce=120, device="cpu")
    ]
    return [
        Stage("build", gpu("build", "--dry-run", "--arch", "9.0"), 60, "nvcc"),
        Stage("memcheck", sanitizer, 30, sanitizer[0]),
        Stage("small cuda", shim("small"), 600),
        Stage("small triton", gpu("small", "--device", "cpu", *triton), 600, None, INTERPRET),
        *kernel_tests("cuda", out, "--cuda-shim", limit=600, reduce=120, device="cpu"),
        Stage("bits cuda", shim("bits", "--rounds", "2", *shim_rows), 600),
        Stage("bits cpu", gpu("bits", "--rounds", "20", *cpu, *rows), 600),
        *interpreted,
        Stage("bits triton", gpu("bits", "--rounds", "1", *triton, *rows), 600, None, INTERPRET),
        Stage("launches", gpu("launches", *triton, *rows), 600, None, INTERPRET),
        Stage("compile", warm_up("1x8x8", device="cpu"), 600, None, INTERPRET),
        Stage("measure cuda", shim("measure", "--workload", "1x8x8", *once, *shim_rows), 600),
        Stage(
            "measure triton",
            gpu("measure", "--workload", "1x8x8", *once, *triton, *rows),
            600,
            variables=INTERPRET,
        ),
        *(
            Stage(f"measure {w}", gpu("measure", "--workload", w, *once, *cpu, *rows), 600)
            for w in ("2x48x64", "2x48x64@bfloat16")
        ),
        *(
            Stage(f"train {w}", gpu("training", "--workload", w, *once, *tiny, *cpu, *rows), 600)
            for w in IMAGES
        ),
        Stage("counters", ("ncu", "--version"), 30, "ncu"),
        Stage("device tests", on_cpu, 600),
        Stage("racecheck", sanitizer, 30, sanitizer[0], advisory=True),
    ]
