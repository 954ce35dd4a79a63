"""What checkpoints of other code hold, one parameter at a time: the corners of reading them."""

from __future__ import annotations

import pytest
import torch
from models import sigma_max
from spectra import spectrum
from torch import Tensor, nn

import srn_kernels as srn
from srn_kernels.model.formats import missing_v, next_pair
from srn_kernels.model.freshness import State


def sigma_of(w: Tensor, u: Tensor, v: Tensor) -> float:
    return float(u @ (w @ v))


def unit(n: int) -> Tensor:
    return nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_missing_v_of_an_ill_conditioned_weight_keeps_sigma(
    shape: tuple[int, int], sign: int
) -> None:
    """Condition 1e9: a float32 u says nothing of v, but W / sigma says what v has to give."""
    w = spectrum(torch.logspace(0, -9, 6), *shape)
    v = unit(shape[1])
    u = nn.functional.normalize(w @ v, dim=0).float().double()
    sigma = sign * sigma_of(w, u, v)
    found = missing_v(w, u, w / sigma)
    assert float(found.norm()) == pytest.approx(1, abs=1e-12)
    assert sigma_of(w, u, found) == pytest.approx(sigma, rel=1e-9)
    assert sigma_of(w, u, missing_v(w, u, None)) != pytest.approx(sigma, rel=1e-2)


def test_an_old_legacy_checkpoint_keeps_sigma_where_only_w_over_sigma_tells_it() -> None:
    layer = srn.spectral_norm(nn.Linear(9, 6, bias=False).double())
    w = spectrum(torch.logspace(0, -9, 6), 6, 9)
    v = unit(9)
    u = nn.functional.normalize(w @ v, dim=0).float().double()
    sigma = sigma_of(w, u, v)
    layer.load_state_dict({"weight_orig": w, "weight_u": u, "weight": w / sigma})
    assert sigma_of(layer.weight, layer.weight_u, layer.weight_v) == pytest.approx(sigma, rel=1e-9)
    torch.testing.assert_close(srn.normalized_weight(layer), w / sigma)


@pytest.mark.parametrize("share", [0.9, 1.0, 1.1])
def test_the_missing_v_of_a_rank_one_weight_is_the_only_one(share: float) -> None:
    u, v = unit(4), unit(5)
    found = missing_v(3 * torch.outer(u, v), u, torch.outer(u, v) / share)
    torch.testing.assert_close(found, v)


def test_a_zero_weight_of_an_old_checkpoint_gets_a_v_to_start_from() -> None:
    layer = srn.spectral_norm(nn.Linear(5, 4))
    nothing = torch.zeros(4, 5)
    checkpoint = {"weight_orig": nothing, "weight": nothing, "weight_u": torch.ones(4) / 2}
    layer.load_state_dict({**checkpoint, "bias": torch.zeros(4)})
    assert layer.weight_v.norm() == pytest.approx(1)


def test_the_next_pair_after_several_steps() -> None:
    w, u = torch.randn(4, 7, dtype=torch.float64), unit(4)
    expected = u
    for _ in range(3):
        v = nn.functional.normalize(w.T @ expected, dim=0)
        expected = nn.functional.normalize(w @ v, dim=0)
    torch.testing.assert_close(next_pair(w, 0, u, 3), (expected, v))


@pytest.mark.parametrize(
    "keys",
    [
        {"weight_orig": (4, 5)},
        {"weight_bar": (4, 5), "weight_u": (3,), "weight_v": (5,)},
        {"weight": (4, 5), "u0": (1, 3), "sv0": (1,)},
    ],
)
def test_a_u_that_is_missing_or_of_another_layer_converges_anew(keys: dict) -> None:
    layer = srn.spectral_norm(nn.Linear(5, 4, bias=False), init_iterations=1000)
    layer.load_state_dict({key: torch.randn(shape) for key, shape in keys.items()})
    assert sigma_max(layer) == pytest.approx(1, abs=1e-5)


def test_a_legacy_u_of_another_layer_is_torchs_own_error() -> None:
    layer = srn.spectral_norm(nn.Linear(5, 4, bias=False))
    with pytest.raises(RuntimeError, match="size mismatch for weight_u"):
        layer.load_state_dict({"weight_orig": torch.randn(4, 5), "weight_u": torch.randn(3)})


@pytest.mark.parametrize("given", [(), ("weight_u",)])
def test_a_plain_checkpoint_converges_after_training_too(given: tuple[str, ...]) -> None:
    layer = srn.spectral_norm(nn.Linear(5, 4, bias=False), init_iterations=1000)
    layer(torch.ones(1, 5))
    other = nn.functional.normalize(torch.randn(4), dim=0)
    layer.load_state_dict({"weight": torch.randn(4, 5), **dict.fromkeys(given, other)})
    assert sigma_max(layer) == pytest.approx(1, abs=1e-5)


def test_a_plain_checkpoint_gives_a_new_layer_the_bits_of_wrapping_it() -> None:
    wrapped, loaded = nn.Linear(5, 4), srn.spectral_norm(nn.Linear(5, 4))
    checkpoint = {k: t.clone() for k, t in wrapped.state_dict().items()}
    srn.spectral_norm(wrapped)
    loaded.load_state_dict(checkpoint)
    assert torch.equal(loaded.weight_u, wrapped.weight_u)
    assert torch.equal(loaded.weight_v, wrapped.weight_v)


def test_a_single_pair_starts_a_block_if_it_fits() -> None:
    for rows, bits in ((4, True), (3, False)):
        layer = srn.spectral_norm(nn.Linear(5, 4, bias=False), preserve=2, init_iterations=0)
        u, v = unit(rows).float(), unit(5).float()
        layer.load_state_dict({"weight": torch.randn(4, 5), "weight_u": u, "weight_v": v})
        assert (layer.weight_u.shape, layer.weight_v.shape) == ((4, 2), (5, 2))
        assert torch.equal(layer.weight_v[:, 0], v)
        assert (rows == 4 and torch.equal(layer.weight_u[:, 0], u)) is bits


@pytest.mark.parametrize("suffix", ["_orig", "_bar"])
def test_a_vector_converges_anew(suffix: str) -> None:
    layer = srn.spectral_norm(nn.Linear(5, 4), "bias")
    given = {"bias" + suffix: torch.randn(4), "bias_u": torch.ones(1), "weight": torch.ones(4, 5)}
    layer.load_state_dict(given)
    norm = srn.normalized_weight(layer, "bias").detach().norm()
    assert norm == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("keys", [("weight_orig", "weight_u"), ("weight", "u0")])
def test_a_checkpoint_on_the_meta_device_says_nothing_yet(keys: tuple[str, str]) -> None:
    layer = srn.spectral_norm(nn.Linear(5, 4, bias=False), init_iterations=1000)
    sizes = ((4, 5), (4,))
    given = {key: torch.empty(n, device="meta") for key, n in zip(keys, sizes, strict=True)}
    layer.load_state_dict(given, assign=True)
    assert layer.weight.is_meta
    layer.load_state_dict({"weight": torch.randn(4, 5)}, assign=True)
    assert layer.__dict__["_srn"]["weight"].state() is State.FRESH
    assert sigma_max(layer) == pytest.approx(1, abs=1e-5)


def test_a_model_made_on_the_meta_device_takes_the_numbers_of_a_plain_checkpoint() -> None:
    with torch.device("meta"):
        layer = srn.spectral_norm(nn.Linear(5, 4), init_iterations=1000)
    layer.load_state_dict(nn.Linear(5, 4).state_dict(), assign=True)
    assert sigma_max(layer) == pytest.approx(1, abs=1e-5)
    layer(torch.ones(1, 5)).sum().backward()


def test_a_buffer_of_the_users_own_is_loaded() -> None:
    layer = nn.Linear(5, 4, bias=False)
    layer.register_buffer("weight_sigma", torch.ones(1))
    srn.spectral_norm(layer)
    given = {"weight_orig": torch.randn(4, 5), "weight_sigma": torch.full((1,), 3.0)}
    layer.load_state_dict(given)
    assert layer.weight_sigma == 3


def test_a_layer_of_several_weights_loads_once() -> None:
    layer = srn.apply_stable_rank_norm(nn.LSTM(3, 4), layer_types=[nn.LSTM])
    assert len(layer._load_state_dict_post_hooks) == 1
    assert len(layer._load_state_dict_pre_hooks) == 1
