"""The command for GPU machines, rehearsed without one: its stages, limits and files."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import rows as gpu
from benchmarks.gpu.check import Stage, check, python, run_stage, summary, target_rows
from benchmarks.measure.timing import Samples

BASE = gpu.environment(torch.device("cpu"), commit="abc")


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_failing_stage_does_not_stop_the_next_and_the_count_tells(tmp_path, capfd):
    stages = [
        Stage("first", python("-c", "print('well')"), 60),
        Stage("broken", python("-c", "raise SystemExit('no kernel')"), 60),
        Stage("slow", python("-c", "import time; time.sleep(300)"), 1.5),
        Stage("no tool", ("no-such-tool",), 60, needs="no-such-tool"),
        Stage("no program", ("/no/such/program",), 60),
        Stage(
            "last", python("-c", "import os; print(os.environ['WHAT'])"), 60, None, (("WHAT", "x"),)
        ),
    ]
    start = time.monotonic()
    assert check(tmp_path, stages, BASE) == 3
    assert time.monotonic() - start < 60
    found = {r["stage"]: r["state"] for r in rows_of(tmp_path) if r["kind"] == "stage"}
    states = ["passed", "failed", "timed out", "skipped", "failed", "passed"]
    assert found == dict(zip([s.name for s in stages], states, strict=True))
    assert all(r["commit"] == "abc" and r["torch"] == torch.__version__ for r in rows_of(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert "well" in log
    assert "no kernel" in log
    assert "| broken | failed |" in (tmp_path / "summary.md").read_text()


def test_what_a_stage_started_dies_with_it(tmp_path):
    program = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300']); "
    program += "print(p.pid, flush=True); time.sleep(300)"
    outcome = run_stage(Stage("parent", python("-c", program), 60), 2.0, tmp_path / "log")
    assert outcome.state == "timed out"
    child = int(outcome.tail.splitlines()[-1])
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child runs on")


def test_without_time_left_a_stage_is_not_started(tmp_path):
    outcomes = check(tmp_path, [Stage("late", python("-c", "print('ran')"), 60)], BASE, budget=0.5)
    assert outcomes == 1
    assert "ran\n" not in (tmp_path / "log.txt").read_text()


def test_outcomes_of_tests_are_counted_with_and_without_workers(tmp_path):
    lines = [
        "tests/a.py::b PASSED   [ 50%]",
        "[gw1] [ 60%] FAILED tests/a.py::c ",
        "x SKIPPED (no)",
    ]
    program = f"print({chr(10).join(lines)!r})"
    outcome = run_stage(Stage("tests", python("-c", program), 60), 60, tmp_path / "log")
    assert outcome.tests == {"PASSED": 1, "FAILED": 1}


def test_the_stages_fit_the_time_and_name_programs_that_exist(tmp_path):
    stages = gpu_check.gpu_stages(tmp_path)
    assert gpu_check.BUDGET <= 480
    for stage in stages:
        modules = [a for b, a in zip(stage.command, stage.command[1:], strict=False) if b == "-m"]
        assert all(importlib.util.find_spec(m) for m in modules), stage
        for file in (a for a in stage.command if a.startswith("tests/") or a == "setup.py"):
            assert (gpu_check.ROOT / file).exists()


def test_targets_name_what_was_measured():
    row = replace(BASE, workload="vit_b16", mode="forward", metric="device_over_copy_x", p50=1.3)
    rows = [
        {**vars(row), "provider": "functional_triton", "rank_ratio": 0.7},
        {**vars(row), "provider": "module_triton", "rank_ratio": 0.7, "p50": 1.6},
        {**vars(row), "provider": "foreach", "rank_ratio": 1.0},
    ]
    (first, *others) = target_rows(rows)
    assert first["met"] == {"functional_triton@0.7": True, "module_triton@0.7": False}
    assert not any(t["values"] for t in others)
    assert "not measured" in summary([], others, "here")


def test_ratios_are_paired_and_times_are_medians():
    keys = [("copy", None), ("torch_sn", 1.0), ("module_triton", 0.7)]
    seconds = [[1.0, 2.0, 4.0], [8.0, 32.0, 64.0], [2.0, 2.0, 16.0]]
    samples = Samples(dict(zip(keys, seconds, strict=True)))
    rows = {(r.provider, r.metric): r for r in gpu.result_rows(gpu.Times(*[samples] * 3), BASE)}
    assert rows["module_triton", "device_ms"].p50 == 2e3
    assert rows["module_triton", "device_over_copy_x"].p50 == 2.0  # of 2, 1, 4
    assert rows["module_triton", "step_speedup_over_torch_sn_x"].p50 == 4.0  # of 4, 16, 4
    assert ("copy", "device_over_copy_x") not in rows


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_rehearsal_measures_and_counts(tmp_path):
    stages = gpu_check.rehearsal_stages(tmp_path, ("--commit", "abc"))
    stages = [s for s in stages if s.name in ("backends", "measure", "memcheck")]
    assert check(tmp_path, stages, BASE) == 0, (tmp_path / "log.txt").read_text()
    rows = [r for r in rows_of(tmp_path) if r["kind"] == "gpu"]
    assert {r["provider"] for r in rows} >= {"copy", "torch_sn", "functional_triton"}
    assert {r["mode"] for r in rows} == set(gpu.MODES)
    assert all(r["commit"] == "abc" and r["p50"] > 0 for r in rows)


def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
