"""The time that normalising takes inside a step, and rounds beside other processes."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from typer.testing import CliRunner

import srn_kernels as srn
from benchmarks.cases import steps
from benchmarks.commands import app
from benchmarks.measure import busy, spent, store, timing
from srn_kernels.model import root


class Clock:
    """A time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


clock_now = Clock()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """spent.py reads the clock above."""
    monkeypatch.setattr(spent, "time", clock_now)


class Slow(torch.autograd.Function):
    """The identity, late."""

    @staticmethod
    def forward(ctx, x):
        clock_now.sleep(1)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        clock_now.sleep(2)
        return grad


class SlowNorm(nn.Module):
    def forward(self, weight):
        return Slow.apply(weight)


@pytest.mark.usefixtures("still")
def test_a_parametrizations_own_time_is_summed_and_nothing_else():
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", SlowNorm())
    with spent.clocks("torch_sn") as clock:
        out = layer(torch.ones(1, 3))
        clock_now.sleep(5)  # not its
        Slow.apply(out).sum().backward()
    assert clock.seconds == 3
    assert layer.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("provider", ["torch_sn", "module"])
def test_forward_and_backward_of_real_ones_are_seen_and_unchanged(provider):
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        if provider == "module":
            return srn.apply_stable_rank_norm(made, 1.0)
        for layer in (made[0], made[2]):
            spectral_norm(layer)
        return made

    plain, watched = model(), model()
    begin, end = root.begin, root.end
    for each in (plain, watched):
        for parameter in each.parameters():
            parameter.grad = None
    plain(torch.ones(2, 4)).square().sum().backward()
    with spent.clocks(provider) as clock:
        loss = watched(torch.ones(2, 4)).square().sum()
        forward = clock.seconds
        loss.backward()
    assert 0 < forward < clock.seconds
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert root.begin is begin and root.end is end
    after = clock.seconds
    watched(torch.ones(2, 4)).sum().backward()
    assert clock.seconds == after


def test_what_adds_nothing_has_no_clocks():
    with pytest.raises(ValueError, match="plain"), spent.clocks("plain"):
        pass


def test_intervals_of_a_median():
    found = timing.interval([float(x) for x in range(1, 21)])
    assert (found.low, found.median, found.high) == (6.0, 10.5, 15.0)
    assert timing.interval([1.0] * 100)[:3] == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="20 values, got 19"):
        timing.interval([1.0] * 19)


def test_the_interval_covers_the_median_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for draw in torch.rand(2000, 24, generator=generator).tolist():
        found = timing.interval(draw)
        hits += found.low <= 0.5 <= found.high
    assert hits / 2000 > 0.94


@pytest.mark.usefixtures("still")
def test_a_steps_costs_by_both_ways():
    """A step whose normalisation takes a third: the sum, the share and the difference say so."""

    def plain() -> None:
        clock_now.sleep(4)

    def step() -> None:
        plain()
        root.begin()

    def slowly(*args: object) -> mock.Mock:
        clock_now.sleep(2)
        return mock.Mock(held=[])

    with mock.patch.object(root, "begin", slowly):
        times, costs = spent.measure(plain, "plain", {"ours": (step, "module")}, steps=20)
    (cost,) = costs.values()
    assert set(times) == {"plain", "ours"} and len(times["ours"]) == 20
    assert cost.summed[:3] == cost.difference[:3] == (2, 2, 2)
    assert cost.share.median == pytest.approx(100 / 3)


def test_a_run_of_steps_writes_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(spent, "STEPS", 20)
    monkeypatch.setattr(spent, "WARM_UPS", 1)
    small = steps.Model(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 10)),
        steps.supervised_step(
            torch.nn.functional.cross_entropy, lambda x: torch.arange(len(x)) % 10
        ),
        (2, 3, 4, 4),
    )
    monkeypatch.setitem(steps.MODELS, "densenet40_k12", small)
    arguments = ["run", "--workload", "densenet40_k12", "--mode", "step", "--repeats", "2"]
    result = CliRunner().invoke(app, [*arguments, "--save", "--store", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = store.load(tmp_path)
    assert {r.provider for r in rows if r.metric == "time_ms"} == {"plain", "torch_sn", "module"}
    for metric in ("spent_ms", "spent_percent", "difference_ms"):
        found = [r for r in rows if r.metric == metric]
        assert {r.provider for r in found} == {"torch_sn", "module"}
        assert all(r.low <= r.p50 <= r.high for r in found)
    assert all(r.p50 > 0 for r in rows if r.metric == "spent_ms")


# --- beside other processes -----------------------------------------------------------------------


@pytest.mark.parametrize("case", busy.CASES)
def test_neighbours_are_there_and_go(case):
    with busy.neighbours(case, 1) as before:
        batch = before()
    if case == "loader":
        assert batch.shape == (16, 3, 128, 128) and batch.dtype == torch.uint8
        assert batch.float().std() > 10  # pictures


def test_what_a_gpu_machine_imports_needs_no_pictures():
    """Its Python has torch, triton and pytest; rich and tabulate make the tables."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['PIL', 'matplotlib']); "
        "import benchmarks.gpu.events, benchmarks.gpu.check, benchmarks.report.tables"
    )
    subprocess.run([sys.executable, "-c", code], cwd=store.ROOT, check=True)


def test_rounds_are_measured_in_every_case(tmp_path, monkeypatch):
    monkeypatch.setattr(busy, "CASES", {"0": "nobody", "1": "one process a core"})
    arguments = [
        "busy",
        "--workload",
        "2x6x8",
        "--repeats",
        "2",
        "--budget",
        "0.1",
        "--save",
        "--store",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*arguments, "--save", "--store", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = store.load(tmp_path, store.BUSY)
    assert {r.busy for r in rows} == {"0", "1"}
    means = {(r.provider, r.busy): r.p50 for r in rows if r.metric == "mean_ms"}
    for r in rows:
        if r.metric == "speedup_of_means_over_torch_sn_x":
            expected = means["torch_sn", r.busy] / means[r.provider, r.busy]
            assert r.p50 == pytest.approx(expected, rel=1e-4)
    assert len(means) == 6
