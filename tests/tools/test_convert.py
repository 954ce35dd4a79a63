"""Taking over torch's spectral norm in both forms, and the public stable_rank hook."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Discriminator, images, is_raw, matrix, wrapped_layers
from peer_hooks import add_stable_rank_hook
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn


def with_torch_sn(form: str) -> Discriminator:
    model = Discriminator()
    wrap = {"legacy": legacy_spectral_norm, "parametrization": parametrizations.spectral_norm}
    for i, layer in enumerate(model.children()):
        if form == "mixed":
            list(wrap.values())[i % 2](layer)
        else:
            wrap[form](layer)
    for _ in range(5):
        model(images())
    return model


@pytest.mark.parametrize("form", ["legacy", "parametrization", "mixed"])
def test_evaluation_is_unchanged_and_state_is_exact(form: str) -> None:
    model, x = with_torch_sn(form), images()
    expected = model.eval()(x)
    raw, pairs = [], []
    for layer in model.children():
        old = hasattr(layer, "weight_orig")
        norm = None if old else layer.parametrizations.weight[0]
        raw.append(layer.weight_orig if old else layer.parametrizations.weight.original)
        pairs.append((layer.weight_u, layer.weight_v) if old else (norm._u, norm._v))
        pairs[-1] = tuple(t.clone() for t in pairs[-1])
    assert srn.convert_spectral_norm(model) is model
    for layer, weight, (u, v) in zip(model.children(), raw, pairs, strict=True):
        assert layer.weight is weight
        assert isinstance(layer.weight, nn.Parameter)
        assert torch.equal(layer.weight_u, u)
        assert torch.equal(layer.weight_v, v)
    # Each side's sigma sums sqrt(rows) + sqrt(columns), about 9, aligned terms and the division
    # rounds once: 2 (9 + 1) units of 6e-8 a layer, three layers.
    torch.testing.assert_close(model(x), expected, rtol=4e-6, atol=4e-6)
    plain_keys = set(Discriminator().state_dict())
    extra = {f"{n}.weight{s}" for n, _ in model.named_children() for s in ("_u", "_v")}
    assert set(model.state_dict()) == plain_keys | extra
    assert [type(m) for m in model.children()] == [type(m) for m in Discriminator().children()]
    assert is_raw(model)
    assert len(model.__dict__["_srn_group"].current()) == 3


def test_training_goes_on_as_it_would_have() -> None:
    theirs = with_torch_sn("parametrization").double()
    ours = srn.convert_spectral_norm(copy.deepcopy(theirs))
    optimisers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (theirs, ours)]
    for _ in range(5):
        x = images().double()
        for m, optimiser in zip((theirs, ours), optimisers, strict=True):
            optimiser.zero_grad()
            m(x).square().mean().backward()
            optimiser.step()
    for p, q in zip(
        [m.parametrizations.weight.original for m in theirs.children()],
        [m.weight for m in ours.children()],
        strict=True,
    ):
        torch.testing.assert_close(q, p, rtol=1e-11, atol=1e-13)


def test_a_deepcopy_converts_without_breaking_the_original() -> None:
    """torch's own removal deletes the property from a class that the copies share."""
    model, x = with_torch_sn("parametrization").eval(), images()
    parametrizations.weight_norm(model.conv, "bias", dim=0)
    expected = model(x)
    twin = srn.convert_spectral_norm(copy.deepcopy(model))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(twin(x), expected, rtol=2e-6, atol=2e-6)
    assert "original0" in dict(twin.conv.parametrizations.bias.named_parameters())


def test_the_optimiser_keeps_its_parameters() -> None:
    model = with_torch_sn("legacy")
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    srn.convert_spectral_norm(model)
    assert {id(p) for p in model.parameters()} == {
        id(p) for g in optimiser.param_groups for p in g["params"]
    }


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_stable_rank_hook_keeps_its_ratio(ratio: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 8))
    for i in (0, 2):
        add_stable_rank_hook(model[i], ratio)
    x = images()
    for _ in range(5):
        model(x)
    expected = model.eval()(x)
    srn.convert_spectral_norm(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert [row.target == 4.0 for row in srn.report(model)] == [ratio == 0.5] * 2
    hooked = add_stable_rank_hook(nn.Linear(9, 8), 0.5)
    srn.convert_spectral_norm(hooked, 0.25)
    assert srn.report(hooked)[0].target == 2.0


def test_tied_layers_become_one() -> None:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    b.weight = a.weight
    model = nn.Sequential(legacy_spectral_norm(a), legacy_spectral_norm(b))
    srn.convert_spectral_norm(model)
    assert model[0].weight is model[1].weight
    assert len(srn.report(model)) == 1
    model(torch.randn(2, 5)).sum().backward()


def test_wrapped_layers_join_and_others_stay() -> None:
    model = Discriminator()
    srn.stable_rank_norm(model.conv, rank_ratio=0.5)
    legacy_spectral_norm(model.up)
    srn.convert_spectral_norm(model)
    assert {m for m in model.children() if srn.is_normalized(m)} == {model.conv, model.up}
    before = model.conv.weight_u.clone()
    model(images()).sum().backward()
    assert not torch.equal(before, model.conv.weight_u)
    assert len(wrapped_layers(model)) == 2


def test_half_precision_state_becomes_float32() -> None:
    model = legacy_spectral_norm(nn.Linear(6, 5)).to(torch.bfloat16)
    srn.convert_spectral_norm(model)
    assert model.weight_u.dtype == torch.float32
    model.eval()(torch.randn(2, 6, dtype=torch.bfloat16))
    w_hat = matrix(model, srn.normalized_weight(model).detach()).double()
    assert torch.linalg.matrix_norm(w_hat, 2).item() < 3.0


@pytest.mark.parametrize("form", ["legacy", "parametrization"])
def test_a_soft_bound_and_a_gain_come_with_the_conversion(form: str) -> None:
    """sigma_max far above every sigma gives the raw weight; the gain multiplies it."""
    model = with_torch_sn(form)
    srn.convert_spectral_norm(model, sigma_max=1e6, gain=True)
    model.eval()
    for layer in wrapped_layers(model):
        assert layer.weight_gain.shape == (1,)
        with torch.no_grad():
            layer.weight_gain.fill_(3.0)
        # two roundings in float32
        torch.testing.assert_close(
            srn.normalized_weight(layer), 3 * layer.weight, rtol=2.4e-7, atol=0
        )


def test_an_attribute_in_the_place_of_the_gain_is_refused() -> None:
    model = with_torch_sn("legacy")
    before = copy.deepcopy(model.state_dict())
    model.up.weight_gain = 1.0
    with pytest.raises(ValueError, match=r"up\.weight: .* 'weight_gain'"):
        srn.convert_spectral_norm(model, gain=True)
    assert list(model.state_dict()) == list(before)


def test_a_chain_of_parametrizations_is_refused() -> None:
    model = Discriminator()
    parametrizations.spectral_norm(model.conv)
    parametrizations.weight_norm(model.conv)
    with pytest.raises(ValueError, match="other parametrizations"):
        srn.convert_spectral_norm(model)
    assert not srn.is_normalized(model.conv)
