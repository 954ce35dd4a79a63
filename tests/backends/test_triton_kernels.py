"""The Triton kernels against the float64 oracle: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace

import oracle
import pytest
import torch
from gpu_rounds import (
    SHAPES,
    Round,
    check_round,
    device_of,
    gradient_layer,
    nan_like,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.cases import workloads
from benchmarks.gpu import launches
from srn_kernels import functional
from srn_kernels.backends import triton as backend

pytestmark = [
    pytest.mark.skipif(
        backend.unavailable_reason() is not None, reason=f"triton: {backend.unavailable_reason()}"
    ),
    pytest.mark.usefixtures("small_tiles", "poisoned"),
]
if backend.unavailable_reason() is None:
    from srn_kernels.backends.tiling import layout
    from srn_kernels.backends.tiling.schedule import check
    from srn_kernels.backends.triton import launch

make_round = functools.partial(Round.make, backend=backend)
DEVICE = device_of(backend)
INTERPRETED = DEVICE == "cpu"
WORKLOADS = workloads.load()
EMPTY = torch.empty
F32 = torch.float32


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[launch.Plan]:
    """Every plan that a test makes."""
    made = []

    class Recorded(launch.Plan):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(launch, "Plan", Recorded)
    return made


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("name", oracle.LAYOUTS)
def test_layouts_and_odd_shapes(name, iterations):
    made = [oracle.make_weight(name, s, torch.float32) for s in SHAPES]
    check_round(make_round(made), iterations, skip_gradient=iterations)


def test_unaligned_pointers():
    storage = torch.randn(3 * 64 * 48 + 8)
    made = [(storage[i : i + 64 * 48].view(64, 48), 0) for i in (0, 1, 64 * 48 + 3)]
    shape = layout.make_layout((64, 48), (48, 1), 0)
    aligned = [layout.Spec(shape, 4, 4, w.data_ptr() % 16 == 0).alignment for w, _ in made]
    assert aligned == [4, 1, 1]
    check_round(make_round(made))


def test_runs_are_bit_identical_whatever_the_number_of_programs(monkeypatch, plans):
    made = make_round([(torch.randn(s), 0) for s in SHAPES])
    grads = [torch.randn_like(w) for w in made.weights]
    config = launch.device_config
    results = []
    for programs in (1, 2, 7):
        monkeypatch.setattr(
            launch, "device_config", lambda *a, n=programs: replace(config(*a), programs=n)
        )
        launch.plan_for.cache_clear()
        run = made.copy()
        for _ in range(2):  # the second launch finds the counters of the first
            run.normalize(1)
        results.append((*run.outs, *run.us, *run.vs, *run.gradients(grads, range(len(grads)))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not any(slot.counters.any() for plan in plans for slot in plan.slots.all())


class Ops(TorchDispatchMode):
    """Names of the tensor operations of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's launches")
@pytest.mark.parametrize("iterations", [-1, 0, 1, 2])
def test_one_launch_each_way_for_any_number_of_layers(iterations, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(torch, "empty", EMPTY)
    launches = []
    run = InterpretedFunction.run

    def counted(self, *args, grid, **kwargs):
        launches.append(grid)
        with _disable_current_modes():  # the interpreter copies its arguments
            return run(self, *args, grid=grid, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    types = [torch.float32, torch.bfloat16, torch.float16]
    made = make_round(
        [
            oracle.make_weight(k, (12 + i, 18), types[i % 3])
            for i, k in enumerate(list(oracle.LAYOUTS) * 2)
        ]
    )
    made.normalize(1)
    made.normalize(iterations)  # tables and plans stand now
    launches.clear()
    with Ops() as seen:
        made.normalize(iterations)
    assert len(launches) == 1
    assert set(seen.names) <= {"aten::empty.memory_format"}, seen.names
    grads = [torch.randn_like(o) for o in made.outs]
    results = [nan_like(w) for w in made.weights]
    arguments = (grads, made.weights, made.round_state, made.stats, results)
    arguments += (range(len(grads)), made.offsets, made.dims)
    launch.normalize_backward(*arguments)
    launches.clear()
    with Ops() as seen:
        launch.normalize_backward(*arguments)
    assert len(launches) == 1
    assert set(seen.names) <= {"aten::empty.memory_format"}, seen.names


def test_every_verb_and_a_models_training_step_are_one_launch_each():
    device = torch.device(DEVICE)
    count = launches.count_interpreted if INTERPRETED else launches.count_cuda
    taken = {name: count(body)[0] for name, body in launches.steps(device, "triton").items()}
    assert {"forward", "backward", "projection", "model forward", "model backward"} <= taken.keys()
    assert taken == dict.fromkeys(taken, 1)


def test_the_default_device_does_not_matter():
    made = make_round([(torch.randn(40, 27), 0), oracle.make_weight("permuted", (9, 18), F32)])
    expected = made.copy()
    expected.normalize(1)
    launch.plan_for.cache_clear()
    with torch.device("meta"):
        made.normalize(1)
    assert all(torch.equal(a, b) for a, b in zip(made.outs, expected.outs, strict=True))


def test_threads_share_a_plan():
    """Each with weights and, on a GPU, a stream of its own."""
    rounds = [make_round([(torch.randn(s), 0) for s in [(40, 27), (60, 260)]]) for _ in range(4)]
    expected = [made.copy() for made in rounds]
    for made in expected:
        for _ in range(3):
            made.normalize(1)
    errors: list[BaseException] = []

    def work(made: Round) -> None:
        try:
            with torch.cuda.stream(None if INTERPRETED else torch.cuda.Stream()):
                for _ in range(3):
                    made.normalize(1)
                if not INTERPRETED:
                    torch.cuda.current_stream().synchronize()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(made,)) for made in rounds]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for made, want in zip(rounds, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(made.outs, want.outs, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_captured_round_replays_with_what_the_weights_hold_then(plans):
    made = make_round([(torch.randn(s), 0) for s in [(40, 27), (60, 260), (1, 300)]])
    grads = [torch.randn_like(w) for w in made.weights]
    results = [nan_like(w) for w in made.weights]
    rows = range(len(grads))

    def step(round_: Round) -> None:
        round_.normalize(1)
        launch.normalize_backward(
            grads, round_.weights, round_.round_state, round_.stats, results, rows, *shape
        )

    shape = (made.offsets, made.dims)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(made)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(made)
    launch.plan_for.cache_clear()  # the graph's tables are its own
    for _ in range(3):
        for w in made.weights:
            w.normal_()
        expected = made.copy()
        graph.replay()
        got = [t.clone() for t in (*made.outs, *made.us, *made.vs, *results)]
        step(expected)
        want = (*expected.outs, *expected.us, *expected.vs, *results)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.cuda.synchronize()
    assert not any(slot.counters.any() for plan in plans for slot in plan.slots.all())


def test_through_the_functional_core_with_gradients():
    weights = [torch.randn(s, device=DEVICE, requires_grad=True) for s in [(40, 27), (16, 8, 3, 3)]]
    made = make_round([(w.detach(), 0) for w in weights])
    outs = functional.stable_rank_normalize(weights, made.us, made.vs, made.ranks, backend="triton")
    grads = [torch.randn_like(o) for o in outs]
    results = torch.autograd.grad(outs, weights, grads)
    for i, (out, result) in enumerate(zip(outs, results, strict=True)):
        w = oracle.matrix_of(weights[i].cpu(), 0)
        layer = oracle.normalized(w, made.us[i].cpu(), made.vs[i].cpu(), made.ranks[i])
        bound = oracle.Bounds(layer, oracle.unit_of(torch.float32)).w_hat(torch.float32)
        oracle.assert_within(oracle.matrix_of(out.cpu(), 0), layer.w_hat, bound, "W_hat")
        gradient_layer(layer, grads[i], result, 0, "functional")


def test_float64_is_refused_by_name():
    with pytest.raises(TypeError, match="float64"):
        w = torch.randn(4, 4, dtype=torch.float64, device=DEVICE)
        u = torch.ones(4, dtype=torch.float64, device=DEVICE)
        functional.stable_rank_normalize([w], [u], [u.clone()], [2.0], backend="triton")


def test_the_schedules_of_the_tests_reach_every_phase(plans):
    made = make_round([(torch.randn(s), 0) for s in [(60, 260), (9, 1100), (40, 27)]])
    made.normalize(2)
    (plan,) = plans
    check(plan.schedule)
    assert any(c.column_tiles for c in plan.schedule.layers)
    assert any(not c.column_tiles for c in plan.schedule.layers)
    assert any(c.first_protected for c in plan.schedule.layers)
    assert {v[-1] for v in plan.variants.slabs} == {True, False}
