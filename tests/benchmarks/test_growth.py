"""The curves of cost against parameters, layers, power iterations and threads."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

from benchmarks.cases import workloads
from benchmarks.commands import app
from benchmarks.measure import growth, store
from benchmarks.report import plots, tables

cli = CliRunner()


def test_growth_covers_its_curves(tmp_path, monkeypatch):
    tiny = {"layers": {n: growth.Point(f"{n}x3x4", n_power_iterations=n) for n in (1, 2)}}
    monkeypatch.setattr(growth, "CURVES", tiny)
    monkeypatch.setattr(growth, "PROVIDERS", ("copy", "torch_sn"))
    for module in (tables, plots):
        monkeypatch.setattr(module, "CURVES", tiny)
        monkeypatch.setattr(module, "GROWING", ("copy", "torch_sn"))
    threads = torch.get_num_threads()
    arguments = ["grow", "--repeats", "1", "--save", "--store", str(tmp_path)]
    result = cli.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    rows = store.load(tmp_path, store.CURVES)
    times = {(r.workload, r.n_power_iterations, r.provider) for r in rows if r.metric == "time_ms"}
    assert times == {(f"{n}x3x4", n, p) for n in (1, 2) for p in ("copy", "torch_sn")}
    (grid,) = tables.curves(rows)
    assert grid.header == ["", "1", "2"] and all(all(line) for line in grid.lines)


def test_points_of_the_curves_are_workloads_and_fit_the_threads():
    assert all(workloads.find(p.workload).parameters <= 2**24 for p in growth.points(8))
    assert {p.threads for p in growth.points(2)} == {None, 1, 2}
