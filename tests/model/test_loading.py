"""state_dict in and out in the formats that people have."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Discriminator, images, sigma_max, state, wrapped_layers
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn


def ours(rank_ratio: float = 1.0) -> Discriminator:
    torch.manual_seed(7)
    model = Discriminator()
    return srn.apply_stable_rank_norm(model, rank_ratio).eval()


def trained(wrap, legacy: bool) -> Discriminator:
    model = Discriminator()
    for layer in model.children():
        wrap(layer)
    for _ in range(4):
        model(images())
    return model.eval()


FORMATS = {
    "legacy": lambda: trained(legacy_spectral_norm, True),
    "parametrization": lambda: trained(parametrizations.spectral_norm, False),
}


def raw_weight(layer: nn.Module) -> torch.Tensor:
    old = hasattr(layer, "weight_orig")
    return layer.weight_orig if old else layer.parametrizations.weight.original


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("form", FORMATS)
def test_torch_checkpoints_load_strictly_and_evaluate_the_same(form: str, assign: bool) -> None:
    source, model, x = FORMATS[form](), ours(), images()
    checkpoint = source.state_dict()
    keys = list(checkpoint)
    model.load_state_dict(checkpoint, assign=assign)
    assert list(checkpoint) == keys  # the caller's dictionary is his own
    for layer, theirs in zip(model.children(), source.children(), strict=True):
        assert torch.equal(layer.weight, raw_weight(theirs))
    before = state(model)
    # as in test_convert.py: 20 units a layer, three layers
    torch.testing.assert_close(model(x), source(x), rtol=4e-6, atol=4e-6)
    assert all(torch.equal(before[k], v) for k, v in state(model).items())  # kept exactly


@pytest.mark.parametrize("steps", [1, 4])
def test_legacy_checkpoints_before_version_one_keep_their_sigma(steps: int) -> None:
    """They hold W / sigma in place of v, which is W^+ u / |W^+ u|: nothing is lost."""
    torch.manual_seed(steps)
    source = Discriminator()
    for layer in source.children():
        legacy_spectral_norm(layer)
    for _ in range(steps):
        source(images())
    source.eval()
    model, x = ours(), images()
    expected = source(x)
    checkpoint = source.state_dict()
    for name, layer in source.named_children():
        del checkpoint[f"{name}.weight_v"]
        checkpoint[f"{name}.weight"] = layer.weight.detach()
    model.load_state_dict(checkpoint)
    for layer, theirs in zip(model.children(), source.children(), strict=True):
        assert torch.equal(layer.weight_u, theirs.weight_u)
        # float32 u: its error grows by the condition number, about 10 here
        torch.testing.assert_close(layer.weight_v, theirs.weight_v, rtol=0, atol=2e-5)
    torch.testing.assert_close(model(x), expected, rtol=5e-6, atol=5e-6)
    for name in ("conv", "up", "head"):  # and without W / sigma, v is still the one
        del checkpoint[f"{name}.weight"]
    fresh = ours()
    fresh.load_state_dict(checkpoint)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-4, atol=1e-4)


def test_own_format_round_trips_bit_for_bit() -> None:
    source = ours(0.3).train()
    for _ in range(3):
        source(images()).sum().backward()
    model, x = ours(0.3).train(), images()
    model.load_state_dict(copy.deepcopy(source.state_dict()))
    for mode in (False, True, True, False):
        assert torch.equal(model.train(mode)(x), source.train(mode)(x))


def test_plain_checkpoint_converges_at_once() -> None:
    plain = Discriminator()
    for p in plain.parameters():
        nn.init.normal_(p, std=3.0)
    model = ours()
    model.load_state_dict(plain.state_dict())
    for layer in wrapped_layers(model):
        m = layer.weight.detach()
        m = (m.movedim(1, 0) if isinstance(layer, nn.ConvTranspose2d) else m).flatten(1)
        sigma = (layer.weight_u @ m @ layer.weight_v).item()
        top = torch.linalg.matrix_norm(m.double(), 2).item()
        assert 0.9 * top < sigma <= top * (1 + 1e-5)
    before = state(model)
    model(images())
    assert all(torch.equal(before[k], v) for k, v in state(model).items())


def test_partial_checkpoint_converges_what_it_brought() -> None:
    model = ours()
    before = state(model)
    missing = model.load_state_dict(
        {"conv.weight": 5 * torch.eye(12, 27).reshape(12, 3, 3, 3)}, strict=False
    )
    assert "up.weight" in missing.missing_keys
    assert "conv.weight_u" not in missing.missing_keys
    assert not torch.equal(before["conv.weight_u"], model.conv.weight_u)
    assert torch.equal(before["up.weight_u"], model.up.weight_u)
    assert sigma_max(model.conv) == pytest.approx(1.0, abs=1e-5)


def test_strict_errors_are_torchs_own() -> None:
    model = ours()
    checkpoint = model.state_dict()
    checkpoint["nonsense"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nonsense"):
        model.load_state_dict(checkpoint)
    model.load_state_dict(checkpoint, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if "head" not in k})
    bad = model.state_dict()
    bad["conv.weight_u"] = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv\.weight_u"):
        model.load_state_dict(bad)


def test_saving_and_loading_a_file(tmp_path) -> None:
    model, x = ours(0.3), images()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "model.pt")
    twin = ours(0.3)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(whole(x), model(x))


def test_loading_then_evaluating_a_half_checkpoint() -> None:
    source = ours(0.3)
    checkpoint = {k: v.half() for k, v in source.state_dict().items()}
    model = ours(0.3)
    model.load_state_dict(checkpoint)
    assert model.conv.weight_u.dtype == torch.float32
    for layer in wrapped_layers(model):  # float16 rounding of u, v is divided out
        assert sigma_max(layer) == pytest.approx(
            sigma_max(
                source.get_submodule(next(n for n, m in model.named_modules() if m is layer))
            ),
            rel=2e-3,
        )
