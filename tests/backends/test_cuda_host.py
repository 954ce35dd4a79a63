"""The host side of a CUDA launch: plans, their memory, streams and graphs; which GPUs it takes."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterator

import pytest
import torch
from gpu_rounds import Round, device_of

from srn_kernels.backends import cuda as backend
from srn_kernels.backends.cuda import planning

make_round = functools.partial(Round.make, backend=backend)
NEEDS_SHIM = pytest.mark.skipif(
    backend.extension is None or device_of(backend) != "cpu", reason="needs --cuda-shim"
)


@pytest.fixture
def extension() -> Iterator:
    module = backend.extension
    module.clear_plans()
    yield module
    module.set_stream(0)
    module.set_capturing(False)
    module.fail_uploads(False)
    module.destroy_graphs()
    module.clear_plans()


def small_round(rows: int = 8) -> Round:
    return make_round([(torch.randn(rows, 12), 0)])


@NEEDS_SHIM
@pytest.mark.parametrize("n", [62, 63, 90, 170])
def test_float64_layers_beyond_one_parameter_block(n):
    made = make_round([(torch.randn(3, 4 + i % 5, dtype=torch.float64), 0) for i in range(n)])
    one_by_one = made.copy()
    made.normalize(1)
    grads = [torch.randn_like(w) for w in made.weights]
    together = made.gradients(grads, range(n))
    for i in range(n):
        part = one_by_one._replace(
            **{
                name: getattr(one_by_one, name)[i : i + 1]
                for name in ("weights", "dims", "us", "vs", "ranks", "outs", "stats", "offsets")
            }
        )
        part.normalize(1)
        assert torch.equal(part.outs[0], made.outs[i])
        assert torch.equal(part.gradients([grads[i]], [0])[0], together[i])


@NEEDS_SHIM
def test_plans_give_back_their_memory(extension):
    before = extension.allocations()
    small_round().normalize(1)
    extension.set_stream(7)
    small_round().normalize(1)
    # The tables, and the counters of two streams.
    assert (extension.plan_count(), extension.allocations()) == (1, before + 3)
    extension.clear_plans()
    assert extension.allocations() == before


@NEEDS_SHIM
def test_a_full_device_leaves_nothing_behind(extension):
    before = extension.allocations()
    extension.fail_uploads(True)
    made = small_round()
    with pytest.raises(RuntimeError, match="out of memory"):
        made.normalize(1)
    assert (extension.plan_count(), extension.allocations()) == (0, before)
    extension.fail_uploads(False)
    made.normalize(1)
    # Tables that are there, but no room for counters: the plan stays, and serves later.
    extension.set_stream(1)
    extension.fail_uploads(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.normalize(1)
    extension.fail_uploads(False)
    made.normalize(1)
    assert made.outs[0].isfinite().all()


@NEEDS_SHIM
def test_a_graph_keeps_its_plan_and_counters_until_it_is_gone(extension):
    before = extension.allocations()
    made = small_round()
    extension.set_capturing(True)
    made.normalize(1)
    made.normalize(1)
    extension.set_capturing(False)
    assert extension.allocations() == before + 3  # each launch has counters of its own
    extension.clear_plans()
    assert (extension.plan_count(), extension.allocations()) == (0, before + 3)
    extension.destroy_graphs()
    assert extension.allocations() == before


@NEEDS_SHIM
@pytest.mark.parametrize("capturing", [False, True])
def test_two_threads_that_make_one_plan_share_the_first(extension, monkeypatch, capturing):
    made, plan, before = small_round(), planning.plan, extension.allocations()
    other = made.copy()
    extension.set_capturing(capturing)

    def slow(*args):
        monkeypatch.setattr(planning, "plan", plan)
        thread = threading.Thread(target=other.normalize, args=(1,))
        thread.start()  # the planner is Python: others run
        thread.join()
        return plan(*args)

    monkeypatch.setattr(planning, "plan", slow)
    made.normalize(1)
    assert torch.equal(made.outs[0], other.outs[0])
    # One set of tables; counters of one stream, or of two launches in graphs.
    assert (extension.plan_count(), extension.allocations()) == (1, before + 2 + capturing)


@NEEDS_SHIM
def test_the_plan_that_was_used_longest_ago_makes_room(extension, monkeypatch):
    made = [small_round(rows) for rows in range(2, 260)]
    for each in made[:256]:
        each.normalize(1)
    made[0].normalize(1)  # in use
    asked, plan = [], planning.plan
    monkeypatch.setattr(planning, "plan", lambda *a: asked.append(a) or plan(*a))
    for each in (made[256], made[0], made[257], made[0], made[5]):
        each.normalize(1)
    assert (len(asked), extension.plan_count()) == (2, 256)
    made[1].normalize(1)  # had to go
    assert len(asked) == 3


@NEEDS_SHIM
def test_tensors_that_are_elsewhere_are_named():
    made = small_round()
    with pytest.raises(ValueError, match="got round_state on meta, expected cpu as the first"):
        made._replace(round_state=made.round_state.to("meta")).normalize(1)
    away = made._replace(weights=[made.weights[0].to("meta")])
    with pytest.raises(ValueError, match=r"expected meta|serves weights on a GPU"):
        away.normalize(1)


@pytest.mark.parametrize(
    "capabilities, error, reason",
    [
        ([(9, 0)], "", None),
        ([(8, 0), (12, 0)], "", None),
        ([], "", "no GPU is visible"),
        ([(9, 0), (7, 5)], "", "cuda:1 .*sm_75.* older than sm_80; CUDA_VISIBLE_DEVICES"),
        ([(8, 6)], "no kernel image", "no kernels for cuda:0 .*no kernel image.*ARCH_LIST=8.6"),
    ],
)
def test_auto_is_told_of_devices_that_the_kernels_cannot_run_on(
    monkeypatch, capabilities, error, reason
):
    class Extension:
        def unloadable(self) -> str:
            return error

    monkeypatch.setattr(backend, "extension", Extension())
    monkeypatch.setattr(backend, "DEVICES", frozenset({"cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    monkeypatch.setattr(torch.cuda, "device", lambda i: contextlib.nullcontext())
    backend._unserved_device.cache_clear()
    try:
        found = backend.unavailable_reason()
    finally:
        backend._unserved_device.cache_clear()
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found)
