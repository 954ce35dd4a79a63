"""Autocast, half-precision models and loss scaling: u, v and sigma stay float32."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Discriminator, images, matrix, same_state, sigma_max, state, wrapped_layers
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import srn_kernels as srn

HALVES = [torch.bfloat16, torch.float16]


class Casts(TorchDispatchMode):
    """Counts copies that change the dtype of a tensor of a given size."""

    def __init__(self, sizes: set[torch.Size]) -> None:
        super().__init__()
        self.sizes, self.count = sizes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape in self.sizes:
            self.count += 1
        return func(*args, **(kwargs or {}))


def top(layer: nn.Module, w_hat: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix(layer, w_hat.detach()).double(), 2).item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rank_ratio", [1.0, 0.3], ids=["SN", "SRN"])
def test_autocast_writes_w_hat_in_the_compute_dtype_without_another_cast(
    dtype: torch.dtype, rank_ratio: float
) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), rank_ratio, init_iterations=300)
    seen: dict[nn.Module, torch.Tensor] = {}
    for layer in wrapped_layers(model):
        layer.register_forward_pre_hook(lambda m, _: seen.__setitem__(m, m.weight))
    with torch.autocast("cpu", dtype):
        with Casts({layer.weight.shape for layer in wrapped_layers(model)}) as casts:
            out = model(images())
        assert out.dtype == dtype
    assert casts.count == 0
    for layer, w_hat in seen.items():
        assert w_hat.dtype == dtype
        assert abs(top(layer, w_hat) - 1) < 1e-2
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(v.dtype == torch.float32 for v in state(model).values())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rank_ratio", [1.0, 0.3], ids=["SN", "SRN"])
def test_a_half_precision_model_trains_with_float32_state(
    dtype: torch.dtype, rank_ratio: float
) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), rank_ratio, init_iterations=300).to(dtype)
    optimiser = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(20):
        optimiser.zero_grad()
        model(images().to(dtype)).square().mean().backward()
        optimiser.step()
    for layer in wrapped_layers(model):
        assert layer.weight.dtype == layer.weight.grad.dtype == dtype
        w_hat = srn.normalized_weight(layer)
        assert w_hat.dtype == dtype
        assert abs(top(layer, w_hat) - 1) < 1e-2
        for x in (layer.weight_u, layer.weight_v):
            assert x.dtype == torch.float32
            assert x.norm().item() == pytest.approx(1.0, abs=1e-5)
    for row in srn.report(model):
        weight = matrix(*((m := model.get_submodule(row.name[:-7])), m.weight.detach()))
        assert row.sigma == pytest.approx(
            torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-3
        )


def test_torchs_own_state_becomes_half_and_drifts() -> None:
    """The same run with torch's: u is bfloat16, its norm off by more than ours can be."""
    for wrap in (legacy_spectral_norm, parametrizations.spectral_norm):
        layer = wrap(nn.Conv2d(16, 64, 3)).to(torch.bfloat16)
        with torch.no_grad():
            for _ in range(20):
                layer(torch.randn(1, 16, 4, 4, dtype=torch.bfloat16))
        u = layer.weight_u if hasattr(layer, "weight_u") else layer.parametrizations.weight[0]._u
        assert u.dtype == torch.bfloat16
        assert abs(u.double().norm().item() - 1) > 1e-5


def test_casting_there_and_back_keeps_every_bit_of_the_state() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    before = state(model)
    for cast in (
        lambda: model.half(),
        lambda: model.bfloat16(),
        lambda: model.float(),
        lambda: model.to(torch.bfloat16),
        lambda: model.type(torch.float16),
        lambda: model._apply(lambda t: t.half()),
        lambda: nn.Sequential(model).half(),
    ):
        cast()
        assert same_state(model, before)
    model.double().float()
    assert same_state(model, before)


class Overflows(nn.Module):
    """Multiplies its input by a factor that the test sets."""

    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_grad_scaler_skips_a_step_with_an_inf_and_the_state_is_not_poisoned() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    tail = Overflows()
    optimiser = torch.optim.SGD(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    scales = []
    for step in range(4):
        tail.factor = 1e30 if step == 1 else 1.0  # backward overflows float16
        before = copy.deepcopy(model.state_dict())
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = tail(model(images()).float()).mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        scales.append(scaler.get_scale())
        moved = not torch.equal(before["conv.weight"], model.conv.weight)
        assert moved == (step != 1)
        assert all(v.isfinite().all() for v in model.state_dict().values())
        if step == 1:  # the weights are the same: u, v are not converged anew, only moved once
            expected = copy.deepcopy(model)
            _, u, _ = one_iteration(expected.conv)
            model(images())
            torch.testing.assert_close(model.conv.weight_u, u, rtol=1e-6, atol=1e-7)
    assert scales == [4.0, 2.0, 2.0, 2.0]


def one_iteration(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    (out,) = srn.functional.stable_rank_normalize([layer.weight], [u], [v], [3.6])
    return out, u, v


def test_a_weight_with_an_inf_shows_and_recovers() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    before = state(model)
    with torch.no_grad():
        old = model.conv.weight[0, 0, 0, 0].item()
        model.conv.weight[0, 0, 0, 0] = float("inf")
    assert not model(images()).isfinite().all()
    assert torch.equal(model.conv.weight_u, before["conv.weight_u"])
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = old
    assert model(images()).isfinite().all()
    assert sigma_max(model.conv) == pytest.approx(1.0, abs=1e-2)
