"""Everything that a GPU machine can tell, in stages, without network: make gpu-check.

    make gpu-check OUT=folder [PYTHON=python3] [GPU_CHECK_ARGS=--resume]

OUT gets results.jsonl (a line a stage, a measurement and a target, with versions, device and
commit), log.txt, summary.md, and failing_*.json where a kernel test failed. A stage writes its
lines before the next begins. A call starts no stage that its time may not suffice for; --resume
goes on behind the last stage that ended. The exit status is 0 if all stages are done and none
failed, 3 if stages are left, else 1; a missed target is a result, not a failure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu.plan import RECORDS, TOTAL, Stage, gpu_stages, rehearsal_stages
from benchmarks.gpu.reduce import kill
from benchmarks.gpu.rows import Row, environment
from benchmarks.gpu.targets import summary, target_rows
from benchmarks.measure.store import ROOT

CALL = 570.0  # seconds, of one call
MORE = 3  # exit status
STARTS = 2  # of a stage that never came to an end


@dataclass(frozen=True)
class Outcome:
    """How a stage went: passed, failed, timed out, cut off, or skipped (nothing to do there)."""

    stage: str
    state: str
    seconds: float
    exit_code: int | None
    tests: dict[str, int]  # outcomes of pytest, by name
    tail: str
    advisory: bool = False
    kind: str = "stage"

    @property
    def bad(self) -> bool:
        return self.state not in ("passed", "skipped") and not self.advisory


def run_stage(stage: Stage, log: Path) -> Outcome:
    """Runs a stage in a process group of its own, which dies at the limit."""

    def outcome(state: str, code: int | None = None, tail: str = "", tests=()) -> Outcome:
        seconds = time.monotonic() - start
        return Outcome(stage.name, state, seconds, code, dict(tests), tail, stage.advisory)

    start = time.monotonic()
    if stage.needs and shutil.which(stage.needs) is None:
        return outcome("skipped", tail=f"{stage.needs} is not on the PATH")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **(stage.variables or {}), "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    with log.open("a+", errors="replace") as file:
        file.write(f"\n==== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return outcome("failed", tail=str(error))
        try:
            code: int | None = process.wait(stage.limit)
            state = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            code, state = kill(process), "timed out"
        finally:
            if process.returncode is None:
                kill(process)
        file.seek(begin)
        text = file.read()
    if state == "timed out" and code is None:
        text += "\nit did not die of SIGKILL: the device or its driver may hang\n"
    tests = Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b(?= +(?:tests/|\[))", text))
    return outcome(state, code, "\n".join(text.splitlines()[-12:]), tests)


class Results:
    """OUT/results.jsonl: what is done, and where the next line goes."""

    def __init__(self, out: Path, base: Row, resume: bool) -> None:
        self.path, self.base = out / "results.jsonl", base
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            for path in (self.path, out / "log.txt"):
                path.write_text("")
            shutil.rmtree(RECORDS, ignore_errors=True)

    def rows(self) -> list[dict]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def write(self, *rows: dict) -> None:
        with self.path.open("a") as file:
            for row in rows:
                file.write(json.dumps({**asdict(self.base), **row}) + "\n")

    def outcomes(self) -> dict[str, Outcome]:
        names = Outcome.__dataclass_fields__
        found = [r for r in self.rows() if r["kind"] == "stage"]
        return {r["stage"]: Outcome(**{k: r[k] for k in names}) for r in found}

    def starts(self) -> Counter[str]:
        return Counter(r["stage"] for r in self.rows() if r["kind"] == "start")


def next_outcome(stage: Stage, results: Results, log: Path) -> Outcome:
    """Of a stage that is due."""
    skipped = Outcome(stage.name, "skipped", 0.0, None, {}, "", stage.advisory)
    if stage.after:
        before = results.outcomes().get(stage.after)
        if before is None or not before.bad:
            return skipped
    if results.starts()[stage.name] >= STARTS:
        return Outcome(stage.name, "cut off", 0.0, None, {}, f"{STARTS} calls ended within it")
    results.write({"kind": "start", "stage": stage.name})
    return run_stage(stage, log)


def check(
    out: Path,
    stages: Sequence[Stage],
    base: Row,
    *,
    resume: bool = False,
    call: float = CALL,
    again: bool = False,
) -> int:
    """Runs the stages that are due and fit the call; returns the exit status.

    again: stages that have ended run once more.
    """
    results = Results(out, base, resume)
    deadline = time.monotonic() + call
    done = {} if again else results.outcomes()
    left = [stage for stage in stages if stage.name not in done]
    while left:
        stage = left[0]
        if time.monotonic() + stage.limit > deadline:
            print(f"{len(left)} stages are left: run again with --resume", flush=True)
            break
        outcome = next_outcome(stage, results, out / "log.txt")
        results.write(asdict(outcome))
        print(f"{outcome.stage}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)
        if outcome.state not in ("passed", "skipped"):
            print(outcome.tail, flush=True)
        left.pop(0)
        write_summary(out, results, stages)
    if not left:
        results.write(*target_rows(results.rows()))
    print(write_summary(out, results, stages))
    bad = any(outcome.bad for outcome in results.outcomes().values())
    return 1 if bad and not left else MORE if left else 0


def write_summary(out: Path, results: Results, stages: Sequence[Stage]) -> str:
    found, base = results.outcomes(), results.base
    place = f"{base.device}, torch {base.torch}, triton {base.triton}, commit {base.commit}"
    place += " with local changes" if base.dirty else ""
    ended = [found[s.name] for s in stages if s.name in found]
    waiting = [s.name for s in stages if s.name not in found]
    text = summary(ended, waiting, target_rows(results.rows()), place)
    (out / "summary.md").write_text(text)
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on where the last call ended")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, done or not")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on the CPU")
    parser.add_argument("--call", type=float, help=f"seconds of this call; {CALL:.0f} on a GPU")
    parser.add_argument("--list", action="store_true", help="the stages and their limits")
    parser.add_argument("--commit", help="of a tree that came without its repository")


def run(chosen: argparse.Namespace) -> int:
    out = chosen.out.resolve()
    commit = ("--commit", chosen.commit) if chosen.commit else ()
    stages = (rehearsal_stages if chosen.rehearse else gpu_stages)(out, commit)
    if unknown := set(chosen.only or ()) - {s.name for s in stages}:
        raise SystemExit(f"--only {sorted(unknown)}: stages are {[s.name for s in stages]}")
    if chosen.only:
        stages = [s for s in stages if s.name in chosen.only]
    if chosen.list:
        ends = 0.0
        for stage in stages:
            ends += stage.limit
            print(f"{stage.limit:5.0f} s, at the latest after {ends:5.0f} s  {stage.name}")
        print(f"{ends:5.0f} s of {TOTAL:.0f} at most")
        return 0
    if not chosen.rehearse and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --rehearse does without one")
    call = chosen.call or (math.inf if chosen.rehearse else CALL)
    if never := [s.name for s in stages if s.limit > call]:
        raise SystemExit(f"--call {call:.0f} is too short for {', '.join(never)}")
    base = environment(torch.device("cpu" if chosen.rehearse else "cuda"), chosen.commit)
    resume = chosen.resume or bool(chosen.only)
    return check(out, stages, base, resume=resume, call=call, again=bool(chosen.only))
