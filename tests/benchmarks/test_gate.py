"""The gate in front of every timing, and what is counted beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmark_rows import make_row

from benchmarks.cases import providers, runner, workloads
from benchmarks.measure import counting, oracle, suite
from srn_kernels.functional import stable_rank_normalize

TINY = workloads.Workload("tiny", "made up", ((8, 12), (9, 5), (1, 7)))


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


class Wrong(runner.StatefulRunner):
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
