"""torch.compile of normalised models: one graph, the same numbers, no recompilation."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Discriminator, images, is_raw, same_state, state
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import srn_kernels as srn


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("rank_ratio", [1.0, 0.3], ids=["SN", "SRN"])
def test_training_and_evaluation_in_one_graph_each(rank_ratio: float) -> None:
    eager = srn.apply_stable_rank_norm(Discriminator().double(), rank_ratio)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimisers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (eager, model)]
    x = images().double()
    frames = set()
    for _ in range(4):
        for m, optimiser in zip((eager, compiled), optimisers, strict=True):
            optimiser.zero_grad()
            (m(x).square().sum() - m(-x).sum()).backward()  # two forwards, one backward
            optimiser.step()
        assert same_state(model, state(eager))
        frames.add(counter.frame_count)
    # torch.compile runs the outermost module's hooks as a frame of their own
    assert frames == {2}
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert is_raw(model)
    for m in (eager, model):
        m.eval()
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-12, atol=1e-14)
    assert counter.frame_count == 4
    assert same_state(model, state(eager))
    model(x)  # eager again: what the compiled steps changed is not taken for a new weight
    assert same_state(model, state(eager))


def test_inductor_agrees() -> None:
    eager = srn.apply_stable_rank_norm(
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)), 0.5
    )
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, 6)
    for m in (eager, compiled):
        (m(x).square().sum() - m(-x).sum()).backward()
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for key, value in state(model).items():
        torch.testing.assert_close(value, state(eager)[key])


def test_a_layer_on_its_own_compiles() -> None:
    layer = srn.spectral_norm(nn.Linear(6, 5).double())
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6).double()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-12, atol=1e-14)
    assert same_state(layer, state(twin))


def test_autocast_writes_the_compute_dtype() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    seen = []
    model.conv.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    assert out.dtype == seen[0].dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.conv.weight_u.dtype == torch.float32
