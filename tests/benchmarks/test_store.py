"""The result store, and the documents that show it."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from benchmark_rows import make_row
from typer.testing import CliRunner

from benchmarks.cases import workloads
from benchmarks.commands import app
from benchmarks.measure import busy, groups, store, suite, timing
from benchmarks.report import documents, picture, plots, tables


def test_rows_survive_the_store(tmp_path):
    rows = [make_row(), make_row(date="2025-01-01", rank_ratio=None, provider="copy")]
    store.append(rows[:1], tmp_path / "new" / "b.jsonl")
    store.append(rows[1:], tmp_path / "new" / "a.jsonl")
    assert store.load(tmp_path / "new", "b.jsonl") == rows[:1]
    assert store.load(tmp_path / "new", "a.jsonl") == rows[1:]
    assert store.load(tmp_path) == []


def test_the_newest_row_of_a_subject_and_machine_counts():
    old, new = make_row(p50=1.0), make_row(p50=9.0, date="2026-02-01T00:00:00+00:00")
    other = make_row(threads=1)
    assert set(store.newest([new, other, old])) == {new, other}
    assert store.published([new, make_row(threads=1, date="2025")]) == [new]


def test_a_column_never_mixes_two_runs():
    old, new = make_row(provider="foreach"), make_row(date="2026-02-01T00:00:00+00:00")
    other = make_row(provider="foreach", mode="forward")
    assert set(store.of_last_runs([old, new, other])) == {new, other}
    assert set(store.published([old, new, other, make_row(n_power_iterations=4)])) == {new, other}


def test_the_environment_is_found():
    row = store.environment()
    assert row.cpu and row.cores > 0 and row.threads == torch.get_num_threads()
    assert row.torch == torch.__version__


cli = CliRunner()


def test_publish_writes_and_check_detects_a_difference(tmp_path):
    results = tmp_path / "results"
    rows = [make_row(metric=m) for m in ("time_ms", "time_over_copy_x", "speedup_over_torch_sn_x")]
    store.append([*rows, make_row(provider="torch_sn")], results / store.ROUNDS)
    (tmp_path / "docs").mkdir()
    readme, full = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    for document, names in (
        (readme, [documents.MAIN]),
        (full, ["saves", "curves", "peers", "repeatability"]),
    ):
        inner = [line for name in names for line in documents.markers(name)]
        document.write_text("\n".join(["before", *inner, "after\n"]))
    arguments = ["publish", "--store", str(results), "--root", str(tmp_path)]
    assert cli.invoke(app, [*arguments, "--check"]).exit_code == 1
    assert cli.invoke(app, arguments).exit_code == 0
    assert cli.invoke(app, [*arguments, "--check"]).exit_code == 0
    assert (tmp_path / "docs" / "overhead.png").stat().st_size > 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    readme.write_text(text.replace("| 2.0 ", "| 1.0 "))
    result = cli.invoke(app, [*arguments, "--check"])
    assert result.exit_code == 1
    assert "| 1.0 " in result.output
    readme.write_text(text)
    image = tmp_path / documents.PICTURE
    image.write_text(image.read_text().replace("2.0 times faster", "9.0 times faster"))
    assert "savings.svg is not" in cli.invoke(app, [*arguments, "--check"]).output
    readme.write_text("no markers")
    assert cli.invoke(app, [*arguments, "--check"]).exit_code == 2


def test_repeated_runs_are_paired_by_commit_machine_and_subject():
    first = make_row(date="2026-01-01")
    middle, last = replace(first, date="2026-01-02"), replace(first, date="2026-01-03")
    once = replace(first, date="2026-01-03", metric="added_ms")
    older = [replace(first, commit="bbbb", date=f"2025-01-0{day}") for day in (1, 2)]
    dirty = [replace(first, commit="cccc", date=f"2027-01-0{day}", dirty=True) for day in (1, 2)]
    elsewhere = replace(first, date="2026-01-03", cpu="slide rule")
    rows = [last, first, middle, once, elsewhere, *older, *dirty]
    assert store.repeated(rows) == [(middle, last)]
    assert store.repeated([first, once, elsewhere]) == []


def test_repeatability_counts_overlaps_and_differences():
    first = make_row()
    pairs = [(first, replace(first, p50=2.0 * (1 + i / 100))) for i in range(10)]
    pairs.append((first, replace(first, p20=3.5, p50=4.0, p80=5.0)))
    (line,) = tables.repeatability(pairs).lines
    assert line == ["times", "11", "91 %", "5.0 %", "9.0 %"]
    assert tables.repeatability([]).lines == []


def test_the_cost_of_calls_is_a_line_over_the_layers():
    names = [n for n in workloads.CORE if not n.endswith("bfloat16")]
    rows = [
        make_row(workload=n, metric="host_ms", p50=0.1 + 0.002 * len(workloads.find(n).shapes))
        for n in names
    ]
    grid = next(g for g in tables.grids(rows) if "fitted" in g.title)
    assert grid.lines == [["srn_kernels, SN", "100", "2.00"]]


def test_documents_agree_with_the_store():
    result = cli.invoke(app, ["publish", "--check"])
    assert result.exit_code == 0, result.output


def test_the_cost_of_groups_is_that_of_the_store():
    rows = store.load(name=groups.RESULTS)
    last = [r for r in rows if r.date == rows[-1].date]
    assert not documents.difference(documents.GROUPS, documents.groups_block(last))


def test_stored_rows_have_a_commit_and_known_workloads():
    rows = [
        row for name in (store.ROUNDS, store.CURVES, store.BUSY) for row in store.load(name=name)
    ]
    assert rows
    for row in rows:
        assert row.commit != "unknown"
        workloads.find(row.workload)


def test_a_run_writes_rows(tmp_path):
    arguments = ["run", "--quick", "--workload", "2x6x8", "--rank-ratio", "1", "--repeats", "2"]
    for name in ("copy", "torch_sn", "reference"):
        arguments += ["--provider", name]
    result = cli.invoke(app, [*arguments, "--save", "--store", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = store.load(tmp_path)
    times = {(r.provider, r.mode): r for r in rows if r.metric == "time_ms"}
    assert set(times) == {
        (name, mode)
        for name in ("copy", "torch_sn", "reference")
        for mode in ("forward", "forward_backward")
    }
    host = {r.provider for r in rows if r.metric == "host_ms"}
    assert (
        host == {r.provider for r in rows if r.metric == "operators"} == {"torch_sn", "reference"}
    )
    assert all(r.repeats == 2 and 0 < r.p20 <= r.p50 <= r.p80 for r in times.values())
    assert times["copy", "forward_backward"].bytes == 5 * 2 * 6 * 8 * 4
    ratios = {(r.provider, r.mode) for r in rows if r.metric == "time_over_copy_x"}
    assert ratios == {key for key in times if key[0] != "copy"}


@pytest.mark.parametrize(
    "arguments", [["--workload", "nothing"], ["--provider", "nobody"], ["--rank-ratio", "2"]]
)
def test_bad_arguments_are_refused(arguments):
    assert cli.invoke(app, ["run", *arguments]).exit_code == 2


def test_compare_tells_a_change_from_noise():
    rows = [
        make_row(),
        make_row(commit="bbbb", p20=0.5, p50=0.6, p80=0.7),
        make_row(mode="forward"),
        make_row(commit="bbbb", mode="forward", p50=2.5),
    ]
    grid = tables.comparison(rows, "aaaa", "bbbb")
    assert [line[-2:] for line in grid.lines] == [["1.25", "same"], ["0.30", "faster"]]
    with pytest.raises(ValueError, match="cccc"):
        tables.comparison(rows, "aaaa", "cccc")


def test_the_picture_draws_an_operator_a_square_and_bars_to_scale():
    rows = [
        make_row(workload=picture.COUNTED, provider=name, metric=metric, p50=value)
        for name, metric, value in (
            ("torch_sn", "operators", 506.0),
            ("module", "operators", 2.0),
            ("torch_sn", "time_ms", 100.0),
            ("module", "time_ms", 25.0),
            ("module", "speedup_over_torch_sn_x", 4.0),
        )
    ]
    root = ElementTree.fromstring(picture.savings(rows))
    boxes = [e for e in root.iter() if e.tag.endswith("rect")]
    theirs, ours = ([b for b in boxes if b.get("class") == c] for c in ("theirs", "ours"))
    assert (len(theirs), len(ours)) == (507, 3)
    widths = [max(float(b.get("width")) for b in part) for part in (theirs, ours)]
    assert widths[0] == 4 * widths[1]
    assert not picture.savings([])


def test_plot(tmp_path):
    rows = [make_row(metric="time_over_copy_x")]
    plots.overhead(rows, tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 0
    with pytest.raises(ValueError, match="no measurement"):
        plots.overhead([], tmp_path / "none.png")
    beside = [
        make_row(workload=busy.WORKLOADS[0], metric="mean_ms", busy=case, provider=name)
        for case in busy.CASES
        for name in busy.PROVIDERS
    ]
    plots.busy(beside, tmp_path / "busy.png")
    assert (tmp_path / "busy.png").stat().st_size > 0
    with pytest.raises(ValueError, match="no measurement"):
        plots.busy([], tmp_path / "none.png")


def test_what_normalising_adds_to_a_round():
    samples = timing.Samples({("plain", None): [1.0, 1.0], ("module", 1.0): [4.0, 4.0]})
    (row,) = [r for r in suite.make_rows(samples, make_row()) if r.metric == "added_ms"]
    assert (row.provider, row.p50) == ("module", 3000.0)


def step_rows(difference: tuple[float, float, float]) -> list[store.Row]:
    low, middle, high = difference
    place = {"workload": "densenet40_k12", "mode": "step"}
    return [
        make_row(**place, provider="plain", rank_ratio=None, p50=200.0),
        make_row(**place, metric="spent_ms", p50=2.0, low=1.9, high=2.1),
        make_row(**place, metric="spent_percent", p50=1.0, low=0.9, high=1.1),
        make_row(**place, metric="difference_ms", p50=middle, low=low, high=high),
    ]


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((-1.0, 2.0, 5.0), "not decided (-1.00 to 5.00)"),
        ((1.0, 2.0, 3.0), "2.00 (1.00 to 3.00)"),
        ((4.0, 5.0, 6.0), "5.00 (4.00 to 6.00) *"),
    ],
)
def test_a_share_has_an_interval_or_is_not_decided(difference, said):
    (line,) = tables.step(step_rows(difference)).lines
    assert line[2:] == ["200", "2.00 (1.90 to 2.10)", "1.00 (0.900 to 1.10)", said]


def test_where_a_peer_is_quicker_is_told():
    rows = [
        make_row(p50=2.0),
        make_row(provider="foreach", p50=1.0),
        make_row(provider="torch_sn", p50=1.5),
        make_row(mode="forward", p50=1.0),
        make_row(mode="forward", provider="torch_sn", p50=3.0),
        make_row(mode="backward", p50=1.0),
    ]
    grid, wins, places = tables.where_peers_win(rows)
    assert (wins, places) == (1, 2)
    assert grid.lines[0][1:] == ["spectral norm by hand, torch._foreach", "1.00", "2.00", "2.00"]


def test_the_readme_shows_the_busy_machine_too():
    name = "sngan_cifar_resnet_D"
    rows = [make_row(workload=name, metric="speedup_over_torch_sn_x", p50=3.0)]
    beside = [
        make_row(workload=name, metric="speedup_of_means_over_torch_sn_x", p50=x, busy=case)
        for case, x in (("0", 3.1), ("1", 40.0))
    ]
    (line,) = tables.savings(rows, beside).lines
    assert line[2:] == ["3.0", "40.0", "", ""]
    later = replace(beside[1], date="2027-01-01T00:00:00+00:00")
    assert store.of_last_runs([beside[0], later]) == [beside[0], later]  # columns of their own
