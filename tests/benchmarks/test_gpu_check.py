"""The command for GPU machines, rehearsed without one: its stages, limits, files and resumption."""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import commands, plan
from benchmarks.gpu.check import MORE, Outcome, check, run_stage
from benchmarks.gpu.plan import Stage, python
from benchmarks.gpu.rows import environment
from benchmarks.gpu.targets import summary, target_rows

BASE = environment(torch.device("cpu"), commit="abc")


def rows_of(out: Path, kind: str) -> list[dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def says(text: str) -> tuple[str, ...]:
    return python("-c", f"print({text!r})")


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "RECORDS", tmp_path / "records")


def test_a_failing_stage_does_not_stop_the_next_and_the_status_tells(tmp_path):
    broken = python("-c", "raise SystemExit('no kernel')")
    stages = [
        Stage("first", says("well"), 60),
        Stage("broken", broken, 60),
        Stage("why", says("looked into it"), 60, after="broken"),
        Stage("why not", says("not needed"), 60, after="first"),
        Stage("slow", python("-c", "import time; time.sleep(300)"), 1.5),
        Stage("no tool", ("no-such-tool",), 60, needs="no-such-tool"),
        Stage("no program", ("/no/such/program",), 60),
        Stage("last", python("-c", "import os; print(os.environ['X'])"), 60, variables={"X": "x"}),
    ]
    start = time.monotonic()
    assert check(tmp_path, stages, BASE) == 1
    assert time.monotonic() - start < 60
    found = {r["stage"]: r["state"] for r in rows_of(tmp_path, "stage")}
    states = ["passed", "failed", "passed", "skipped", "timed out", "skipped", "failed", "passed"]
    assert found == dict(zip([s.name for s in stages], states, strict=True))
    for kind in ("stage", "target"):
        assert {r["commit"] for r in rows_of(tmp_path, kind)} == {"abc"}
    log = (tmp_path / "log.txt").read_text()
    assert "no kernel" in log
    assert "not needed\n" not in log
    assert "| broken | failed |" in (tmp_path / "summary.md").read_text()


def test_an_advisory_failure_does_not_count(tmp_path):
    stage = Stage("race", python("-c", "raise SystemExit(1)"), 60, advisory=True)
    assert check(tmp_path, [stage], BASE) == 0
    assert "failed (advisory)" in (tmp_path / "summary.md").read_text()


def test_a_call_starts_what_fits_and_the_next_goes_on(tmp_path):
    slow = python("-c", "import time; time.sleep(2)")
    stages = [Stage("one", slow, 8), Stage("two", says("2"), 8), Stage("three", says("3"), 5)]
    assert check(tmp_path, stages, BASE, call=9.0) == MORE
    assert [r["stage"] for r in rows_of(tmp_path, "stage")] == ["one"]
    assert not rows_of(tmp_path, "target")
    assert "| two | waits" in (tmp_path / "summary.md").read_text()
    assert check(tmp_path, stages, BASE, resume=True) == 0
    assert [r["stage"] for r in rows_of(tmp_path, "stage")] == ["one", "two", "three"]
    assert check(tmp_path, stages[1:2], BASE, resume=True, again=True) == 0
    assert Counter(r["stage"] for r in rows_of(tmp_path, "stage"))["two"] == 2
    assert check(tmp_path, stages, BASE) == 0  # from the start, in new files
    assert len(rows_of(tmp_path, "stage")) == 3


def test_a_stage_that_calls_end_within_is_given_up(tmp_path):
    stages = [Stage("first", says("1"), 60), Stage("fatal", says("2"), 60)]
    results = gpu_check.Results(tmp_path, BASE, resume=False)
    results.write({"kind": "start", "stage": "fatal"})
    assert check(tmp_path, stages, BASE, resume=True) == 0  # once more
    for _ in range(2):
        results.write({"kind": "start", "stage": "third"})
    assert check(tmp_path, [*stages, Stage("third", says("3"), 60)], BASE, resume=True) == 1
    assert rows_of(tmp_path, "stage")[-1]["state"] == "cut off"


def test_what_a_stage_started_dies_with_it(tmp_path):
    program = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300']); "
    program += "print(p.pid, flush=True); time.sleep(300)"
    outcome = run_stage(Stage("parent", python("-c", program), 2.0), tmp_path / "log")
    assert outcome.state == "timed out"
    child = int(outcome.tail.splitlines()[-1])
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child runs on")


def test_a_process_that_outlives_its_kill_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "kill", lambda process: process.kill())  # and no word of it
    outcome = run_stage(
        Stage("stuck", python("-c", "import time; time.sleep(9)"), 0.5), tmp_path / "l"
    )
    assert (outcome.state, outcome.exit_code) == ("timed out", None)
    assert "SIGKILL" in outcome.tail


def test_outcomes_of_tests_are_counted_with_and_without_workers(tmp_path):
    lines = [
        "tests/a.py::b PASSED   [ 50%]",
        "[gw1] [ 60%] FAILED tests/a.py::c ",
        "x SKIPPED (no)",
    ]
    program = f"print({chr(10).join(lines)!r})"
    outcome = run_stage(Stage("tests", python("-c", program), 60), tmp_path / "log")
    assert outcome.tests == {"PASSED": 1, "FAILED": 1}


@pytest.mark.parametrize("make", [plan.gpu_stages, plan.rehearsal_stages])
def test_the_stages_name_programs_that_exist_and_each_other(tmp_path, make):
    stages = make(tmp_path)
    names = [s.name for s in stages]
    assert len(set(names)) == len(names)
    for stage in stages:
        pairs = list(zip(stage.command, stage.command[1:], strict=False))
        assert all(importlib.util.find_spec(a) for b, a in pairs if b == "-m"), stage
        assert all(a in commands.COMMANDS for b, a in pairs if b == "gpu"), stage
        for file in (a for a in stage.command if a.startswith("tests/") or a == "setup.py"):
            assert (gpu_check.ROOT / file).exists()
        assert stage.after is None or stage.after in names[: names.index(stage.name)]


def test_the_plan_fits_half_an_hour_in_calls_that_all_make_progress(tmp_path):
    limits = [s.limit for s in plan.gpu_stages(tmp_path)]
    assert sum(limits) <= plan.TOTAL
    assert max(limits) <= 180
    calls, left = 1, gpu_check.CALL
    for limit in limits:
        if limit > left:
            calls, left = calls + 1, gpu_check.CALL
        left -= limit
    assert calls <= 4  # where every stage takes its limit


def test_the_rehearsal_leaves_no_stage_out(tmp_path):
    rehearsed = {s.name for s in plan.rehearsal_stages(tmp_path)}
    named = {s.name for s in plan.gpu_stages(tmp_path)}
    assert {n for n in named if not n.startswith("measure ")} <= rehearsed
    assert {"measure cuda", "measure triton"} <= rehearsed


def test_what_makes_other_results_worthless_comes_first(tmp_path):
    names = [s.name.partition(" ")[0] for s in plan.gpu_stages(tmp_path)]
    order = list(dict.fromkeys(names))
    assert order[:5] == ["build", "memcheck", "tests", "reduce", "bits"]
    assert order.index("bits") < order.index("measure") < order.index("train")


def test_targets_name_what_was_measured():
    row = replace(BASE, workload="vit_b16", mode="forward", metric="device_over_copy_x", p50=1.2)
    rows = [
        {**vars(row), "provider": "functional_triton", "rank_ratio": 0.7},
        {**vars(row), "provider": "module_triton", "rank_ratio": 0.7, "p50": 1.6},
        {**vars(row), "provider": "foreach", "rank_ratio": 1.0},
    ]
    (first, *others) = target_rows(rows)
    assert first["met"] == {"functional_triton@0.7": True, "module_triton@0.7": False}
    assert not any(t["values"] for t in others)
    ended = Outcome("a", "passed", 1.0, 0, {}, "")
    assert "not measured" in summary([ended], [], others, "here")


def test_without_a_gpu_the_command_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no GPU"):
        commands.main(["check", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="too short for build"):
        commands.main(["check", "--out", str(tmp_path / "out"), "--rehearse", "--call", "59"])
    with pytest.raises(SystemExit, match="nonsense"):
        commands.main(["check", "--out", str(tmp_path / "out"), "--only", "nonsense"])
    assert not (tmp_path / "out").exists()
