"""The benchmark suite: its data, its arithmetic, its gate, its store and its command line."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import (
    bench_groups,
    counting,
    growth,
    models,
    oracle,
    plots,
    providers,
    steps,
    store,
    suite,
    tables,
    timing,
    workloads,
)
from benchmarks.__main__ import app
from srn_kernels.functional import stable_rank_normalize

ROOT = Path(__file__).parent.parent
TINY = workloads.Workload("tiny", "made up", ((8, 12), (9, 5), (1, 7)))


def make_row(**values) -> store.Row:
    first = {
        "commit": "aaaa",
        "dirty": False,
        "date": "2026-01-01T00:00:00+00:00",
        "srn_kernels": "0",
        "torch": "2",
        "python": "3",
        "cpu": "abacus",
        "cores": 2,
        "threads": 2,
        "instruction_set": "beads",
        "load": 0.0,
        "workload": workloads.CORE[0],
        "provider": "module",
        "rank_ratio": 1.0,
        "mode": "forward_backward",
        "metric": "time_ms",
        "p20": 1.0,
        "p50": 2.0,
        "p80": 3.0,
        "repeats": 5,
        "bytes": 8,
    }
    return store.Row(**{**first, **values})


# --- workloads -----------------------------------------------------------------------------------


def test_workloads_hold_what_they_say():
    known = workloads.load()
    assert all(workloads.find(name).parameters > 0 for name in workloads.CORE)
    assert known["biggan_128_D_ch96"].parameters == 87_970_368


def test_a_wrong_total_is_refused():
    record = {"source": "", "layers": [[2, 3, 1]], "total_params": 7}
    with pytest.raises(ValueError, match="6 parameters, total_params says 7"):
        workloads.Workload.from_record("w", record)


@pytest.mark.parametrize(
    ("name", "shapes"), [("2x3x4", ((3, 4),) * 2), ("densenet40_k12/20", ((16, 27), (12, 2088)))]
)
def test_workloads_made_from_numbers(name, shapes):
    assert workloads.find(name).shapes == shapes


def test_workloads_of_half_precision():
    half = workloads.find("2x3x4@bfloat16")
    assert half.shapes == workloads.find("2x3x4").shapes
    problem = workloads.make_problem(half)
    assert {w.dtype for w in problem.weights + problem.upstream} == {torch.bfloat16}
    assert workloads.floor_bytes(half, "backward") == 3 * 24 * 2


@pytest.mark.parametrize(
    "name", ["nothing", "0x3x4", "vit_b16/0", "nothing/2", "2x3x4@int8", "nothing@bfloat16"]
)
def test_an_unknown_workload_is_named(name):
    with pytest.raises(ValueError, match=name.removesuffix("@bfloat16")):
        workloads.find(name)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 7), (6, 6)])
def test_flat_matrix_has_singular_values_one(shape):
    singular = torch.linalg.svdvals(workloads.flat_matrix(*shape))
    torch.testing.assert_close(singular, torch.ones_like(singular))


def weight_shapes(model: torch.nn.Module) -> Counter:
    """Of the matrices that are normalised; transposed convolutions have their rows second."""
    shapes: Counter = Counter()
    for layer in steps.normalized_layers(model).values():
        rows = layer.weight.shape[isinstance(layer, torch.nn.ConvTranspose2d)]
        shapes[rows, layer.weight.numel() // rows] += 1
    return shapes


@pytest.mark.parametrize("name", steps.MODELS)
def test_models_have_their_workloads_weights(name):
    with torch.device("meta"):
        model = steps.MODELS[name].make()
    assert weight_shapes(model) == Counter(workloads.find(name).shapes)


def test_the_normalized_generator_has_its_workloads_weights():
    with torch.device("meta"):
        generator = steps.MODELS["biggan_128_D_ch96"].generator()
    assert weight_shapes(generator) == Counter(workloads.find("biggan_128_G_ch96").shapes)


# --- timing --------------------------------------------------------------------------------------


class FakeClock:
    """Time that passes only inside the timed bodies."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def body(self, name: str, seconds):
        durations = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(durations)

        return timing.Body(run, prepare=lambda: self.prepare(name))

    def prepare(self, name: str) -> None:
        self.calls.append(name.upper())
        self.now += 1000.0  # must not count


def test_percentiles():
    assert timing.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.5, 5.0, 6)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="values"):
        timing.spread([])


def test_candidates_take_turns_and_ratios_are_paired():
    clock = FakeClock()
    warm = [1.0] * timing.WARM_UPS
    bodies = {
        "a": clock.body("a", [*warm, 1.0, 10.0, 100.0]),
        "b": clock.body("b", [*warm, 2.0, 30.0, 400.0]),
    }
    samples = timing.measure(bodies, repeats=3, budget=1e9, clock=clock)
    turns = "".join(clock.calls[4 * timing.WARM_UPS :])
    assert sorted(turns[:4]) == sorted(turns[4:8]) == sorted(turns[8:]) == ["A", "B", "a", "b"]
    assert turns.replace("Aa", "").replace("Bb", "") == ""  # prepared right before its call
    assert samples == {"a": [1.0, 10.0, 100.0], "b": [2.0, 30.0, 400.0]}
    ratios = samples.paired("b", "a", lambda t, base: t / base)
    # Of the ratios 2, 3 and 4, not of medians: a machine that slows down cancels.
    assert ratios == pytest.approx((2.4, 3.0, 3.6, 3))
    assert samples.paired("b", "absent", lambda t, base: t) is None


def test_a_slow_candidate_sits_repeats_out():
    clock = FakeClock()
    bodies = {"slow": clock.body("slow", [3.0] * 99), "fast": clock.body("fast", [0.1] * 99)}
    samples = timing.measure(bodies, repeats=20, budget=30.0, clock=clock)
    assert samples.spread("slow").repeats == 10
    assert samples.spread("fast").repeats == 20
    assert samples.paired("fast", "slow", lambda t, base: t / base).repeats == 10
    assert timing.share_of_repeats(1e6, 20, 30.0) == timing.FEWEST


@pytest.mark.parametrize(("seconds", "calls"), [(2.0, timing.FEWEST + 1), (1.0, 7 + 2)])
def test_a_slow_candidate_is_warmed_up_once(seconds, calls):
    clock = FakeClock()
    body = clock.body("x", [seconds] * 99)
    timing.measure({"x": body}, repeats=20, budget=7.0, clock=clock)
    assert clock.calls.count("x") == calls


def test_neighbours_change_from_repeat_to_repeat():
    clock = FakeClock()
    bodies = {name: clock.body(name, [1.0] * 99) for name in "abcd"}
    timing.measure(bodies, repeats=40, budget=1e9, clock=clock)
    turns = [name for name in clock.calls if name.islower()][4 * timing.WARM_UPS :]
    first = Counter(turns[::4])
    assert set(first) == set("abcd") and max(first.values()) < 20


def test_garbage_collection_is_off_and_comes_back():
    import gc

    seen = []
    body = timing.Body(lambda: seen.append(gc.isenabled()))
    timing.measure({"a": body}, repeats=1, budget=1.0)
    assert not any(seen)
    assert gc.isenabled()


# --- the gate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> workloads.Problem:
    return workloads.make_problem(TINY)


EAGER = [
    pytest.param(name, ratio, id=f"{name}-{ratio}")
    for name, declared in providers.PROVIDERS.items()
    for ratio in declared.ratios([1.0, 0.7, 0.05], TINY)
    if name != "torch_sn_compiled" and ratio is not None
]


@pytest.mark.parametrize(
    ("name", "workload", "served"),
    [
        ("copy", "2x8x8", [None]),
        ("torch_sn", "2x8x8", [1.0]),
        ("layerwise", "2x8x8", [0.7]),
        ("module", "2x8x8", [1.0, 0.7]),
        ("torch_sn_compiled", "17x8x8", []),
        ("reference", "2x8x8", [1.0, 0.7]),
        ("reference", "biggan_128_D_ch96", [0.7]),
        ("module", "biggan_128_D_ch96", [1.0, 0.7]),
    ],
)
def test_what_a_provider_serves(name, workload, served):
    assert providers.PROVIDERS[name].ratios([1.0, 0.7], workloads.find(workload)) == served


@pytest.mark.parametrize(
    ("iterations", "dtype"), [(1, torch.float32), (3, torch.float32), (1, torch.bfloat16)]
)
@pytest.mark.parametrize(("name", "rank_ratio"), EAGER)
def test_every_provider_passes_the_gate(name, rank_ratio, iterations, dtype):
    workload = replace(TINY, dtype=dtype)
    problem = workloads.make_problem(workload, n_power_iterations=iterations)
    declared = providers.PROVIDERS[name]
    if reason := declared.unavailable_reason():
        pytest.skip(reason)
    runner = declared.runner(problem, rank_ratio)
    wanted = oracle.make_oracle(problem, rank_ratio, runner.updates_v_first)
    oracle.check_runner(name, runner, wanted, declared.modes)
    for mode in declared.modes:
        body = runner.body(mode)
        body.prepare()
        body.run()
    assert all(p.grad is None for p in runner.parameters)


class Wrong(providers.StatefulRunner):
    """Right but for what ``spoil`` does."""

    def outputs(self):
        training = self.training and self.spoil != "iteration"
        ranks = [2.0 * r for r in self.target_ranks] if self.spoil == "rank" else self.target_ranks
        outs = stable_rank_normalize(
            self.parameters, self.us, self.vs, ranks, training=training, backend="reference"
        )
        if self.spoil == "gradient":
            outs = [out.detach() + 1.001 * (out - out.detach()) for out in outs]
        if self.spoil == "evaluation" and not self.training:
            outs = [1.001 * out for out in outs]
        return outs


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("iteration", "output of layer 0"),
        ("rank", "output of layer 0"),
        ("gradient", "gradient of layer 0"),
        ("evaluation", "evaluation output of layer 0"),
    ],
)
def test_the_gate_stops_a_wrong_provider(problem, spoil, message):
    runner = Wrong(problem, 0.5)
    runner.spoil = spoil
    with pytest.raises(oracle.WrongResult, match=message):
        oracle.check_runner("wrong", runner, oracle.make_oracle(problem, 0.5), providers.MODES)


@pytest.mark.parametrize(
    ("mode", "metric", "value"),
    [("forward", "added_ms", 3000.0), ("step", "share_of_step_percent", 75.0)],
)
def test_what_normalising_adds_is_a_time_in_a_round_and_a_share_of_a_step(mode, metric, value):
    samples = timing.Samples({("plain", None): [1.0, 1.0], ("module", 1.0): [4.0, 4.0]})
    rows = suite.make_rows(samples, make_row(mode=mode))
    (row,) = [r for r in rows if r.metric in ("added_ms", "share_of_step_percent")]
    assert (row.provider, row.metric, row.p50) == ("module", metric, value)


def test_a_wrong_provider_is_not_timed(problem, monkeypatch):
    Wrong.spoil = "gradient"
    declared = replace(providers.PROVIDERS["reference"], name="wrong", runner=Wrong)
    monkeypatch.setitem(providers.PROVIDERS, "wrong", declared)
    complaints = []
    watcher = suite.Watcher(complain=complaints.append)
    options = suite.Options(providers=("copy", "wrong"), rank_ratios=(0.5,), repeats=1)
    rows = suite.run_matrices(TINY, options, make_row(), watcher)
    assert {row.provider for row in rows} == {"copy"}
    assert watcher.failures == 1
    assert "gradient" in complaints[0]


# --- counting ------------------------------------------------------------------------------------


def test_operators_and_their_bytes_are_counted():
    a, b, out = torch.ones(8, 4), torch.ones(8, 4), torch.empty(8, 4)

    def body() -> None:
        c = a + b  # reads two, writes one
        c.mul_(2)  # reads and writes one
        out.copy_(c.t().t())  # views are free; reads one, writes one
        torch.empty(99)

    assert counting.count(body) == (3, (3 + 2 + 2) * 8 * 4 * 4)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("copy", 5),
        # Forward: two products read W, the division reads W and writes W_hat. Backward: the
        # division reads G and writes, the inner product reads G and W, addr_ reads and writes.
        ("foreach", 4 + 6),
        ("module", 5),
    ],
)
def test_counted_bytes_are_those_of_the_algorithm(name, passes):
    declared = providers.PROVIDERS[name]
    if reason := declared.unavailable_reason():
        pytest.skip(reason)
    workload = workloads.find("2x256x256")
    (ratio,) = declared.ratios([1.0], workload)
    runner = declared.runner(workloads.make_problem(workload), ratio)
    runner.forward_backward()
    bytes_of_a_pass = workload.parameters * 4
    vectors = 64 * 256 * 4  # u, v, s, t: a few of each
    assert 0 <= counting.count(runner.forward_backward).bytes - passes * bytes_of_a_pass <= vectors


# --- the store -----------------------------------------------------------------------------------


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


# --- tables and command line ---------------------------------------------------------------------

cli = CliRunner()


def test_publish_writes_and_check_detects_a_difference(tmp_path):
    results = tmp_path / "results"
    store.append([make_row(), make_row(metric="time_over_copy_x")], results / store.ROUNDS)
    (tmp_path / "docs").mkdir()
    readme, full = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    for document in (readme, full):
        document.write_text(f"before\n{tables.BEGIN}\n{tables.END}\nafter\n")
    arguments = ["publish", "--store", str(results), "--root", str(tmp_path)]
    assert cli.invoke(app, [*arguments, "--check"]).exit_code == 1
    assert cli.invoke(app, arguments).exit_code == 0
    assert cli.invoke(app, [*arguments, "--check"]).exit_code == 0
    assert (tmp_path / "docs" / "overhead.png").stat().st_size > 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    readme.write_text(text.replace("**2.00", "**1.00"))
    result = cli.invoke(app, [*arguments, "--check"])
    assert result.exit_code == 1
    assert "**1.00" in result.output
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
    rows = store.load(name=bench_groups.ROWS.name)
    last = [r for r in rows if r.date == rows[-1].date]
    assert not tables.difference(bench_groups.DOCUMENT, bench_groups.table(last))


def test_stored_rows_have_a_commit_and_known_workloads():
    rows = store.load() + store.load(name=store.CURVES)
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


def test_plot(tmp_path):
    rows = [make_row(metric="time_over_copy_x"), make_row(metric="share_of_step_percent")]
    plots.overhead(rows, tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 0
    with pytest.raises(ValueError, match="no measurement"):
        plots.overhead([], tmp_path / "none.png")


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


@pytest.mark.parametrize("provider", steps.STEP_PROVIDERS)
@pytest.mark.parametrize("kind", ["gan", "images alone", "supervised"])
def test_a_training_step_trains(provider, kind, monkeypatch):
    if provider == "module" and (reason := providers.PROVIDERS["module"].unavailable_reason()):
        pytest.skip(reason)
    made: list[torch.nn.Module] = []

    def remember(model: torch.nn.Module) -> torch.nn.Module:
        made.append(model)
        return model

    def discriminator() -> torch.nn.Module:
        return remember(models.ResNetDiscriminator((8, 6), 1, True, 3))

    def generator() -> torch.nn.Module:
        return remember(models.BigGANGenerator((8, 8, 8), 6, 4, 3))

    loss = steps.supervised_step(torch.nn.functional.mse_loss, torch.Tensor.clone)
    images = (2, 3, 16, 16)
    spec = {
        "gan": steps.Model(discriminator, steps.gan_step, images, generator, True),
        "images alone": steps.Model(discriminator, steps.gan_step, images),
        "supervised": steps.Model(
            lambda: remember(models.Emulator(3, (4, 6), (1, 1))), loss, images
        ),
    }[kind]
    monkeypatch.setitem(steps.MODELS, "small", spec)
    step = steps.make_step("small", provider, None if provider == "plain" else 1.0)
    before = [[p.detach().clone() for p in model.parameters()] for model in made]
    step()
    assert len(made) == (2 if kind == "gan" else 1)
    for model, old in zip(made, before, strict=True):
        moved = [not p.equal(q) for p, q in zip(model.parameters(), old, strict=True)]
        assert sum(moved) > len(moved) / 2
        assert all(p.requires_grad for p in model.parameters())
