"""Reports of checkpoints without the model's code, histories for loggers, tables and pictures."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from models import Discriminator, images, same_state, state
from peers import MODELS, add_stable_rank_hook, trained
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn
from srn_kernels.tools.report.__main__ import main
from srn_kernels.tools.report.checkpoint import load_state, report_state

NUMBERS = ("sigma", "stable_rank", "normalized_stable_rank", "gamma")


def normalised() -> nn.Module:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    model(images()).sum().backward()
    return model


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_other_codes_checkpoints_have_the_rows_of_the_converted_model(
    name: str, ratio: float, tmp_path: Path
) -> None:
    theirs = trained(MODELS[name][0]).eval()
    torch.save(theirs.state_dict(), tmp_path / "state.pt")
    expected = {r.name: r for r in srn.report(srn.convert_spectral_norm(theirs, rank_ratio=ratio))}
    found = {r.name: r for r in report_state(load_state(tmp_path / "state.pt"), rank_ratio=ratio)}
    normal = {key: row for key, row in found.items() if not row.note.startswith("plain")}
    assert normal.keys() == expected.keys()
    for key, row in normal.items():
        assert (row.shape, row.active) == (expected[key].shape, expected[key].active), key
        for number in NUMBERS:  # float32 u, v on both sides, whose rounding is in each number twice
            want = getattr(expected[key], number)
            assert getattr(row, number) == pytest.approx(want, rel=1e-4), (key, number)


def test_our_own_torchs_and_plain_ones_and_the_stable_rank_hook(tmp_path: Path) -> None:
    def conv() -> nn.Module:  # square, so that only u and v can say which dimension is the output
        return nn.ConvTranspose2d(6, 6, 3)

    ours = srn.stable_rank_norm(conv(), rank_ratio=0.5)
    model = nn.ModuleDict(
        {
            "ours": ours,
            "legacy": legacy_spectral_norm(conv(), n_power_iterations=30),
            "parametrized": parametrizations.spectral_norm(conv(), n_power_iterations=30),
            "hook": add_stable_rank_hook(nn.Linear(9, 8), 0.4),
            "kept": srn.stable_rank_norm(nn.Linear(7, 9), preserve=3),
            "plain": nn.Linear(5, 4),
            "weighted": nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
        }
    )
    srn.refresh(ours, 150)
    for key in ("legacy", "parametrized"):
        for _ in range(5):
            model[key](torch.randn(1, 6, 4, 4))
    model["hook"](torch.randn(1, 9))
    model.register_buffer("positions", torch.zeros(3, 4))
    torch.save(model.state_dict(), tmp_path / "state.pth")
    found = report_state(load_state(tmp_path / "state.pth"), rank_ratio=0.5)
    rows = {row.name.split(".")[0]: row for row in found}
    assert {key: row.note.split(";")[0] for key, row in rows.items()} == {
        "ours": "srn_kernels",
        "legacy": "torch's legacy hook or a copy of it",
        "parametrized": "torch's parametrization",
        "hook": "torch's legacy hook or a copy of it",
        "kept": "srn_kernels",
        "plain": "plain",
    }
    for key in ("ours", "legacy", "parametrized"):
        assert rows[key].shape == (6, 54)
        weight = {"legacy": "weight_orig"}.get(key, "weight")
        raw = (
            model[key].parametrizations.weight.original
            if key == "parametrized"
            else getattr(model[key], weight)
        )
        singular = torch.linalg.svdvals(raw.detach().transpose(0, 1).flatten(1).double())
        assert rows[key].sigma == pytest.approx(float(singular[0]), rel=1e-3)
    singular = torch.linalg.svdvals(model["plain"].weight.detach().double())
    assert rows["plain"].sigma == pytest.approx(float(singular[0]), rel=1e-6)
    assert rows["plain"].target == 2
    reasons = dict(found.skipped)
    assert "not by spectral norm" in reasons["weighted.parametrizations.weight.original1"]
    assert "not named as a weight" in reasons["positions"]


def test_averaged_and_unconverged_vectors_are_said() -> None:
    layer = srn.spectral_norm(nn.Linear(30, 20))
    held = dict(layer.state_dict())
    averaged = held | {"weight_u": held["weight_u"] * 0.8}
    assert "|u| = 0.8, |v| = 1: averaged?" in report_state(averaged)[0].note
    turned = held | {"weight_u": held["weight_u"].roll(1)}
    singular = float(torch.linalg.svdvals(held["weight"])[0])
    assert f"not converged: |W|_2 = {singular:.4g}" in report_state(turned)[0].note
    assert report_state(held)[0].note == "srn_kernels"
    lacking = {k: x for k, x in held.items() if k != "weight_v"}
    assert report_state(lacking)[0].note == "plain"


def test_nested_checkpoints_and_safetensors(tmp_path: Path) -> None:
    one, other = normalised(), nn.Linear(3, 4)
    optimiser = torch.optim.Adam(one.parameters())
    optimiser.step()
    torch.save(
        {
            "epoch": 3,
            "generator": {"state_dict": other.state_dict()},
            "critic": one.state_dict(),
            "optimizer": optimiser.state_dict(),
        },
        tmp_path / "all.pt",
    )
    names = [row.name for row in report_state(load_state(tmp_path / "all.pt"))]
    assert names == [
        "generator:state_dict:weight",
        *(f"critic:{row.name}" for row in srn.report(one)),
    ]
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(one.state_dict(), tmp_path / "one.safetensors")
    assert len(report_state(load_state(tmp_path / "one.safetensors"))) == len(srn.report(one))


def test_the_command_prints_the_table_and_one_clear_error(tmp_path: Path, capsys) -> None:
    model = normalised()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert main([str(tmp_path / "state.pt"), "--rank-ratio", "0.3"]) == 0
    table = capsys.readouterr().out
    assert all(row.name in table for row in srn.report(model))
    assert main([str(tmp_path / "state.pt"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[0]["target"] is None
    torch.save(model, tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"bias": torch.zeros(3)}, tmp_path / "bias.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    for name, words in (
        ("none.pt", "no such file"),
        ("whole.pt", r"save model.state_dict\(\)"),
        ("list.pt", "holds a list"),
        ("bias.pt", "no weight of a layer; its keys are 'bias'"),
        ("text.pt", "no checkpoint of torch|cannot be read"),
        ("text.safetensors", "no safetensors file|needs the package"),
    ):
        assert main([str(tmp_path / name)]) == 2, name
        said = capsys.readouterr().err
        assert re.search(words, said) and said.count("\n") == 1, (name, said)
    assert main([str(tmp_path / "state.pt"), "--rank-ratio", "1.5"]) == 2
    assert "rank_ratio must be in (0, 1]" in capsys.readouterr().err


def test_as_a_module_it_starts_without_a_warning(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "state.pt")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "srn_kernels.tools.report", tmp_path / "state.pt"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "weight  4x3" in done.stdout


# --- tables and pictures -------------------------------------------------------------------------


def test_the_notebooks_table_has_every_number_and_bars_to_scale() -> None:
    model = normalised()
    model.add_module("<b>", srn.stable_rank_norm(nn.Linear(6, 6), stable_rank=1.5))
    found = srn.report(model)
    html = found._repr_html_()
    table = ElementTree.fromstring(html[: html.index("</table>") + len("</table>")])  # is closed
    _heading, *lines = table.findall("tr")
    assert len(lines) == len(found)
    for row, line in zip(found, lines, strict=True):
        cells = [cell.text for cell in line.findall("td")[1:]]
        assert cells[:4] == [row.name, "x".join(map(str, row.shape)), *(
            f"{x:.4g}" for x in (row.sigma, row.stable_rank))]  # fmt: skip
        before, after, *mark = [float(r.get("width")) for r in line.iter("rect")]
        assert after / before == pytest.approx(
            row.normalized_stable_rank / row.stable_rank, abs=0.05
        )
        assert len(mark) == math.isfinite(row.target)
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert not srn.report(srn.spectral_norm(nn.Linear(2, 2)))._repr_html_().count("#d62728")


def test_the_spectra_are_those_of_both_matrices_and_nothing_changes() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = normalised()
    before = copy.deepcopy(state(model))
    figure = srn.plot_spectrum(model)
    assert same_state(model, before)
    rows = list(srn.report(model))
    assert [axes.get_title() for axes in figure.axes] == [row.name for row in rows]
    weight = model.conv.weight.detach()
    drawn = {axes.get_title(): axes.lines for axes in figure.axes}["conv.weight"]
    for line, w in zip(drawn, (weight, srn.normalized_weight(model.conv).detach()), strict=True):
        expected = torch.linalg.svdvals(w.flatten(1).double())
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()).double(), expected)
    assert len(srn.plot_spectrum(model, include="conv.*").axes) == 1
    few = srn.plot_spectrum(model, limit=1)
    assert few.get_suptitle().endswith(f"1 of {len(rows)} layers")
    with pytest.raises(ValueError, match="include: nothing matches 'none'"):
        srn.plot_spectrum(model, include="none")
    with pytest.raises(ValueError, match="no normalised layer"):
        srn.plot_spectrum(nn.Linear(2, 2))


# --- loggers -------------------------------------------------------------------------------------


def test_histories_write_to_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="no tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = normalised()
    writer = tensorboard.SummaryWriter(tmp_path)
    history = srn.History(model, writer)
    for step in (10, 20):
        model(images()).sum().backward()
        history(step)
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    tags = set(read.Tags()["scalars"])
    assert tags == {f"srn/{name}/{key}" for name, row in history.rows[0].items() for key in row}
    for i, step in enumerate((10, 20)):
        event = read.Scalars("srn/conv.weight/sigma")[i]
        assert event.step == step
        assert event.value == pytest.approx(history.rows[i]["conv.weight"]["sigma"], rel=1e-6)


def test_histories_write_to_weights_and_biases(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    model, seen = normalised(), []
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        monkeypatch.setattr(run, "log", lambda values: seen.append(values))
        history = srn.History(model, run)
        history(), history(7)
    assert [values["srn/step"] for values in seen] == [0, 7]
    assert seen[0]["srn/conv.weight/sigma"] == history.rows[0]["conv.weight"]["sigma"]
    module = srn.History(model, wandb)  # the module serves as well, once it is initialised
    with pytest.raises(Exception, match=r"wandb.init\(\)"):
        module()


def test_histories_call_functions_and_refuse_the_rest() -> None:
    model, seen = normalised(), []
    history = srn.History(model, lambda values, step: seen.append((step, values)))
    history(), history()
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1]["srn/conv.weight/gamma"] == history.rows[0]["conv.weight"]["gamma"]
    with pytest.raises(TypeError, match="to must have add_scalar"):
        srn.History(model, 3)
    with pytest.raises(ValueError, match="step must be"):
        history(-1)
    assert len(history.rows) == 2
