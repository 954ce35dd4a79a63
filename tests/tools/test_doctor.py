"""The doctor: what it takes, what it leaves, whether it checks, and what it says when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import srn_kernels as srn
from srn_kernels.tools.doctor import examine as examining
from srn_kernels.tools.doctor.command import main
from srn_kernels.tools.doctor.examine import Difference, Timing, compare, examine
from srn_kernels.tools.doctor.factory import DoctorError, Inputs, find_factory, make
from srn_kernels.tools.paired import Spread, paired_ms, ratios


def critic() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        spectral_norm(nn.Conv2d(3, 6, 3)),
        parametrizations.spectral_norm(nn.ConvTranspose2d(6, 5, 2)),
        nn.Flatten(),
        nn.Linear(5 * 7 * 7, 1),
    )
    return model, torch.randn(2, 3, 8, 8)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), weight_norm(nn.Linear(8, 3)))


def test_a_model_with_torchs_norms_is_converted_and_its_output_stays() -> None:
    found = examine(critic, seconds=0)
    assert found.how == "convert"
    assert [(t.name, t.shape) for t in found.taken] == [
        ("0.weight", (6, 27)),
        ("1.weight", (5, 24)),
    ]
    assert "hook (SpectralNorm)" in found.taken[0].form
    assert isinstance(found.output, Difference) and found.output.stays
    assert found.output.scale > 0
    assert isinstance(found.timing, Timing)
    assert set(found.timing.ms) == {"before", "srn_kernels"}
    assert all(s.p25 <= s.median <= s.p75 for s in found.timing.ms.values())


def test_a_change_of_the_output_is_seen(monkeypatch, capsys, tmp_path: Path) -> None:
    def wrong(model: nn.Module, rank_ratio: float) -> nn.Module:
        srn.convert_spectral_norm(model, rank_ratio)
        with torch.no_grad():
            model[3].bias += 0.1
        return model

    monkeypatch.setattr(examining, "convert_spectral_norm", wrong)
    found = examine(critic, seconds=0)
    assert isinstance(found.output, Difference) and not found.output.stays
    assert found.output.largest == pytest.approx(0.1, rel=1e-3)
    monkeypatch.setitem(sys.modules, "mine", type(sys)("mine"))
    sys.modules["mine"].critic = critic
    assert main(["mine:critic", "--seconds", "0"]) == 1
    assert "evaluation output: CHANGES" in capsys.readouterr().out


def test_a_plain_model_is_measured_against_torchs_own_norm() -> None:
    found = examine(plain, input_shape=(4, 6), rank_ratio=0.5, seconds=0)
    assert found.how == "apply"
    assert [t.name for t in found.taken] == ["0.weight"]
    assert "weight_norm" in dict(found.left)["1.weight"]
    assert isinstance(found.output, Difference) and found.output.stays
    assert set(found.timing.ms) == {"before", "torch", "srn_kernels"}
    assert set(found.timing.ratio) == {"before", "torch"}


def test_what_was_not_checked_has_its_reason_and_no_number() -> None:
    found = examine(plain)
    assert "--input-shape" in found.output and "--input-shape" in found.timing
    found = examine(plain, input_shape=(4, 7))
    assert "shapes" in found.output and "shapes" in found.timing
    assert "return (model, inputs)" in found.output and "return (model, inputs)" in found.timing
    found = examine(lambda: (plain(), torch.randn(4, 7)))
    assert "shapes" in found.output and "return (model, inputs)" not in found.output
    found = examine(
        lambda: nn.Conv2d(2, 2, 3, bias=False).requires_grad_(False), input_shape=(1, 2, 4, 4)
    )
    assert isinstance(found.output, Difference) and "gradient" in found.timing
    found = examine(nn.ReLU, input_shape=(2,))
    assert found.how == "nothing" and found.taken == [] and found.output == "nothing would change"
    assert examine(lambda: srn.spectral_norm(nn.Linear(2, 2))).normalised == ["weight"]


def test_evaluations_that_do_not_repeat_are_no_comparison() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(())

    one = Noisy(2, 2)
    with pytest.raises(ValueError, match="two evaluations of the same model differ"):
        compare(one, Noisy(2, 2), Inputs((torch.ones(1, 2),), {}))
    same = nn.Linear(2, 2)
    nothing = compare(same, same, Inputs((torch.ones(1, 2),), {}))
    assert nothing.largest == 0 and nothing.stays
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, torch.nan)
    assert not compare(same, broken, Inputs((torch.ones(1, 2),), {})).stays


def test_inputs_and_models_come_as_people_write_them() -> None:
    model, inputs = make(lambda: (nn.Linear(2, 2), {"input": torch.ones(1, 2)}))
    assert isinstance(model, nn.Linear) and set(inputs.kwargs) == {"input"}
    assert len(make(lambda: (nn.Linear(2, 2), (1, 2)))[1].args) == 2
    assert make(lambda: nn.Linear(2, 2))[1] is None
    for factory, words in (
        (lambda: 3, "must return an nn.Module"),
        (lambda: (1, 2, 3), r"or \(model, inputs\)"),
        (lambda size: nn.Linear(size, 2), "without arguments"),
    ):
        with pytest.raises(DoctorError, match=words):
            make(factory)
    sizes = iter((2, 2, 3))
    with pytest.raises(DoctorError, match="another model each time"):
        examine(lambda: nn.Linear(2, next(sizes)), input_shape=(1, 2))


def test_wrong_targets_are_named() -> None:
    for target, words in (
        ("mine", "must be MODULE:FUNCTION"),
        ("not_there_at_all:f", "cannot be imported"),
        ("math:nothing", "has no 'nothing'"),
        ("math:pi", "must be a function"),
    ):
        with pytest.raises(DoctorError, match=words):
            find_factory(target)
    with pytest.raises(ValueError, match="rank_ratio must be in"):
        examine(plain, rank_ratio=2.0)


def test_the_command_reads_a_users_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.nn.utils import spectral_norm\n"
        "def build():\n    return nn.Sequential(spectral_norm(nn.Linear(3, 4)))\n"
    )
    command = [sys.executable, "-m", "srn_kernels.doctor", "mine:build", "--seconds", "0"]
    command += ["--input-shape", "2x3"]
    root = str(Path(srn.__file__).parents[1])
    path = {"PYTHONPATH": root, "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.weight  4x3" in done.stdout
    assert "stays" in done.stdout
    added = [line.strip() for line in done.stdout.partition("lines to add:")[2].splitlines()]
    names = {"model": nn.Sequential(spectral_norm(nn.Linear(3, 4)))}
    exec("\n".join(added), names)  # the lines do what they say
    assert srn.is_normalized(names["model"][0])
    command[-2:] = ["--json"]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    document = json.loads(done.stdout)
    assert document["taken"][0]["name"] == "0.weight"
    assert "no inputs" in document["output"]


def test_paired_times_rotate_and_pair() -> None:
    order: list[str] = []
    times = paired_ms({n: lambda n=n: order.append(n) for n in "ab"}, repeats=3, warmups=1)
    assert order == list("ababbaab")
    assert {len(values) for values in times.values()} == {3}
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of([1.0]).to_dict("ms") == {"median_ms": 1.0, "p25_ms": 1.0, "p75_ms": 1.0}
