"""The CUDA kernels against the float64 oracle: on a GPU, or compiled for the CPU (--cuda-shim)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import oracle
import pytest
import torch
from gpu_rounds import (
    SHAPES,
    Round,
    check_round,
    device_of,
    nan_like,
)

from benchmarks.cases import workloads
from srn_kernels.backends import cuda as backend
from srn_kernels.backends.cuda import planning
from srn_kernels.backends.tiling.config import KB

pytestmark = pytest.mark.skipif(
    backend.unavailable_reason() is not None, reason=f"cuda: {backend.unavailable_reason()}"
)
make_round = functools.partial(Round.make, backend=backend)
EMULATED = device_of(backend) == "cpu"
WORKLOADS = workloads.load()


@pytest.fixture
def blueprints(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[planning.Blueprint]]:
    """Every plan that a test makes."""
    made, plan = [], planning.plan
    monkeypatch.setattr(planning, "plan", lambda *a: made.append(plan(*a)) or made[-1])
    backend.extension.clear_plans()
    yield made
    backend.extension.clear_plans()


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_id)
@pytest.mark.parametrize("name", oracle.LAYOUTS)
def test_layouts_and_odd_shapes(name, dtype, iterations):
    made = [oracle.make_weight(name, s, dtype) for s in SHAPES]
    check_round(make_round(made), iterations, skip_gradient=iterations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=oracle.dtype_id)
def test_unaligned_pointers(dtype):
    # On the device: a copy to it would be aligned.
    storage = torch.randn(8 * 64 * 48, device=device_of(backend)).to(dtype)
    made = [
        (storage[i + k * 64 * 48 :][: 64 * 48].view(64, 48), 0)
        for k, i in enumerate((0, 1, 2, 3, 4, 5, 7))
    ]
    assert {w.data_ptr() % 16 for w, _ in made} != {0}
    check_round(make_round(made))


def test_one_launch_each_way():
    made = make_round([(torch.randn(s), 0) for s in SHAPES])
    before = backend.extension.launch_count()
    check_round(made)
    assert backend.extension.launch_count() == before + 2


@pytest.mark.parametrize("columns", [1156, 1157, 4612, 4613, 9216, 9218])
def test_rows_of_every_width(columns):
    """Few or many vectors a thread, and rows that are read directly."""
    made = [(torch.randn(n, columns), 0) for n in (5, 37)]
    check_round(make_round(made), [1, 2])
    check_round(make_round([(w.bfloat16(), d) for w, d in made]), 1)


@pytest.mark.skipif(not EMULATED, reason="changes the number of CTAs under a fixed cut")
def test_runs_are_bit_identical_whatever_the_number_of_ctas(monkeypatch):
    made = make_round([(torch.randn(s), 0) for s in [*SHAPES, (300, 260), (200, 1024)]])
    grads = [torch.randn_like(w) for w in made.weights]
    config = planning.device_config
    results = []
    for ctas in (1, 2, 7):

        def fixed(*args, n=ctas):
            launch, shared = config(*args)
            return replace(launch, programs=n), shared

        monkeypatch.setattr(planning, "device_config", fixed)
        backend.extension.clear_plans()
        run = made.copy()
        for _ in range(3):  # a launch finds the counters of the one before
            run.normalize(1)
        results.append((*run.outs, *run.us, *run.vs, *run.gradients(grads, range(len(grads)))))
    assert backend.extension.counters_are_clean()
    backend.extension.clear_plans()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_layers_than_one_launch_holds(blueprints):
    shapes = [SHAPES[i % len(SHAPES)] for i in range(23)]
    made = make_round([(torch.randn(s), 0) for s in shapes])
    grads = [torch.randn_like(w) for w in made.weights]
    before, capacities = made.copy(), backend.extension.capacities()
    made.normalize(1)
    together = made.gradients(grads, range(len(grads)))
    assert len(blueprints) == 2
    backend.extension.set_capacities(5, 10)
    try:
        launches = backend.extension.launch_count()
        before.normalize(1)
        apart = before.gradients(grads, range(len(grads)))
        assert backend.extension.launch_count() == launches + 5 + 3
    finally:
        backend.extension.set_capacities(*capacities)
    # A small model is cut finer than a larger one, so sums may differ in order.
    for a, b in zip([*made.outs, *together], [*before.outs, *apart], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="capacities"):
        backend.extension.set_capacities(capacities[0] + 1, 1)


def test_bad_arguments_are_named_and_change_nothing():
    made = make_round([(torch.randn(4, 6), 0)])
    before = made.copy()
    empty = functools.partial(torch.empty, device=made.weights[0].device)
    cases = {
        "u must be": made._replace(us=[made.vs[0]]),
        "out must have the sizes": made._replace(outs=[empty(6, 4)]),
        "float64 output": made._replace(outs=[nan_like(made.weights[0], torch.float64)]),
        "round_state is too small": made._replace(round_state=made.round_state[:8].clone()),
        "different lengths": made._replace(dims=[0, 0]),
        "not dense": made._replace(weights=[empty(4, 12)[:, ::2]], outs=[empty(4, 12)[:, ::2]]),
    }
    for message, bad in cases.items():
        with pytest.raises((ValueError, TypeError), match=message):
            bad.normalize(1)
    assert torch.equal(made.us[0], before.us[0]) and made.outs[0].isnan().all()


def test_the_plans_of_the_tests_reach_every_path(blueprints):
    shapes = [(60, 260), (9, 1100), (40, 27), (300, 1024), (3, 5000)]
    made = make_round([*((torch.randn(s), 0) for s in shapes), (torch.randn(30, 40), 1)])
    made.normalize(2)
    (made_plan,) = blueprints
    records = [
        planning.RECORD.unpack_from(made_plan.records, i * planning.RECORD.size)
        for i in range(len(shapes) + 1)
    ]
    assert {r[16] for r in records} == {0, 1, 2}  # direct, scalars, vectors
    assert any(r[9] for r in records) and not all(r[9] for r in records)  # column tiles
    assert made_plan.resident_slots > 0
    if EMULATED:  # otherwise slabs would rarely leave shared memory before they are rescaled
        assert made_plan.slot_bytes * (made_plan.resident_slots + made_plan.stream_slots) < 40 * KB
