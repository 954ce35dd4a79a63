"""Models as people have them (peers.py): one call converts each, and their old checkpoints load."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from models import is_raw, sigma_max, state
from peers import (
    MODELS,
    ClassConditional,
    InitialisedAfterwards,
    Scales,
    Wrapper,
    pictures,
    trained,
)
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn


@pytest.mark.parametrize("name", MODELS)
def test_one_call_converts_and_evaluation_is_unchanged(name: str) -> None:
    make, count = MODELS[name]
    model, x = trained(make), pictures(99)
    twin = copy_of(model, make)
    expected = twin.eval()(x)
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    assert srn.convert_spectral_norm(model.eval()) is model
    # one rounding of sigma and one of the division a layer, through at most eight layers
    torch.testing.assert_close(model(x), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(model(x), expected, rtol=2e-5, atol=2e-5)  # and stays
    assert len(srn.report(model)) == count
    assert {id(p) for p in model.parameters() if p.requires_grad} == kept  # the optimiser's
    for module in model.modules():
        if srn.is_normalized(module):
            assert type(module).__module__.startswith("torch.nn.modules")
    assert is_raw(model)


def copy_of(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """The same model in its own code: a deepcopy fails with torch's legacy hook."""
    twin = make()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("name", MODELS)
def test_old_checkpoints_load_into_the_converted_model(name: str) -> None:
    make, _ = MODELS[name]
    model, x = trained(make), pictures(99)
    checkpoint = {k: v.clone() for k, v in model.state_dict().items()}
    expected = copy_of(model, make).eval()(x)
    torch.manual_seed(123)
    other = srn.convert_spectral_norm(make()).eval()
    other.load_state_dict(checkpoint)
    torch.testing.assert_close(other(x), expected, rtol=2e-5, atol=2e-5)
    fresh = srn.convert_spectral_norm(make()).eval()
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(fresh(x), other(x))


@pytest.mark.parametrize("name", MODELS)
def test_converted_models_train_take_off_and_take_a_stable_rank(name: str) -> None:
    make, _ = MODELS[name]
    model = srn.convert_spectral_norm(trained(make), 0.5)
    before = state(model)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for step in range(8):
        optimiser.zero_grad()
        loss = (model(pictures(step % 2)) - 0.1).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(v, before[k]) for k, v in state(model).items() if v.numel() > 1)
    for row in srn.report(model):
        assert row.normalized_stable_rank <= row.target * (1 + 1e-4)
    model.eval()
    x = pictures(7)
    expected = model(x)
    srn.remove_stable_rank_norm(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert not state(model)


def test_weight_norm_beside_it_stays() -> None:
    model = srn.convert_spectral_norm(Scales())
    assert [srn.is_normalized(d.conv_post) for d in model.discriminators] == [True, False, False]
    assert "weight_g" in model.discriminators[1].conv_post._parameters


def test_biggan_trains_step_for_step_as_in_its_own_code() -> None:
    """v first in their code, u first here: the same pairs, half an iteration apart in the state."""
    theirs, ours = ClassConditional(), ClassConditional()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)  # orthogonal weights have no top singular vector
    ours.load_state_dict(theirs.state_dict())
    for m in (theirs, ours):
        with torch.no_grad():
            for _ in range(200):  # converged: the order no longer matters
                m(pictures())
    srn.convert_spectral_norm(ours)
    optimisers = [torch.optim.SGD(m.parameters(), 1e-4) for m in (theirs, ours)]
    for step in range(3):
        for m, optimiser in zip((theirs, ours), optimisers, strict=True):
            optimiser.zero_grad()
            m(pictures(step)).mean().backward()
            optimiser.step()
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=key)


def test_initialisation_through_data_after_wrapping() -> None:
    """torch's legacy hook keeps it too; its parametrization loses it silently."""
    torch.manual_seed(5)
    model = InitialisedAfterwards(srn.spectral_norm).eval()
    torch.manual_seed(5)
    lost = InitialisedAfterwards(parametrizations.spectral_norm).eval()
    bound = math.sqrt(2) * math.sqrt(6 / (3 * 9 + 8 * 9))  # of xavier_uniform_ for c1
    assert bound * 0.98 < model.c1.weight.abs().max() <= bound
    assert lost.c1.parametrizations.weight.original.abs().max() < bound * 0.8
    model(pictures())
    for layer in (model.c1, model.c2, model.l3):
        assert 1 - 1e-6 < sigma_max(layer) < 1.1


def test_a_wrapper_alone_and_a_wrong_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is itself a wrapper.*model\.module"):
        srn.convert_spectral_norm(alone := Wrapper(nn.Linear(3, 4)))
    assert "weight_bar" in alone.module._parameters
    with pytest.raises(ValueError, match="uses neither form"):
        srn.convert_spectral_norm(nn.Linear(3, 4))
    mixed = nn.Sequential(
        Wrapper(nn.Linear(4, 4)), legacy_spectral_norm(nn.Linear(4, 4, dtype=torch.complex64))
    )
    with pytest.raises(TypeError, match=r"1\.weight must be a real floating-point"):
        srn.convert_spectral_norm(mixed)
    assert type(mixed[0]) is Wrapper
    assert "weight_orig" in mixed[1]._parameters
