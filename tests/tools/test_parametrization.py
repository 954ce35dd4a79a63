"""The parametrization beside torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import srn_kernels as srn


def pair(layer: nn.Module, dim: int = 0) -> tuple[nn.Module, nn.Module]:
    ours, torchs = layer, copy.deepcopy(layer)
    rng = torch.get_rng_state()
    parametrize.register_parametrization(
        ours, "weight", srn.StableRankNorm(ours.weight, 1.0, dim=dim)
    )
    torch.set_rng_state(rng)
    parametrizations.spectral_norm(torchs, dim=dim)
    return ours, torchs


@pytest.mark.parametrize(
    "layer, shape, dim",
    [
        (nn.Linear(9, 7), (4, 9), 0),
        (nn.Conv2d(3, 6, 3), (2, 3, 6, 6), 0),
        (nn.ConvTranspose2d(3, 6, 3), (2, 3, 4, 4), 1),
    ],
    ids=["linear", "conv", "conv transpose"],
)
def test_equals_torch_step_for_step(layer: nn.Module, shape: tuple[int, ...], dim: int) -> None:
    ours, torchs = pair(copy.deepcopy(layer).double(), dim)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    optimisers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (ours, torchs)]
    for step in range(60):
        x = torch.randn(shape, dtype=torch.float64)
        for m, optimiser in zip((ours, torchs), optimisers, strict=True):
            m.train(step % 5 != 4)
            optimiser.zero_grad()
            m(x).square().mean().backward()
            optimiser.step()
    for (key, a), b in zip(ours.state_dict().items(), torchs.state_dict().values(), strict=True):
        # rounding 1e-16, magnified by 60 Adam steps of size 1e-2 over sqrt(v) near 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)


def test_access_semantics() -> None:
    ours, _ = pair(nn.Linear(5, 4))
    norm = ours.parametrizations.weight[0]
    ours.weight  # noqa: B018 - the access itself is the subject
    before = norm._u.clone()
    with torch.no_grad():
        ours.parametrizations.weight.original.copy_(torch.randn(4, 5))
    ours.weight  # noqa: B018
    assert not torch.equal(norm._u, before)
    ours.eval()
    before = norm._u.clone()
    assert torch.equal(ours.weight, ours.weight)
    assert torch.equal(norm._u, before)


def test_stable_rank_and_removal() -> None:
    layer = nn.Linear(12, 8).double()
    parametrize.register_parametrization(layer, "weight", srn.StableRankNorm(layer.weight, 0.25))
    for _ in range(300):
        w_hat = layer.weight
    assert srn.linalg.stable_rank(w_hat).item() == pytest.approx(2.0, rel=1e-6)
    layer.eval()
    expected = layer.weight.clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, expected)


def test_vector_equals_torch() -> None:
    layer = nn.Linear(3, 5)
    twin = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "bias", srn.StableRankNorm(layer.bias))
    parametrizations.spectral_norm(twin, "bias")
    torch.testing.assert_close(layer.bias, twin.bias, rtol=0, atol=0)


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        ({"rank_ratio": 0}, ValueError, "rank_ratio"),
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations"),
        ({"dim": 2}, ValueError, "dim = 2"),
    ],
)
def test_bad_settings(keywords, error, message) -> None:
    with pytest.raises(error, match=message):
        srn.StableRankNorm(torch.randn(3, 4), **keywords)
    with pytest.raises(TypeError, match="real floating-point"):
        srn.StableRankNorm(torch.ones(3, 4, dtype=torch.complex64))
