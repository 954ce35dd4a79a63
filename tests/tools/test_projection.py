"""Projected gradient: weights normalised in place after each optimiser step."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Discriminator, images, matrix
from torch import Tensor, nn

import srn_kernels as srn
from srn_kernels import reference
from srn_kernels.core.arguments import effective_rank


def setup(optimizer=torch.optim.SGD, **keywords):
    torch.manual_seed(0)
    model = Discriminator().double()
    optimizer = optimizer(model.parameters(), lr=0.05)
    keywords = {"rank_ratio": 0.4, "init_iterations": 100, **keywords}
    return model, optimizer, srn.project_after_step(optimizer, model, **keywords)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_weights_are_w_hat_after_every_step() -> None:
    model, optimizer, projection = setup(n_power_iterations=300)
    w = matrix(model.conv, model.conv.weight.detach())
    u = projection.state_dict()["conv.weight"]["u"]  # converged at once
    assert float((u @ w).norm()) == pytest.approx(float(torch.linalg.matrix_norm(w, 2)), rel=1e-3)
    assert projection.names == ["conv.weight", "up.weight", "head.weight"]
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(before) == {f"{n}.{p}" for n in ("conv", "up", "head") for p in ("weight", "bias")}
    x = images().double()
    for _ in range(3):
        parameters = [copy.deepcopy(p) for p in model.parameters()]
        step(model, optimizer, x)
        for layer, old in zip((model.conv, model.up, model.head), parameters[::2], strict=True):
            w = matrix(layer, layer.weight.detach())
            s = torch.linalg.svdvals(w)
            r = max(1.0, 0.4 * min(w.shape))
            assert float(s[0]) == pytest.approx(1, abs=1e-6)
            assert float(s.square().sum()) <= r * (1 + 1e-6)
            # What it was before the hook: the plain step, projected by the oracle.
            stepped = matrix(layer, old.detach() - 0.05 * layer.weight.grad)
            stepped = stepped / torch.linalg.matrix_norm(stepped, 2)
            expected, _, _ = srn.linalg.nearest_with_stable_rank(stepped, r, method="svd")
            torch.testing.assert_close(w, expected, rtol=0, atol=1e-5)
        assert model.conv.weight.is_leaf
        assert model.conv.weight.requires_grad


def test_it_equals_the_functional_core_step_for_step() -> None:
    model, _, projection = setup()
    weights = [model.conv.weight, model.up.weight, model.head.weight]
    before = [w.detach().clone() for w in weights]
    state = projection.state_dict()
    us, vs = ([state[n][key] for n in projection.names] for key in "uv")
    projection.project()
    targets = [max(1.0, 0.4 * 12), max(1.0, 0.4 * 6), float("inf")]
    reference.stable_rank_project_(before, us, vs, targets, dims=[0, 1, 0])
    for w, expected in zip(weights, before, strict=True):
        torch.testing.assert_close(w.detach(), expected)
    torch.testing.assert_close(projection.state_dict()["up.weight"]["u"], us[1])
    assert effective_rank(0.4, 1, 1536) == float("inf")


def test_training_keeps_the_constraint_with_one_iteration_a_step() -> None:
    for kind in (torch.optim.SGD, torch.optim.Adam):
        model, optimizer, _ = setup(kind)
        x = images(4).double()
        losses = [step(model, optimizer, x) for _ in range(30)]
        assert losses[-1] < losses[1]
        for layer in (model.conv, model.up, model.head):
            w = matrix(layer, layer.weight.detach())
            assert float(torch.linalg.matrix_norm(w, 2)) == pytest.approx(1, abs=0.05)


def test_selection_removal_and_frozen_parameters() -> None:
    model = Discriminator().double()
    optimizer = torch.optim.SGD([*model.conv.parameters(), *model.head.parameters()], lr=0.1)
    projection = srn.project_after_step(optimizer, model, exclude="head")
    assert projection.names == ["conv.weight"]
    assert ("head", "in exclude") in projection.skipped
    assert ("up.weight", "not a parameter of the optimizer") in projection.skipped
    x = images().double()
    step(model, optimizer, x)
    assert float(torch.linalg.matrix_norm(model.conv.weight.flatten(1).detach(), 2)) <= 1.2
    projection.remove()
    before = model.conv.weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model.conv.weight, before)


def test_settings_of_single_layers() -> None:
    model, optimizer, _ = setup(overrides={"head": {"eps": 10.0}, "up": {"n_power_iterations": 9}})
    expected, other, _ = setup(exclude=["head"])
    x = images().double()
    step(model, optimizer, x)
    step(expected, other, x)
    assert torch.equal(model.head.weight, expected.head.weight)  # |sigma| <= eps passes it
    assert torch.equal(model.conv.weight, expected.conv.weight)
    assert not torch.equal(model.up.weight, expected.up.weight)


def test_state_dict_vectors_dtypes_and_moves() -> None:
    model, optimizer, projection = setup(overrides={"head": {"rank_ratio": 1.0, "eps": 1e-6}})
    x = images().double()
    step(model, optimizer, x)
    saved, weights = projection.state_dict(), copy.deepcopy(model.state_dict())
    step(model, optimizer, x)
    expected = copy.deepcopy(model.state_dict())
    other, second, again = setup(overrides={"head": {"rank_ratio": 1.0, "eps": 1e-6}})
    other.load_state_dict(weights)
    again.load_state_dict(saved)
    step(other, second, x)
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
    for broken in ({}, {**saved, "conv.weight": {"u": torch.ones(2), "v": torch.ones(3)}}):
        with pytest.raises(ValueError, match="state"):
            again.load_state_dict(broken)
    model.float()  # u and v follow the weights
    projection.project()
    assert projection.state_dict()["conv.weight"]["u"].dtype == torch.float32

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    vector = Vector()
    optimizer = torch.optim.SGD(vector.parameters(), lr=0.0)
    srn.project_after_step(optimizer, vector, layer_types=[Vector])
    vector.weight.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(vector.weight.detach(), torch.tensor([0.6, 0.8]))


def test_wrong_arguments_are_named_and_leave_no_hook() -> None:
    model = Discriminator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    wrapped = srn.apply_stable_rank_norm(Discriminator(), include="conv")
    for call, error, match in (
        (lambda: srn.project_after_step(None, model), TypeError, "optimizer must be"),
        (lambda: srn.project_after_step(optimizer, None), TypeError, "model must be"),
        (lambda: srn.project_after_step(optimizer, model, 1.5), ValueError, "rank_ratio"),
        (lambda: srn.project_after_step(optimizer, model, include="x"), ValueError, "no layer"),
        (lambda: srn.project_after_step(other, model), ValueError, "holds none"),
        (
            lambda: srn.project_after_step(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped),
            ValueError,
            "normalised by srn_kernels already",
        ),
        (
            lambda: srn.project_after_step(optimizer, model, overrides={"conv": {"preserve": 2}}),
            ValueError,
            "no meaning for a projection",
        ),
    ):
        with pytest.raises(error, match=match):
            call()
    assert not optimizer._optimizer_step_post_hooks
