"""The commands that compare the power method with SVDs and time the layers' options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.cases import workloads
from benchmarks.measure import linalg, options, store


def _app(command) -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app


def test_the_power_method_is_recorded_on_every_distinct_shape(tmp_path: Path) -> None:
    arguments = ["--workload", "2x24x40", "--workload", "1x5x3", "--repeats", "1"]
    result = CliRunner().invoke(_app(linalg.run), [*arguments, "--save", "--store", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = store.load(tmp_path, linalg.RESULTS)
    assert {r.workload for r in rows} == {
        f"{shape}/{kind}" for shape in ("24x40", "5x3") for kind in ("gaussian", "trained")
    }
    errors = [r.p50 for r in rows if r.metric == "relative_error"]
    bounds = [r.p50 for r in rows if r.metric == "relative_residual"]
    assert len(errors) == len(bounds) == 4
    assert all(e < 1e-5 for e in errors)
    assert all(r.p50 >= 1 for r in rows if r.metric == "iterations")
    assert {r.provider for r in rows if r.metric == "time_ms"} == {"power", "svd"}
    every = linalg.distinct_shapes(list(workloads.load()))
    assert len(every) == len(set(every)) > 100


@pytest.mark.parametrize(
    ("factor", "bound", "match"), [(1.01, 1.0, "off by"), (1.00001, 0.0, "exceeds")]
)
def test_a_wrong_value_or_bound_fails(
    monkeypatch: pytest.MonkeyPatch, factor: float, bound: float, match: str
) -> None:
    honest = linalg.linalg.top_singular

    def wrong(w: torch.Tensor, k: int):
        found = honest(w, k)
        spoilt = type(found)(found.U, found.S * factor, found.V)
        spoilt.__dict__.update(found.__dict__, residual=found.residual * bound)
        return spoilt

    monkeypatch.setattr(linalg.linalg, "top_singular", wrong)
    _, complaint = linalg.measure("gaussian", 8, 9, 1, store.environment())
    assert match in complaint
    result = CliRunner().invoke(_app(linalg.run), ["--workload", "1x8x9", "--repeats", "1"])
    assert result.exit_code == 1


def test_every_option_is_timed_beside_plain_srn(tmp_path: Path) -> None:
    arguments = ["--workload", "2x24x40", "--repeats", "1", "--save", "--store", str(tmp_path)]
    result = CliRunner().invoke(_app(options.run), arguments)
    assert result.exit_code == 0, result.output
    rows = store.load(tmp_path, options.RESULTS)
    assert {r.provider for r in rows} == {*options.OPTIONS, options.PROJECTION}
    assert [r.p50 for r in rows if (r.provider, r.metric) == ("srn", "time_over_srn_x")] == [1.0]
    problem = workloads.make_problem(workloads.find("2x24x40"))
    model = options.Matrices(problem)
    assert all(torch.equal(a, b) for a, b in zip(model(), problem.weights, strict=True))
