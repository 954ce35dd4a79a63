"""Activation checkpointing: the gradients of a run without it, and one power iteration a round."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from models import Discriminator, images, is_raw, same_state, state, wrapped
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import srn_kernels as srn


class Checkpointed(nn.Module):
    """A discriminator of which some parts are recomputed in backward."""

    def __init__(self, parts: str, reentrant: bool | None) -> None:
        super().__init__()
        self.body = Discriminator()
        self.parts, self.reentrant = parts, reentrant

    def part(self, module: Callable, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return module(x)
        return checkpoint(module, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        if self.parts == "nested":
            return body.head(self.part(lambda y: self.inner(y), x))
        y = torch.relu(self.part(body.conv, x) if self.parts == "layers" else body.conv(x))
        y = torch.relu(self.part(body.up, y)).flatten(1)
        return self.part(body.head, y) if self.parts == "layers" else body.head(y)

    def inner(self, x: Tensor) -> Tensor:
        y = torch.relu(self.part(self.body.conv, x))
        return torch.relu(self.part(self.body.up, y)).flatten(1)


def model_of(parts: str, reentrant: bool | None, rank_ratio: float = 0.3) -> nn.Module:
    torch.manual_seed(3)
    return srn.apply_stable_rank_norm(Checkpointed(parts, reentrant).double(), rank_ratio)


def train(model: nn.Module, forward: Callable, steps: int = 3) -> None:
    """Adam: which also shows a state that was converged anew behind our back."""
    torch.manual_seed(5)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        forward(images().double().requires_grad_()).square().sum().backward()
        optimiser.step()


def assert_same_model(model: nn.Module, expected: nn.Module) -> None:
    want = expected.state_dict()
    for name, value in model.state_dict().items():  # u and v as well as the parameters
        torch.testing.assert_close(value, want[name], rtol=1e-11, atol=1e-13, msg=name)
    assert is_raw(model)


# A reentrant checkpoint around a whole round: see test_a_round_inside_a_reentrant_checkpoint.
REENTRANT = [("layers", True), ("one layer", True), ("nested", True), ("shared", True)]
OTHER = [(p, False) for p in ("root", "layers", "one layer", "nested", "shared", "alone")]


@pytest.mark.parametrize(("parts", "reentrant"), REENTRANT + OTHER)
def test_training_equals_the_run_without_checkpoints(parts: str, reentrant: bool) -> None:
    plain = model_of("layers", None)
    if parts == "root":
        model = model_of("layers", None)
        train(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        train(plain, plain)
    elif parts == "shared":  # D(real) and D(fake)
        model = model_of("layers", reentrant)
        for m in (plain, model):

            def both(x: Tensor, m: nn.Module = m) -> Tensor:
                with srn.shared_round(m):
                    return m(x) - m(-x)

            train(m, both)
    elif parts == "alone":  # no root: every layer is a round of its own
        model = model_of("layers", reentrant)
        for m in (plain, model):
            train(m, m.inner)
    else:
        model = model_of(parts, reentrant)
        train(model, model)
        train(plain, plain)
    assert_same_model(model, plain)


def test_torchs_own_spectral_norms_differ_under_checkpoints() -> None:
    """What the tests above would look like there: another gradient, and u moves twice."""
    for wrap in (legacy_spectral_norm, parametrizations.spectral_norm):
        plain = Checkpointed("layers", None).double()
        for layer in plain.body.children():
            wrap(layer)
        model = copy.deepcopy(plain)
        model.reentrant = True
        x = images().double().requires_grad_()
        for m in (plain, model):
            m(x).square().sum().backward()
        worst = max(
            ((p.grad - q.grad).norm() / q.grad.norm()).item()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        )
        assert worst > 1e-4
        assert not same_state(model, state(plain))


def train_late(model: nn.Module, forward: Callable, steps: int = 3) -> None:
    """:func:`train` with u and v one power iteration behind, which they catch up in backward."""
    torch.manual_seed(5)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        model.eval()
        loss = forward(images().double().requires_grad_()).square().sum()
        srn.refresh(model.train(), 1)
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("case", ["root", "twice", "groups=2", "groups=3", "alone"])
def test_a_round_inside_a_reentrant_checkpoint(case: str) -> None:
    """Its forward has no gradients and moves nothing; its repetition has the same W_hat, and then
    makes the power iteration."""
    plain, model = model_of("layers", None), model_of("layers", None)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=True)

    if case.startswith("groups"):
        srn.fuse(model, groups=int(case[-1]))
    if case == "twice":  # both forwards see one W_hat
        train(model, lambda x: checkpointed(x) - 2 * checkpointed(-x).square())
        train_late(plain, lambda x: plain(x) - 2 * plain(-x).square())
    elif case == "alone":  # no root: every layer is a round of its own
        model = model_of("layers", True)
        for m in (plain, model):
            m.body.head.requires_grad_(False)
        train(model, model.inner)
        train_late(plain, plain.inner)
    else:
        train(model, checkpointed)
        train_late(plain, plain)
    assert_same_model(model, plain)


def test_several_reentrant_forwards_raise_or_share() -> None:
    model, x = model_of("layers", True), images().double().requires_grad_()
    loss = model(x).sum() + model(-x).sum()
    with pytest.raises(RuntimeError, match=r"several of its forwards wait for one.*shared_round"):
        loss.backward()
    assert is_raw(model)


def test_a_weight_written_between_a_forward_and_its_repetition_raises() -> None:
    for reentrant in (True, False):
        model, x = model_of("layers", reentrant), images().double().requires_grad_()
        loss = model(x).square().sum()
        with torch.no_grad():
            model.body.up.weight.mul_(1.5)
        with pytest.raises(RuntimeError, match=r"'body\.up\.weight' was changed in place"):
            loss.backward()


def test_several_non_reentrant_forwards_raise_or_share() -> None:
    model = model_of("layers", False)
    start, x = copy.deepcopy(model.state_dict()), images().double()
    loss = model(x).sum() + model(-x).sum()
    with pytest.raises(RuntimeError, match=r"'body\.(conv|up|head)\.weight' is computed again"):
        loss.backward()
    assert is_raw(model)
    model.zero_grad()
    model.load_state_dict(start)
    with srn.shared_round(model):
        loss = model(x).sum() + model(-x).sum()
    loss.backward()
    plain = model_of("layers", None)
    with srn.shared_round(plain):
        (plain(x).sum() + plain(-x).sum()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)


def test_without_gradients_around_it_a_checkpoint_moves_nothing() -> None:
    model = model_of("layers", True)
    before = state(model)
    x = images().double().requires_grad_()
    with torch.no_grad():
        model(x)
        checkpoint(model, x, use_reentrant=True)
    assert same_state(model, before)
    model.eval()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert same_state(model, before)


def test_checkpoint_sequential() -> None:
    def sequential() -> nn.Sequential:
        torch.manual_seed(1)
        layers = [m for _ in range(4) for m in (nn.Linear(6, 6), nn.Tanh())]
        return srn.apply_stable_rank_norm(nn.Sequential(*layers).double(), 0.5)

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for reentrant in (True, False):
        plain, model = sequential(), sequential()
        with srn.shared_round(plain):
            plain(x).square().sum().backward()
        with srn.shared_round(model):
            checkpoint_sequential(model, 2, x, use_reentrant=reentrant).square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)
        assert same_state(model, state(plain))


def test_a_backward_in_another_thread_may_recompute_a_shared_round() -> None:
    """As the autograd engine's threads for GPUs do."""
    plain, model = model_of("layers", None), model_of("layers", False)
    x, failures = images().double(), []
    with srn.shared_round(plain):
        plain(x).square().sum().backward()

    def backward() -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            failures.append(error)

    with srn.shared_round(model):
        loss = model(x).square().sum()
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert not failures
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)
    assert is_raw(model)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_an_evaluation_between_forward_and_backward_does_not_matter(reentrant: bool) -> None:
    plain, model = model_of("layers", None), model_of("layers", reentrant)
    x = images().double().requires_grad_()
    for m in (plain, model):
        loss = m(x).square().sum()
        with torch.no_grad():
            m.eval()(x)
            m.train()
        loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)


def test_an_evaluation_does_not_hide_that_two_forwards_wait() -> None:
    model = model_of("layers", False)
    x = images().double().requires_grad_()
    losses = []
    for _ in range(2):
        losses.append(model(x).square().sum())
        with torch.no_grad():
            model.eval()(x)
            model.train()
    with pytest.raises(RuntimeError, match=r"several of its forwards wait"):
        losses[0].backward()


def test_an_evaluation_does_not_wait_for_a_backward() -> None:
    """head still holds the evaluation's round when conv and up are computed again."""
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    with torch.no_grad():
        model.eval()(images())
    features = checkpoint(model.train().features, images(), use_reentrant=False)
    features.sum().backward()
    assert model.conv.weight.grad is not None


@pytest.mark.parametrize("groups", [2, 3])
def test_a_round_in_groups_is_recomputed(groups: int) -> None:
    plain = model_of("layers", None)
    model = srn.fuse(model_of("layers", None), groups=groups)
    train(model, lambda x: checkpoint(model, x, use_reentrant=False))
    train(plain, plain)
    assert_same_model(model, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    class Checkpointed(Discriminator):
        def forward(self, x):
            y = checkpoint(self.conv, x, use_reentrant=reentrant)
            y = checkpoint(self.up, torch.relu(y), use_reentrant=reentrant)
            return self.head(torch.relu(y).flatten(1))

    plain = wrapped(double=True)
    model = srn.apply_stable_rank_norm(Checkpointed().double(), 0.3)
    model.load_state_dict(plain.state_dict())
    x = images().double().requires_grad_()
    for m in (plain, model):
        m(x).square().sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-13)
    assert same_state(model, state(plain))
    assert is_raw(model)


def test_ambiguous_recomputation_raises() -> None:
    class Checkpointed(Discriminator):
        def forward(self, x):
            y = checkpoint(self.conv, x, use_reentrant=False)
            return self.head(torch.relu(self.up(torch.relu(y))).flatten(1))

    model = srn.apply_stable_rank_norm(Checkpointed(), 0.3)
    loss = model(images()).sum() + model(images()).sum()
    with pytest.raises(RuntimeError, match="shared_round"):
        loss.backward()
    with srn.shared_round(model):
        loss = model(images()).sum() + model(images()).sum()
    loss.backward()
