"""The soft bound and the gain: closed forms, finite differences, and life in a model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import Discriminator, check_it_trains, images, is_raw, same_state, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import srn_kernels as srn
from srn_kernels.model.freshness import State


def linear(rows: int = 5, columns: int = 8, scale: float = 1.0, **keywords) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False).double()
    with torch.no_grad():
        layer.weight.mul_(scale / torch.linalg.matrix_norm(layer.weight, 2))
    keywords = {"rank_ratio": 1.0, "init_iterations": 300, **keywords}
    return srn.stable_rank_norm(layer, **keywords).eval()


@pytest.mark.parametrize("scale", [1e-9, 0.3, 0.95, 1.0, 4.0])
@pytest.mark.parametrize("preserve", [1, 2])
def test_values(scale: float, preserve: int) -> None:
    for s in (0.5, 1.0, 1.1):
        layer = linear(scale=scale, sigma_max=s, preserve=preserve)
        w = layer.weight.detach()
        expected = w / max(1.0, scale / s)
        torch.testing.assert_close(
            srn.normalized_weight(layer).detach(), expected, rtol=1e-9, atol=0
        )
        # With a stable rank: Theorem 1 on W itself, then the bound.
        layer = linear(scale=scale, sigma_max=s, preserve=preserve, stable_rank=1.6)
        expected, _, _ = srn.linalg.nearest_with_stable_rank(w, 1.6, preserve)
        expected = expected / max(1.0, scale / s)
        torch.testing.assert_close(
            srn.normalized_weight(layer).detach(), expected, rtol=0, atol=1e-8 * scale
        )


def test_edge_cases() -> None:
    zero = linear(sigma_max=0.5, gain=True)
    with torch.no_grad():
        zero.weight.zero_()
        zero.weight_gain.fill_(3.0)
    assert not srn.normalized_weight(zero).any()
    out = srn.normalized_weight(zero)
    out.backward(torch.ones_like(out))
    assert torch.equal(zero.weight.grad, torch.full_like(zero.weight, 3.0))  # it can leave zero
    with torch.no_grad():
        zero.weight.fill_(math.nan)
    assert srn.normalized_weight(zero).isnan().all()
    vector = nn.BatchNorm1d(4)
    with torch.no_grad():
        vector.weight.copy_(torch.tensor([3.0, 0.0, 4.0, 0.0]))
    srn.stable_rank_norm(vector, rank_ratio=1.0, sigma_max=2.0)
    torch.testing.assert_close(
        srn.normalized_weight(vector).detach(), torch.tensor([1.2, 0.0, 1.6, 0.0])
    )


def differences(function, x: Tensor, g: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[i] = 1e-6
        result.view(-1)[i] = (g * (function(x + shift) - function(x - shift))).sum() / 2e-6
    return result


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("rank", [None, 1.6])
def test_gradients_against_finite_differences(
    through: bool, scale: float, rank: float | None
) -> None:
    s = 0.9
    layer = linear(
        scale=scale, sigma_max=s, grad_through_sigma=through, gain=True, stable_rank=rank
    )
    with torch.no_grad():
        layer.weight_gain.fill_(1.7)
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    fixed = float(u @ layer.weight.detach() @ v)

    def function(w: Tensor) -> Tensor:
        sigma = u @ w @ v
        outer, q = torch.outer(u, v), (w / sigma).square().sum() - 1
        gamma = math.sqrt((rank - 1) / q) if rank and q > rank - 1 else 1.0
        projected = gamma * w + (1 - gamma) * sigma * outer
        return 1.7 * projected / max(1.0, (float(sigma) if through else fixed) / s)

    w = layer.weight.detach().clone()
    out, g = srn.normalized_weight(layer), torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(out.detach(), function(w))
    out.backward(g)
    expected = differences(function, w, g)
    assert (layer.weight.grad - expected).norm() <= 1e-6 * expected.norm()
    by_gain = (g * function(w)).sum() / 1.7
    torch.testing.assert_close(layer.weight_gain.grad, by_gain.reshape(1))
    if rank is None and scale < s:  # below the bound the layer is as if it were not there
        torch.testing.assert_close(layer.weight.grad, 1.7 * g)


def test_the_exact_gradient_and_second_derivatives_compose() -> None:
    layer = linear(scale=2.0, sigma_max=0.9, gain=True, stable_rank=1.6, gradient="exact")
    g = torch.randn(5, 8, dtype=torch.float64)

    def function(w: Tensor) -> Tensor:
        out, _, _ = srn.linalg.nearest_with_stable_rank(w, 1.6, method="svd")
        return out / max(1.0, float(torch.linalg.matrix_norm(w, 2)) / 0.9)

    srn.normalized_weight(layer).backward(g)
    expected = differences(function, layer.weight.detach().clone(), g)
    assert (layer.weight.grad - expected).norm() <= 1e-6 * expected.norm()

    frozen = linear(scale=2.0, sigma_max=0.9, stable_rank=1.6)
    u, v = frozen.weight_u, frozen.weight_v

    def loss(w: Tensor) -> Tensor:
        sigma = u @ w @ v
        outer, q = torch.outer(u, v), (w / sigma).square().sum() - 1
        gamma = (0.6 / q).sqrt()
        projected = gamma * w + (1 - gamma) * sigma * outer
        return (g * (projected * 0.9 / sigma).tanh()).sum()

    x = frozen.weight.detach().clone().requires_grad_()
    pair = []
    for parameter, value in ((x, loss(x)), (frozen.weight, None)):
        if value is None:
            value = (g * srn.normalized_weight(frozen).tanh()).sum()
        (first,) = torch.autograd.grad(value, parameter, create_graph=True)
        pair += [first.detach(), *torch.autograd.grad(first.square().sum(), parameter)]
    torch.testing.assert_close(pair[0], pair[2])
    torch.testing.assert_close(pair[1], pair[3])


# --- in a model ----------------------------------------------------------------------------------


def wrapped(**keywords) -> nn.Module:
    torch.manual_seed(0)
    return srn.apply_stable_rank_norm(
        Discriminator().double(),
        0.5,
        **{"sigma_max": 0.4, "gain": True, "init_iterations": 200, **keywords},
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_parameters_state_dict_and_removal() -> None:
    model, x = (
        wrapped(overrides={"up": {"gain": False, "sigma_max": None}}).eval(),
        images().double(),
    )
    names = {n for n, _ in model.named_parameters()}
    assert {"conv.weight_gain", "head.weight_gain"} <= names
    assert "up.weight_gain" not in names
    with torch.no_grad():
        model.conv.weight_gain.fill_(2.5)
    out = model(x)
    notes = {row.name: row.note for row in srn.report(model)}
    assert notes["conv.weight"] == "sigma_max=0.4; gain 2.5"
    assert notes["up.weight"] == ""
    torch.testing.assert_close(copy.deepcopy(model)(x), out, rtol=0, atol=0)
    other = wrapped(overrides={"up": {"gain": False, "sigma_max": None}}).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), out, rtol=0, atol=0)
    other.load_state_dict(Discriminator().double().state_dict())  # plain: the gain stays
    assert other.conv.weight_gain.item() == 2.5
    plain = srn.export(model)
    assert set(plain.state_dict()) == set(Discriminator().state_dict())
    torch.testing.assert_close(plain(x), out)
    assert srn.report(model, input_shape=(3, 8, 8))[0].operator_norm > 0


def test_rounds_train_the_gain_and_move_state_once() -> None:
    model, x = wrapped().train(), images().double()
    before = state(model)
    model(x)
    assert not same_state(model, before)
    assert is_raw(model)
    check_it_trains(model, steps=10, lr=1e-2)
    assert all(float(m.weight_gain.detach()) != 1 for m in (model.conv, model.up, model.head))
    # Nothing re-converges after an optimiser step.
    assert all(e.state() is State.FRESH for e in model.conv._srn.values())

    frozen = wrapped().train()
    for layer in (frozen.conv, frozen.up, frozen.head):
        layer.weight.requires_grad_(False)
    with srn.shared_round(frozen):
        with torch.no_grad():
            first = frozen(x)
        loss = frozen(x).sum()  # wants gradients of the gains alone
        loss.backward()
        torch.testing.assert_close(first.sum(), loss.detach())
        assert frozen.conv.weight_gain.grad is not None
        with torch.no_grad():
            frozen.conv.weight_gain.mul_(0.1)
            assert not torch.equal(frozen(x), first)  # made anew after a step


def test_several_backwards_reach_one_round() -> None:
    model, x = wrapped(), images().double()
    with srn.shared_round(model):
        real, fake = model(x), model(2 * x)
    total = gradients(model, (real + fake).sum())  # one backward for both, to compare with
    model = wrapped()
    with srn.shared_round(model):
        real, fake = model(x), model(2 * x)
    real.sum().backward()
    with torch.no_grad():
        model.conv.weight_gain.fill_(9.0)  # after the forward: no matter to this round
    fake.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[name])
    loss = model(x).sum()
    with torch.no_grad():
        model.conv.weight_gain.fill_(1.0)
    with pytest.raises(RuntimeError, match="gain was changed in place"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, x = wrapped(), images().double().requires_grad_()
    expected = gradients(model, model(x).sum())
    model = wrapped()
    model.forward = lambda x: model.head(checkpoint(model.features, x, use_reentrant=reentrant))
    found = gradients(model, model(x).sum())
    assert found.keys() == expected.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)


def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    model, other, x = wrapped(), wrapped(), images().double()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected = gradients(model, model(x).sum())
        found = gradients(other, compiled(x).sum())
        assert found.keys() == expected.keys()
        for name, g in found.items():
            torch.testing.assert_close(g, expected[name], rtol=1e-10, atol=1e-12)


def test_tied_weights_share_the_gain() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    model = srn.apply_stable_rank_norm(nn.Sequential(a, b), 1.0, gain=True)
    assert a.weight_gain is b.weight_gain
    assert len([n for n, _ in model.named_parameters() if n.endswith("gain")]) == 1
    srn.remove_stable_rank_norm(model)
    assert not hasattr(a, "weight_gain")
    assert not hasattr(b, "weight_gain")


def test_half_precision_rounds_twice_at_most() -> None:
    layer = linear(scale=3.0, sigma_max=0.9)
    expected = srn.normalized_weight(layer).detach()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    found = srn.normalized_weight(half).detach()
    assert found.dtype == torch.bfloat16
    # Three roundings: of the weight, of W_hat, of the product; and sigma from the rounded weight.
    assert (found.double() - expected).abs().max() <= 6 * 2**-9 * expected.abs().max()


def test_history_returns_the_numbers_of_the_last_round() -> None:
    model, x = srn.apply_stable_rank_norm(Discriminator().double(), 0.3), images().double()
    history = srn.History(model)
    rows = {r.name: r for r in srn.report(model)}
    for name, numbers in history().items():  # before any round: looked at
        assert numbers["sigma"] == pytest.approx(rows[name].sigma)
    model(x)
    numbers = history()
    assert len(history.rows) == 2
    assert history.rows[-1] is numbers
    before = state(model)
    for row in srn.report(model):  # u and v are still those of the round
        found = numbers[row.name]
        assert found["sigma"] == pytest.approx(row.sigma, rel=1e-9)
        assert found["stable_rank"] == pytest.approx(row.stable_rank, rel=1e-9)
        assert found["normalized_stable_rank"] == pytest.approx(
            row.normalized_stable_rank, rel=1e-9
        )
        assert found["gamma"] == pytest.approx(row.gamma, rel=1e-9)
        assert found["active"] == row.active
        assert all(type(n) is float for n in found.values())
    assert same_state(model, before)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).sum().backward()  # leaves no record: the eager round's numbers are no longer true
    later, rows = history(), {r.name: r for r in srn.report(model)}
    assert later["conv.weight"]["sigma"] != numbers["conv.weight"]["sigma"]
    assert later["conv.weight"]["sigma"] == pytest.approx(rows["conv.weight"].sigma, rel=1e-9)
    with pytest.raises(ValueError, match="no normalised layer"):
        srn.History(nn.Linear(2, 2))


def test_wrong_values_are_named_and_change_nothing() -> None:
    layer = nn.Linear(3, 4)
    for keywords, error, match in (
        ({"sigma_max": 0.0}, ValueError, "sigma_max must be positive"),
        ({"sigma_max": math.inf}, ValueError, "sigma_max must be positive"),
        ({"sigma_max": math.nan}, ValueError, "sigma_max must be positive"),
        ({"sigma_max": "1"}, TypeError, "sigma_max must be a number"),
        ({"grad_through_sigma": 1}, TypeError, "grad_through_sigma must be a bool"),
        ({"gain": 2.0}, TypeError, "gain must be a bool"),
    ):
        with pytest.raises(error, match=match):
            srn.stable_rank_norm(layer, **keywords)
    layer.weight_gain = 3
    with pytest.raises(ValueError, match="has an attribute 'weight_gain' already"):
        srn.stable_rank_norm(layer, gain=True)
    assert not srn.is_normalized(layer)
    assert set(layer.state_dict()) == {"weight", "bias"}
