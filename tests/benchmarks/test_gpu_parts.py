"""The programs of gpu-check on a CPU: reduction, bits, times, steps, the build, the page."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import models, steps
from benchmarks.gpu import bits, build, counters, publish, recorder, reduce
from benchmarks.gpu.commands import main
from benchmarks.gpu.layers import LayerCase, check_round, read_cases, write_cases
from benchmarks.gpu.rows import environment
from benchmarks.gpu.timing import Times, result_rows
from benchmarks.measure import store
from benchmarks.measure.timing import Samples
from benchmarks.report import documents
from srn_kernels import backends

CPU = torch.device("cpu")
BASE = environment(CPU, commit="abc")
NATIVE = pytest.mark.skipif(
    backends.load("cpu").unavailable_reason() is not None, reason="the cpu backend is not live"
)


def case(*shape: int, **values) -> LayerCase:
    strides = torch.empty(shape).stride()
    return replace(LayerCase(shape, strides, strides, 0, "float32", "float32"), **values)


# What a failing call is reduced to.


class Spoilt:
    """The reference backend, but for calls with a layer of more than 20 columns and of bfloat16."""

    DEVICES = None

    def __init__(self) -> None:
        self.calls = 0

    def wrong(self, call: list[LayerCase]) -> bool:
        return any(math.prod(c.shape[1:]) > 20 and c.dtype == "bfloat16" for c in call)

    def __call__(self, calls: list[list[LayerCase]]) -> list[str]:
        self.calls += len(calls)
        return ["off" if self.wrong(c) else "" for c in calls]


def test_a_call_is_reduced_to_its_smallest_failing_layer():
    call = [case(64, 96), case(8, 4, 3, 3, dtype="bfloat16", iterations=3), case(40, 27)]
    (found,), why = reduce.reduced(call, Spoilt())
    assert why == "off"
    assert found.dtype == "bfloat16"
    assert found.iterations == 1
    assert 20 < math.prod(found.shape[1:]) <= 41 and found.shape[0] == 1


def test_layers_that_fail_only_together_stay_together():
    def together(calls):
        return ["race" if len(c) >= 3 else "" for c in calls]

    found, why = reduce.reduced([case(n, 8) for n in range(1, 13)], together)
    assert (len(found), why) == (3, "race")


def test_a_call_that_passes_is_left_alone():
    call = [case(4, 4)]
    assert reduce.reduced(call, Spoilt()) == (call, "")


@NATIVE
@pytest.mark.parametrize(
    "layer",
    [
        case(9, 13),
        case(1, 7),
        case(6, 4, 3, 3, dtype="bfloat16"),
        case(6, 10, dtype="float64", other="float64", target_rank=2.5, iterations=2),
        case(8, 12, misaligned=(4, 8, 4), target_rank=3.0, iterations=0),
        case(8, 12, target_rank=2.0, iterations=-1),
        replace(case(5, 7), strides=(1, 5), other_strides=(1, 5)),
        case(6, 10, gain="float32", sigma_max=0.5, target_rank=2.0),
        case(6, 10, gain="bfloat16", sigma_max=0.5, through=False),
        case(6, 10, gain="float64", sigma_max=100.0, iterations=-1),
    ],
    ids=str,
)
def test_layers_made_anew_pass_on_a_sound_backend(layer):
    if layer.dtype == "bfloat16":
        layer = replace(layer, other="bfloat16")
    beside = case(5, 6, dtype=layer.dtype, other=layer.other)
    assert check_round([layer, beside], backends.load("cpu"), CPU) == ""


def test_a_wrong_backend_is_found_out():
    class Wrong:
        @staticmethod
        def normalize(weights, us, vs, outs, *rest):
            backends.load("reference").normalize(weights, us, vs, outs, *rest)
            outs[1].mul_(1.001)

        normalize_backward = staticmethod(backends.load("reference").normalize_backward)

    assert "layer 1, W_hat is off" in check_round([case(4, 5), case(6, 7)], Wrong, CPU)


def test_a_resized_layer_keeps_the_order_of_its_dimensions():
    last = replace(case(4, 6, 3, 5), strides=torch.empty(4, 6, 3, 5).to(
        memory_format=torch.channels_last).stride())  # fmt: skip
    found = last.resized((2, 6, 3, 5))
    wanted = torch.empty(2, 6, 3, 5).to(memory_format=torch.channels_last)
    assert found.strides == wanted.stride()
    assert found.other_strides == torch.empty(2, 6, 3, 5).stride()


@NATIVE
def test_processes_answer_for_calls_and_a_silent_one_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(reduce, "LINE", 200.0)  # a busy machine is no silent process
    tries = reduce.Tries("cpu", "cpu", time.monotonic() + 240)
    unknown = case(4, 6, dtype="no_dtype")
    first, second, third = tries([[case(4, 6)], [unknown], [case(3, 5)]])
    assert first == third == ""
    assert "no_dtype" in second
    assert reduce.Tries("cpu", "cpu", time.monotonic())([[case(4, 6)]]) == [None]
    monkeypatch.setattr(reduce, "LINE", 0.0)
    assert "no answer" in tries([[case(900, 900)]])[0]


@NATIVE
def test_the_recorder_keeps_what_a_failing_test_asked_for(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text(
        "import torch, srn_kernels as srn\n"
        "def test_well():\n    call((3, 4))\n"
        "def test_not():\n    call((5, 8))\n    assert False\n"
        "def call(shape):\n"
        "    w = torch.randn(shape).bfloat16()\n"
        "    u, v = torch.ones(shape[0]), torch.ones(shape[1])\n"
        "    srn.functional.stable_rank_normalize([w], [u], [v], [2.0], backend='cpu')\n"
    )
    records = tmp_path / "records"
    made = pytest_run(test, records)
    assert made == 1
    ((path, layers, note),) = reduce.recorded(records)
    assert path.name == "failing_main.json"
    assert note.endswith("test_it.py::test_not")
    assert [(c.shape, c.dtype, c.target_rank) for c in layers] == [((5, 8), "bfloat16", 2.0)]
    path.unlink()
    ((path, layers, _),) = reduce.recorded(records)  # as after a crash
    assert path.name == "last_main.json"
    kept = tmp_path / "kept.json"
    write_cases(kept, layers, "why")
    assert read_cases(kept) == (layers, "why")


def pytest_run(test: Path, records: Path) -> int:
    import subprocess
    import sys

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    command += ["-p", "benchmarks.gpu.recorder", "--record-backend", "cpu"]
    command += ["--record-to", str(records), f"--rootdir={test.parent}", "-c", "/dev/null"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=store.ROOT, capture_output=True, env=environment)
    return done.returncode


def test_the_recorder_is_a_plugin():
    assert recorder.pytest_addoption


# Bits, times, training steps.


def test_a_checksum_sees_bits_and_places():
    t = torch.tensor([1.0, 2.0, 3.0])
    assert bits.digest(t) == bits.digest(t.clone())
    assert bits.digest(t) != bits.digest(t.flip(0))
    assert bits.digest(t) != bits.digest(t.nextafter(torch.tensor(9.0)))
    assert bits.digest(t.bfloat16()) != bits.digest(t.bfloat16().flip(0))


def test_rounds_that_differ_are_counted(monkeypatch):
    calls = []
    step = bits.Rounds.step

    def spoilt(self):
        calls.append(1)
        return step(self) + (len(calls) == 5)  # the second round of the second run

    monkeypatch.setattr(bits.Rounds, "step", spoilt)
    failures = []
    rows = list(bits.Bits("reference", 3)(CPU, BASE, failures.append))
    assert {r.mode: r.p50 for r in rows} == {"again": 1.0, "beside other work": 0.0}
    assert failures == ["reference, again: 1 rounds differ, the first is round 1"]


def test_ratios_are_paired_and_times_are_medians():
    keys = [("copy", None), ("torch_sn", 1.0), ("module_triton", 0.7)]
    seconds = [[1.0, 2.0, 4.0], [8.0, 32.0, 64.0], [2.0, 2.0, 16.0]]
    samples = Samples(dict(zip(keys, seconds, strict=True)))
    rows = {(r.provider, r.metric): r for r in result_rows(Times(*[samples] * 3), BASE)}
    assert rows["module_triton", "device_ms"].p50 == 2e3
    assert rows["module_triton", "device_over_copy_x"].p50 == 2.0  # of 2, 1, 4
    assert rows["module_triton", "step_speedup_over_torch_sn_x"].p50 == 4.0  # of 4, 16, 4
    assert ("copy", "device_over_copy_x") not in rows


@NATIVE
@pytest.mark.parametrize("workload", ["2x6x8", "1x12x8@bfloat16"])
def test_a_workload_is_measured_beside_its_peers(tmp_path, workload):
    out = tmp_path / "rows"
    arguments = ["--workload", workload, "--repeats", "1", "--budget", "0", "--out", str(out)]
    common = ["--device", "cpu", "--backend", "cpu", "--commit", "abc"]
    assert main(["measure", *arguments, *common]) == 0
    rows = publish.from_file(out)
    assert {r.provider for r in rows} >= {"copy", "torch_sn", "layerwise", "module_cpu"}
    assert {r.mode for r in rows} == {"forward", "backward", "evaluation"}
    assert all(r.commit == "abc" and r.p50 > 0 for r in rows)
    (size,) = {r.bytes for r in rows if r.mode == "backward"}
    assert size == 3 * 96 * (2 if "@" in workload else 4)


@NATIVE
def test_training_steps_are_measured(tmp_path, monkeypatch):
    small = replace(steps.MODELS["real_esrgan_unet_D"], make=lambda: models.UNetDiscriminator(2))
    monkeypatch.setitem(steps.MODELS, "real_esrgan_unet_D", small)
    out = tmp_path / "rows"
    arguments = ["--workload", "real_esrgan_unet_D", "--images", "1", "3", "8", "8"]
    arguments += ["--repeats", "1", "--budget", "0", "--out", str(out)]
    assert main(["training", *arguments, "--device", "cpu", "--backend", "cpu"]) == 0
    rows = {(r.provider, r.rank_ratio, r.metric): r for r in publish.from_file(out)}
    assert rows["plain", None, "step_ms"].p50 > 0
    for key in (("torch_sn", 1.0), ("module_cpu", 1.0), ("module_cpu", 0.7)):
        assert rows[(*key, "share_of_step_percent")].p50 < 100
    assert ("module_cpu", 0.7, "step_speedup_over_torch_sn_x") in rows


def test_a_backend_that_is_not_live_is_named():
    with pytest.raises(SystemExit, match=r"not live: \['nothing'\]"):
        main(["small", "--device", "cpu", "--backend", "nothing"])


# The toolkit.


def toolkit(place: Path, header: bool = True) -> Path:
    for folder in ("bin", "include"):
        (place / folder).mkdir(parents=True)
    (place / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (place / "bin" / "nvcc").chmod(0o755)
    if header:
        (place / "include" / "cuda_runtime.h").write_text("")
    return place


def test_a_compiler_without_its_headers_is_no_toolkit(tmp_path, monkeypatch):
    wrapper, real = toolkit(tmp_path / "wrapper", header=False), toolkit(tmp_path / "real")
    path = {"PATH": str(wrapper / "bin")}
    monkeypatch.setattr(build, "_FALLBACKS", (str(real),))
    assert build.cuda_home(path) == real
    assert build.cuda_home({**path, "CUDA_HOME": str(toolkit(tmp_path / "own"))}).name == "own"
    monkeypatch.setattr(build, "_FALLBACKS", ())
    with pytest.raises(SystemExit, match="wrapper"):
        build.cuda_home(path)
    made = build.variables("9.0", {"CUDA_HOME": str(real), "SRN_CUDA": "0"})
    assert (made["SRN_CUDA"], made["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")


# Counters and the page.


def test_counters_are_read_from_ncus_table():
    names = list(counters.METRICS)
    units = ["ns"] + [""] * (len(names) - 1)
    lines = [["ID", "Kernel Name", *names], ["", "", *units]]
    lines += [["0", "k", "1,500,000", *["2"] * (len(names) - 1)], ["1", "k", "7", *["n/a"] * 0]]
    text = "==PROF== talk\n" + "\n".join(",".join(f'"{x}"' for x in line) for line in lines)
    first, second = counters.parse(text)
    assert first["ncu_time_ms"] == 1.5
    assert second == {"ncu_time_ms": 7e-6}
    assert counters.parse("nothing") == []


def gpu_row(**values):
    first = {
        "device": "a GPU",
        "processors": 132,
        "workload": "vit_b16",
        "provider": "functional_cuda",
        "rank_ratio": 0.7,
        "mode": "forward",
        "metric": "device_ms",
        "p20": 1.0,
        "p50": 2.0,
        "p80": 3.0,
        "repeats": 5,
    }
    return replace(BASE, **{**first, **values})


def test_a_column_is_one_run_on_the_last_device():
    old = gpu_row(date="2026-01-01", provider="foreach")
    new, other = gpu_row(date="2026-01-02"), gpu_row(date="2025-01-01", device="another")
    one = gpu_row(date="2026-01-01", workload="mixed", provider="cuda")
    two = gpu_row(date="2026-01-02", workload="mixed", provider="triton")
    assert set(publish.last([old, new, other, one, two])) == {new, one, two}


def test_rows_land_in_the_store_and_on_the_page(tmp_path, capsys):
    page, results = tmp_path / "gpu.md", tmp_path / "results.jsonl"
    page.write_text("\n".join(["before", *documents.markers(publish.BLOCK), "after\n"]))
    before = page.read_text()
    common = ["publish", "--store", str(tmp_path), "--document", str(page)]
    assert main(common) == 0
    assert "no row of a GPU is stored" in capsys.readouterr().out
    assert page.read_text() == before
    rows = [
        gpu_row(),
        gpu_row(metric="device_over_copy_x", p50=1.25),
        gpu_row(metric="step_ms", mode="step", p50=10.0),
        gpu_row(metric="share_of_step_percent", mode="step", p50=12.5),
        gpu_row(metric="rounds_that_differ", mode="again", workload="mixed", p50=0.0),
    ]
    lines = [{"kind": "stage"}, *map(asdict, rows)]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kept in (len(rows), len(rows)):  # the second time nothing is new
        assert main([*common, str(results)]) == 0
        assert len(publish.from_file(tmp_path / publish.RESULTS)) == kept
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "2.00 (1.25x)" in text
    assert "10.0 (12.5 %, 1.0 to 3.0)" in text
    assert "a GPU, 132 SMs" in text
    results.write_text(json.dumps(asdict(gpu_row(processors=0))) + "\n")
    with pytest.raises(SystemExit, match="rehearsal"):
        main([*common, str(results)])


def test_the_page_shows_what_the_store_holds():
    rows = publish.last(publish.from_file(store.RESULTS / publish.RESULTS))
    if rows:
        assert not documents.difference(publish.DOCUMENT, publish.table(rows), publish.BLOCK)
    else:
        assert "was measured on a GPU yet" in publish.DOCUMENT.read_text()
