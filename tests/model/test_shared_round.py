"""Who shares a round: several calls, other methods, nested roots, readers of weights, threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from models import Discriminator, images, is_raw, plain_w_hat, same_state, sigma_max, state, wrapped
from torch import nn

import srn_kernels as srn
from srn_kernels.model.weight import NormalizedWeight


def test_several_backwards_reach_one_round() -> None:
    model, x = wrapped(double=True), images().double()
    twin = copy.deepcopy(model)
    with srn.shared_round(model):
        first, second = model(x).sum(), model(-x).square().sum()
    first.backward()
    second.backward()
    with srn.shared_round(twin):
        (twin(x).sum() + twin(-x).square().sum()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)


def test_shared_round_makes_one_iteration_and_one_w_hat() -> None:
    model = wrapped()
    once = copy.deepcopy(model)
    with srn.shared_round(model):
        model(images())
        first = model.conv.weight
        model(images())
        assert model.conv.weight is first
        assert not isinstance(first, nn.Parameter)
    once(images())
    assert same_state(model, state(once))
    assert is_raw(model)


def test_shared_round_serves_methods_other_than_forward() -> None:
    model, x = wrapped().eval(), images()
    expected = model.head(model.features(x))
    with srn.shared_round(model):
        seen = torch.nn.functional.conv2d(x, model.conv.weight, model.conv.bias, padding=1)
        torch.testing.assert_close(
            seen,
            torch.nn.functional.conv2d(
                x, srn.normalized_weight(model.conv), model.conv.bias, padding=1
            ),
        )
        torch.testing.assert_close(model.head(model.features(x)), expected)


def test_shared_round_without_gradients_is_replaced_when_they_are_wanted() -> None:
    model = wrapped()
    with torch.no_grad(), srn.shared_round(model):
        model(images())
        with torch.enable_grad():
            model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shared_round_follows_an_optimiser_step() -> None:
    model = wrapped()
    optimiser = torch.optim.SGD(model.parameters(), 1.0)
    with srn.shared_round(model):
        model(images()).sum().backward()
        before = model.conv.weight.clone()
        optimiser.step()
        model(images())
        seen = model.conv.weight.clone()
    torch.testing.assert_close(seen, srn.normalized_weight(model.conv))
    assert (seen - before).norm() > 0.1


def test_method_other_than_forward_normalises_layer_by_layer() -> None:
    model, x = wrapped().eval(), images()
    whole = model(x)
    torch.testing.assert_close(model.head(model.features(x)), whole, rtol=0, atol=0)
    assert is_raw(model)


def test_layer_called_without_its_root_iterates_in_training_only() -> None:
    model = wrapped()
    _, u, v = plain_w_hat(model.conv)
    model.conv(images())
    assert torch.equal(model.conv.weight_u, u)
    assert torch.equal(model.conv.weight_v, v)
    with torch.no_grad():
        model.conv(images())
    assert torch.equal(model.conv.weight_u, u)


def test_nested_roots_are_normalised_once_each() -> None:
    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Conv2d(3, 3, 3, padding=1)
            self.d = Discriminator()

        def forward(self, z):
            return self.d(self.g(z))

    gan = Gan()
    srn.apply_stable_rank_norm(gan.d, 0.3)
    srn.apply_stable_rank_norm(gan, 1.0)
    assert [len(m.__dict__["_srn_group"].current()) for m in (gan, gan.d)] == [1, 3]
    assert len(srn.report(gan)) == 4
    expected = {n: plain_w_hat(m)[1] for n, m in gan.d.named_children()}
    gan(images()).sum().backward()
    for name, layer in gan.d.named_children():
        assert torch.equal(layer.weight_u, expected[name])
    before = state(gan)
    gan.d(images())  # alone: its own layers move, the generator's do not
    assert torch.equal(gan.g.weight_u, before["g.weight_u"])
    assert not torch.equal(gan.d.conv.weight_u, before["d.conv.weight_u"])
    assert is_raw(gan)


def test_a_root_that_calls_itself_reuses_its_round() -> None:
    class Twice(Discriminator):
        def forward(self, x, again: bool = True):
            out = super().forward(x)
            return out + self(x, again=False) if again else out

    model = srn.apply_stable_rank_norm(Twice(), 0.3)
    _, u, _ = plain_w_hat(model.conv)
    model(images())
    assert torch.equal(model.conv.weight_u, u)
    assert is_raw(model)


def test_attention_output_projection_is_normalised() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model, x = Block(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.attention.out_proj.weight.mul_(10)
    srn.apply_stable_rank_norm(model, 1.0).eval()
    plain = srn.export(model)
    expected = plain(x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.attention(x, x, x)[0], expected)  # without the root
    model.train()(x).sum().backward()
    assert model.attention.out_proj.weight.grad is not None
    assert sigma_max(model.attention.out_proj) == pytest.approx(1.0, abs=1e-3)


def test_four_threads_evaluate_one_model() -> None:
    model, x = wrapped().eval(), images(4)
    expected = model(x)
    failures: list[str] = []
    gate = threading.Barrier(4)

    def work() -> None:
        gate.wait()
        for i in range(40):
            with torch.set_grad_enabled(i % 2 == 0):
                if not torch.equal(model(x), expected):
                    failures.append(f"call {i}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert is_raw(model)


@pytest.mark.parametrize("rounds_before", [0, 2])
def test_training_from_two_threads_raises(rounds_before: int) -> None:
    model, x = wrapped(), images()
    for _ in range(rounds_before):
        model(x)
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        leave.wait(10)

    model.head.register_forward_pre_hook(wait)
    worker = threading.Thread(target=lambda: model(x))
    worker.start()
    inside.wait(10)
    try:
        for gradients in (True, False):
            with (
                torch.set_grad_enabled(gradients),
                pytest.raises(RuntimeError, match="another thread"),
            ):
                model(x)
    finally:
        leave.set()
        worker.join()
    assert is_raw(model)


def test_data_parallel_is_refused() -> None:
    model = wrapped()
    model._is_replica = True
    with pytest.raises(RuntimeError, match="DataParallel"):
        model(images())


@pytest.mark.parametrize("through_root", [True, False])
def test_a_shared_round_looks_at_each_layer_once_a_call(through_root, monkeypatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    srn.apply_stable_rank_norm(model, 0.7)
    looks = []
    written = NormalizedWeight.written
    monkeypatch.setattr(NormalizedWeight, "written", lambda e: looks.append(e) or written(e))
    x = torch.ones(1, 4)
    with srn.shared_round(model):
        looks.clear()
        if through_root:
            model(x)
        else:
            for layer in model:
                x = layer(x)
        assert len(looks) == 20


def test_a_layer_that_was_written_since_gets_its_new_w_hat_in_a_shared_round() -> None:
    model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0.7)
    with srn.shared_round(model):
        model(torch.ones(1, 4))
        before = [layer.weight for layer in model]
        with torch.no_grad():
            model[1]._parameters["weight"].mul_(-1)
        model[0](torch.ones(1, 4))
        assert model[0].weight is before[0]  # its own has not changed
        model[1](torch.ones(1, 4))
        assert (model[1].weight * before[1]).sum() < 0
    with torch.no_grad(), srn.shared_round(model):
        model(torch.ones(1, 4))
        assert not model[0].weight.requires_grad
        with torch.enable_grad():
            model[0](torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_gradients_that_a_forward_turns_on_within_are_served_in_a_shared_round() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return self.layer(x)

    model = srn.apply_stable_rank_norm(Inner(), 0.7)
    with torch.no_grad(), srn.shared_round(model):
        out = model(torch.ones(1, 4))
        out.backward(torch.ones_like(out))
    assert model.layer.weight.grad is not None
