"""Everything that a GPU machine can tell, in one command of at most 8 minutes and without network.

    make gpu-check OUT=folder [PYTHON=python3]

Stages run one after the other, each a process with a time limit of its own; one that fails or runs
out of time does not stop the next. OUT gets results.jsonl (a line a stage, a measurement and a
target, with versions, device and commit), log.txt and summary.md. The exit status is 0 if no stage
failed; a missed target is a result, not a failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.cases import workloads
from benchmarks.gpu import rows as gpu
from benchmarks.measure import store

ROOT = store.ROOT
BUDGET = 470.0  # seconds, for all stages together
# Tests whose tensors follow --device: every backend that serves there, and models on it.
DEVICE_TESTS = (
    "tests/core",
    *("tests/model/test_rounds.py", "tests/model/test_layers.py"),
)


@dataclass(frozen=True)
class Stage:
    """A command; the name of a tool that it needs; variables for its environment."""

    name: str
    command: tuple[str, ...]
    limit: float  # seconds
    needs: str | None = None
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a stage went: passed, failed, timed out or skipped (its tool is not there)."""

    stage: str
    state: str
    seconds: float
    exit_code: int | None
    tests: dict[str, int]  # outcomes of pytest, by name
    tail: str
    kind: str = "stage"

    @property
    def bad(self) -> bool:
        return self.state in ("failed", "timed out")


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    """All cores where pytest-xdist is there: compiling is most of the work."""
    workers = ("-n", str(min(12, os.cpu_count() or 1)))
    parallel = workers if importlib.util.find_spec("xdist") else ()
    return python(
        "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *parallel, *arguments
    )


def gpu_stages(out: Path, commit: tuple[str, ...] = ()) -> list[Stage]:
    rows = ("--out", str(out / "results.jsonl"), *commit)
    small = python("-m", "benchmarks", "gpu", "small")
    sanitizer = "compute-sanitizer"
    check = ("--error-exitcode", "9", "--launch-timeout", "0")
    plain = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # every tensor an allocation of its own
    return [
        Stage("build", python("setup.py", "build_ext", "--inplace"), 110, variables=build_jobs()),
        Stage("backends", python("-m", "srn_kernels.info"), 20),
        Stage("launches", python("-m", "benchmarks", "gpu", "launches", *rows), 60),
        Stage("compile", warm_up(), 60),
        Stage("measure", python("-m", "benchmarks", "gpu", "measure", *rows), 120),
        Stage("memcheck", (sanitizer, "--tool", "memcheck", *check, *small), 50, sanitizer, plain),
        Stage("racecheck", (sanitizer, "--tool", "racecheck", *check, *small), 50, sanitizer),
        Stage("device tests", pytest("--device", "cuda", *DEVICE_TESTS), 120),
        Stage("tests", pytest("tests"), 150),
    ]


def build_jobs() -> tuple[tuple[str, str], ...]:
    return (("MAX_JOBS", str(os.cpu_count() or 1)),)


def warm_up() -> tuple[str, ...]:
    """Compiles the kernels of all measured workloads at once, into Triton's cache."""
    program = (
        "import subprocess, sys; once = [sys.executable, *'-m benchmarks gpu measure --repeats 1 "
        "--budget 0 --workload'.split()]; "
        "running = [subprocess.Popen([*once, name]) for name in sys.argv[1:]]; "
        "sys.exit(max(abs(p.wait()) for p in running))"
    )
    return python("-c", program, *workloads.CORE)


def rehearsal_stages(out: Path, commit: tuple[str, ...] = ()) -> list[Stage]:
    """The same plumbing in Triton's interpreter; its times mean nothing."""
    cpu = ("--device", "cpu", "--out", str(out / "results.jsonl"), *commit)
    tiny = ("--workload", "1x8x8", "--repeats", "1", "--budget", "0")
    interpret = (("TRITON_INTERPRET", "1"),)
    return [
        Stage("backends", python("-m", "srn_kernels.info"), 60),
        Stage(
            "launches", python("-m", "benchmarks", "gpu", "launches", *cpu), 120, None, interpret
        ),
        Stage(
            "measure",
            python("-m", "benchmarks", "gpu", "measure", *cpu, *tiny),
            120,
            None,
            interpret,
        ),
        Stage("memcheck", ("compute-sanitizer", "--version"), 30, "compute-sanitizer"),
        Stage("tests", pytest("tests/backends/test_triton_tables.py"), 60),
    ]


def run_stage(stage: Stage, limit: float, log: Path) -> Outcome:
    """Runs a stage in a process group of its own, which dies at the limit."""
    if stage.needs and shutil.which(stage.needs) is None:
        return Outcome(stage.name, "skipped", 0.0, None, {}, f"{stage.needs} is not on the PATH")
    if limit <= 1:
        return Outcome(stage.name, "timed out", 0.0, None, {}, "no time was left to start it")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **dict(stage.variables), "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    start = time.monotonic()
    with log.open("a+") as file:
        file.write(f"\n==== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(stage.name, "failed", 0.0, None, {}, str(error))
        try:
            code = process.wait(limit)
            state = "failed" if code else "passed"
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            code, state = process.wait(), "timed out"
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        file.seek(begin)
        text = file.read()
    tests = Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b(?= +(?:tests/|\[))", text))
    tail = "\n".join(text.splitlines()[-12:])
    return Outcome(stage.name, state, time.monotonic() - start, code, dict(tests), tail)


@dataclass(frozen=True)
class Target:
    """A bound on one measured number, on one H200."""

    workload: str
    mode: str
    metric: str
    bound: float
    at_most: bool


TARGETS = (
    Target("vit_b16", "forward", "device_over_copy_x", 1.4, True),
    Target("biggan_128_D_ch96", "forward", "device_over_copy_x", 1.7, True),
    Target("sngan_cifar_resnet_D", "forward", "step_speedup_over_torch_sn_x", 8.0, False),
    Target("real_esrgan_unet_D", "forward", "step_speedup_over_torch_sn_x", 8.0, False),
)


def target_rows(rows: Sequence[dict]) -> list[dict]:
    """Of each target: the medians of every way to call our kernels."""
    found = []
    for target in TARGETS:
        values = {
            f"{r['provider']}@{r['rank_ratio']:g}": r["p50"]
            for r in rows
            if r["kind"] == "gpu"
            and (r["workload"], r["mode"], r["metric"])
            == (target.workload, target.mode, target.metric)
            and r["provider"].partition("_")[0] in ("functional", "module", "graph")
        }
        met = {
            k: v <= target.bound if target.at_most else v >= target.bound for k, v in values.items()
        }
        found.append({"kind": "target", **asdict(target), "values": values, "met": met})
    return found


def summary(outcomes: Sequence[Outcome], targets: Sequence[dict], place: str) -> str:
    lines = [f"# gpu-check\n\n{place}\n", "| stage | state | s | tests |", "|---|---|---|---|"]
    for o in outcomes:
        tests = ", ".join(f"{n} {name.lower()}" for name, n in sorted(o.tests.items()))
        lines.append(f"| {o.stage} | {o.state} | {o.seconds:.0f} | {tests} |")
    for t in targets:
        sign = "at most" if t["at_most"] else "at least"
        values = ", ".join(f"{k} {v:.2f}" for k, v in t["values"].items()) or "not measured"
        what = f"{t['workload']} {t['mode']} {t['metric']} {sign} {t['bound']}"
        lines.append(f"\n{what}: {values}")
    return "\n".join(lines) + "\n"


def check(out: Path, stages: Sequence[Stage], base: gpu.Row, budget: float = BUDGET) -> int:
    """Runs the stages and writes everything under ``out``; the number of stages that went wrong."""
    out.mkdir(parents=True, exist_ok=True)
    results, log = out / "results.jsonl", out / "log.txt"
    for path in (results, log):
        path.write_text("")
    deadline = time.monotonic() + budget
    outcomes = []
    for stage in stages:
        outcome = run_stage(stage, min(stage.limit, deadline - time.monotonic()), log)
        outcomes.append(outcome)
        print(f"{outcome.stage}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)
        if outcome.bad:
            print(outcome.tail, flush=True)
        with results.open("a") as file:
            file.write(json.dumps({**asdict(base), **asdict(outcome)}) + "\n")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    targets = target_rows(rows)
    with results.open("a") as file:
        for target in targets:
            file.write(json.dumps({**asdict(base), **target}) + "\n")
    place = f"{base.device}, torch {base.torch}, triton {base.triton}, commit {base.commit}"
    text = summary(outcomes, targets, place + (" with local changes" if base.dirty else ""))
    (out / "summary.md").write_text(text)
    print(text)
    return sum(o.bad for o in outcomes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages")
    parser.add_argument("--commit", help="of a tree that came without its repository")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu rehearses without one")
    out = chosen.out.resolve()
    commit = ("--commit", chosen.commit) if chosen.commit else ()
    stages = (gpu_stages if chosen.device == "cuda" else rehearsal_stages)(out, commit)
    base = gpu.environment(torch.device(chosen.device), chosen.commit)
    return 1 if check(out, stages, base, chosen.budget) else 0


if __name__ == "__main__":
    sys.exit(main())
