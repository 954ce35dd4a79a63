"""The commands write what they print, and refuse bad options with exit code 2."""

import json

import pytest
import torch
from srn_lab.cli.app import app
from typer.testing import CliRunner

import srn_kernels

PNG = b"\x89PNG\r\n\x1a\n"
TINY = "--width 4 --n-dis 1 --steps 3"
DIGITS = "--data digits --resolution 8 --batch-size 8 --latent 4"


def invoke(arguments, *paths):
    return CliRunner().invoke(app, [*arguments.split(), *map(str, paths)])


def is_picture(path):
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


def said(result):
    return " ".join(result.output.replace("│", " ").split())


def test_no_command_shows_the_commands():
    result = invoke("")
    assert all(name in result.output for name in ("paper", "train", "elhist", "demo", "publish"))


def test_train_then_elhist(tmp_path):
    checkpoints = []
    for method in ("sn", "srn"):
        out = tmp_path / method
        options = f"train --method {method} {DIGITS} {TINY} --samples-every 2 --out"
        result = invoke(options, out)
        assert result.exit_code == 0, result.output
        history = json.loads((out / "history.json").read_text())
        assert history["config"]["method"]["norm"] == method
        assert [record["step"] for record in history["history"]["steps"]] == [1, 2, 3]
        assert [record["step"] for record in history["history"]["spectra"]] == [0, 3]
        assert is_picture(out / "samples.png")
        assert {p.name for p in out.glob("samples-*")} == {
            "samples-000002.png",
            "samples-000003.png",
        }
        checkpoints.append(out / "checkpoint.pt")
        assert str(checkpoints[-1]) in result.output

    out = tmp_path / "elhist"
    result = invoke("elhist --pairs 50 --kind real-fake", *checkpoints, "--out", out)
    assert result.exit_code == 0, result.output
    assert is_picture(out / "elhist.png")
    runs = json.loads((out / "elhist.json").read_text())["runs"]
    assert list(runs) == ["SN", "SRN-50"]
    for run in runs.values():
        slopes = run["elhist"]["real-fake"]
        assert slopes["pairs"] == 50
        assert 0 < slopes["median_slope"] < slopes["percentile_95_slope"] <= slopes["max_slope"]

    again = invoke(f"train --method sn {DIGITS} {TINY} --seed 1 --out", tmp_path / "sn")
    assert again.exit_code == 2
    assert "holds a run of another configuration" in said(again)


def test_demo_writes_every_file_it_lists(tmp_path):
    result = invoke(f"demo {TINY} --num-feat 4 --repeats 2 --rank-ratio 0.2 --out", tmp_path)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    files = {name: tmp_path / path for name, path in metrics["files"].items()}
    assert all(str(path) in result.output for path in files.values())
    assert all(path.is_file() for path in files.values())
    for name in ("samples", "elhist", "stable_rank", "overhead"):
        assert is_picture(files[name])
    assert metrics["environment"]["packages"]["torch"] == torch.__version__
    assert metrics["environment"]["packages"]["srn_kernels"] == srn_kernels.__version__
    parts = metrics["wall"]
    assert sum(parts.values()) - parts["total_s"] == pytest.approx(parts["total_s"], rel=0.1)

    assert set(metrics["conversion"]) == {"legacy", "parametrization"}
    for conversion in metrics["conversion"].values():
        assert conversion["normalised_layers"] == 8
        assert conversion["max_abs_output_difference"] <= 1e-5 * conversion["max_abs_output"]

    sn, constrained = metrics["runs"]["SN"], metrics["runs"]["SRN-20"]
    assert sn["srn_active"]["at_start"] == sn["srn_active"]["at_end"] == []
    # With four feature maps every bound is 1, below any matrix of two or more rows and columns.
    matrices = [r["layer"] for r in constrained["layers"] if min(r["rows"], r["columns"]) > 1]
    active = constrained["srn_active"]
    assert set(active["at_start"]) >= set(matrices)
    assert {k for k, v in active["fraction_of_records"].items() if v == 1} >= set(matrices)
    assert all(r["stable_rank"] == pytest.approx(1, rel=1e-4) for r in constrained["layers"])


def test_overhead_times_one_style(tmp_path):
    options = "overhead --style legacy --num-feat 4 --size 16 --repeats 3 --out"
    result = invoke(options, tmp_path)
    assert result.exit_code == 0, result.output
    assert is_picture(tmp_path / "overhead.png")
    conversion = json.loads((tmp_path / "overhead.json").read_text())["conversion"]
    assert list(conversion) == ["legacy"]
    step = conversion["legacy"]["step"]
    assert set(step) == {"plain", "torch", "converted"}
    assert all(0 < s["p25_ms"] <= s["median_ms"] <= s["p75_ms"] for s in step.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --method batch", "'batch' is not one of"),
        ("train --c 0", "c must be in (0, 1], got 0"),
        ("train --data mnist", "data must be one of digits, mnist5k"),
        ("train --data cifar10 --resolution 32 --root nowhere", "nowhere/cifar-10-python.tar.gz"),
        ("train --resolution 12", "resolution must be one of"),
        ("train --data celeba --resolution 64 --conditional --root nowhere", "celeba"),
        ("train --steps 0", "Invalid value for '--steps'"),
        ("demo --rank-ratio 1.5", "must be above 0 and at most 1"),
        ("overhead --size 20", "must be a positive multiple of 8"),
        ("elhist missing.pt", "'missing.pt' does not exist"),
    ],
)
def test_bad_options_exit_with_2_and_say_why(arguments, message, tmp_path):
    paths = [] if arguments.startswith("elhist") else ["--out", tmp_path]
    result = invoke(arguments, *paths)
    assert result.exit_code == 2
    assert message in said(result)
    assert list(tmp_path.iterdir()) == []


def test_elhist_refuses_a_file_that_is_no_checkpoint(tmp_path):
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.ones(2)}, other)
    result = invoke("elhist", other)
    assert result.exit_code == 2
    assert "is not a srn_lab checkpoint" in said(result)
