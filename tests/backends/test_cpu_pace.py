"""Rounds of the C++ backend learn whether other threads are worth their wait."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from srn_kernels import functional
from srn_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason=f"cpu: {cpu.unavailable_reason()}")

ALONE, TOGETHER, DELAY = 0.3e-3, 0.17e-3, 8e-3  # seconds


class Machine:
    """How long rounds take where now and then a helper has to wait for its core."""

    def __init__(self, delayed: float) -> None:
        self.delayed, self.random = delayed, random.Random(0)

    def seconds(self, parallel: bool) -> float:
        noise = self.random.uniform(0.95, 1.1)
        if not parallel:
            return noise * ALONE
        return noise * TOGETHER + (DELAY if self.random.random() < self.delayed else 0)


def run(pace, machine: Machine, rounds: int) -> tuple[float, float]:
    """Seconds, and the share of the rounds in parallel."""
    total, together = 0.0, 0
    for _ in range(rounds):
        parallel = pace.parallel()
        seconds = machine.seconds(parallel)
        pace.took(seconds)
        total, together = total + seconds, together + parallel
    return total, together / rounds


def test_a_quiet_machine_keeps_its_threads():
    seconds, together = run(cpu._cpu.Pace(), Machine(0), 5000)
    assert together > 0.99
    assert seconds < 1.05 * 5000 * TOGETHER


def test_one_hiccup_does_not_cost_many_rounds():
    pace, machine = cpu._cpu.Pace(), Machine(0)
    run(pace, machine, 100)
    pace.took(50e-3)
    assert run(pace, machine, 100)[1] > 0.75


@pytest.mark.parametrize("delayed", [0.1, 0.25, 0.5, 1.0])
def test_a_busy_machine_costs_little_more_than_one_thread(delayed):
    seconds, together = run(cpu._cpu.Pace(), Machine(delayed), 5000)
    assert together < 0.05
    assert seconds < 1.2 * 5000 * ALONE


def test_what_has_changed_is_noticed():
    pace = cpu._cpu.Pace()
    run(pace, Machine(0), 1000)
    assert run(pace, Machine(0.5), 2000)[1] < 0.05
    run(pace, Machine(0), 2100)  # the longest time until a trial
    assert run(pace, Machine(0), 1000)[1] > 0.98


def test_threads_that_bring_nothing_are_left_alone():
    class Same(Machine):
        def seconds(self, parallel: bool) -> float:
            return ALONE * self.random.uniform(0.95, 1.1) * (1.3 if parallel else 1)

    assert run(cpu._cpu.Pace(), Same(0), 2000)[1] < 0.05


def test_the_first_rounds_are_alike_whatever_they_run_on():
    """They run in turn in parallel and on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        weights = [torch.randn(96, 700), torch.randn(64, 900)]
        vectors = [[torch.randn(n) for n in sizes] for sizes in ((96, 64), (700, 900))]
        seen = [
            functional.stable_rank_normalize(
                weights, *([x.clone() for x in xs] for xs in vectors), [20.0, 20.0]
            )
            for _ in range(8)
        ]
    finally:
        torch.set_num_threads(before)
    for outs in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outs, seen[0], strict=True))


def test_rounds_of_several_threads_learn_at_once():
    weights = [torch.randn(96, 700) for _ in range(3)]
    us, vs = [torch.randn(96) for _ in range(3)], [torch.randn(700) for _ in range(3)]
    expected = functional.stable_rank_normalize(weights, us, vs, [20.0] * 3, training=False)
    wrong = []

    def work() -> None:
        for _ in range(50):
            outs = functional.stable_rank_normalize(weights, us, vs, [20.0] * 3, training=False)
            if not all(torch.equal(x, y) for x, y in zip(outs, expected, strict=True)):
                wrong.append(outs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
