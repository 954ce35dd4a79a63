"""to_torch_state_dict: what other code loads strictly, and evaluates the same with."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Discriminator, images, state
from peer_hooks import SoftHook, add_hook, add_stable_rank_hook
from peers import MODELS, OwnLinear, Wrapper, pictures, trained
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn
from srn_kernels.model.formats import u_before

WRAPS = {"legacy": legacy_spectral_norm, "parametrization": parametrizations.spectral_norm}


def stepped(model: nn.Module, x: torch.Tensor, steps: int = 3) -> nn.Module:
    """After optimiser steps, so that u and v fit no weight exactly."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("form", WRAPS)
@pytest.mark.parametrize("steps", [0, 3])
def test_torchs_own_models_load_it_strictly(form: str, steps: int) -> None:
    x = images()
    model = stepped(srn.apply_stable_rank_norm(Discriminator(), 1.0), x, steps).eval()
    before, keys = state(model), list(model.state_dict())
    found = srn.to_torch_state_dict(model, form)
    theirs = Discriminator()
    for layer in theirs.children():
        WRAPS[form](layer)
    assert set(found) == set(theirs.state_dict())
    theirs.load_state_dict(found)
    torch.testing.assert_close(theirs.eval()(x), model(x), rtol=2e-6, atol=2e-6)
    assert list(model.state_dict()) == keys
    if steps:
        assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    again = srn.apply_stable_rank_norm(Discriminator(), 1.0).eval()  # and back
    again.load_state_dict(found)
    torch.testing.assert_close(again(x), model(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_converted_models_go_back_to_the_code_they_came_from(name: str) -> None:
    make, _ = MODELS[name]
    x = pictures(99)
    model = srn.convert_spectral_norm(trained(make))
    for steps in (0, 3):
        ours = stepped(model.train(), pictures(5), steps)
        expected = ours.eval()(x)
        theirs = make()
        theirs.load_state_dict(srn.to_torch_state_dict(ours, "original"))
        # float32 roundings of sigma and a division a layer, through at most eight layers
        torch.testing.assert_close(theirs.eval()(x), expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("transpose", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_layer_class_whose_u_is_of_either_side(transpose: bool, iterations: int) -> None:
    def make() -> nn.Module:
        layer = OwnLinear(7, 5, transpose=transpose)
        layer.num_itrs = iterations
        return nn.Sequential(layer)

    theirs, x = make(), torch.randn(6, 7)
    theirs(x)  # far from converged: every step counts
    checkpoint = copy.deepcopy(theirs.state_dict())
    expected = theirs.eval()(x)
    model = srn.convert_spectral_norm(theirs).eval()
    fresh = srn.convert_spectral_norm(make()).eval()
    fresh.load_state_dict(checkpoint)
    for ours in (model, fresh):
        torch.testing.assert_close(ours(x), expected, rtol=2e-6, atol=2e-6)
    expected = stepped(model.train(), x).eval()(x)
    found = srn.to_torch_state_dict(model, "original")
    back = make().eval()
    back.load_state_dict(found)
    torch.testing.assert_close(back(x), expected, rtol=1e-5, atol=1e-5)
    # what that code only looks at: sigma, and further singular vectors
    w = model[0].weight.detach()
    w = w.T if transpose else w
    torch.testing.assert_close(found["0.sv0"], found["0.sv0"].new_tensor([sigma_of(model)]))
    assert float((found["0.u0"] * found["0.u1"]).sum()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found["0.sv1"], (found["0.u1"] @ w).norm().reshape(1))


def sigma_of(model: nn.Module) -> float:
    return srn.report(model)[0].sigma


def test_what_torchs_hook_logs_and_a_wrapper_keeps_is_written() -> None:
    hooked = srn.convert_spectral_norm(nn.Sequential(add_hook(nn.Linear(8, 6), SoftHook, 0.7)))
    found = srn.to_torch_state_dict(hooked, "original")
    assert float(found["0.weight_sigma"]) == pytest.approx(sigma_of(hooked), rel=1e-6)
    wrapped = srn.convert_spectral_norm(nn.Sequential(Wrapper(nn.Linear(8, 6))))
    found = srn.to_torch_state_dict(wrapped, "original")
    torch.testing.assert_close(found["0.module.weight_v"], wrapped[0].weight_v)


def test_the_stable_rank_hook_and_the_soft_bound_at_their_own_settings() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            add_stable_rank_hook(nn.Linear(8, 8), 0.4), add_hook(nn.Linear(8, 6), SoftHook, 0.7)
        )

    model, x = make(), torch.randn(5, 8)
    for _ in range(3):
        model(x)
    srn.convert_spectral_norm(model)
    stepped(model, x)
    expected = model.eval()(x)
    theirs = make()
    theirs.load_state_dict(srn.to_torch_state_dict(model, "original"))
    torch.testing.assert_close(theirs.eval()(x), expected, rtol=1e-5, atol=1e-5)
    for form in WRAPS:
        with pytest.raises(ValueError, match=r"0\.weight: .*rank_ratio=0\.4.*export"):
            srn.to_torch_state_dict(model, form)
    srn.set_rank_ratio(model[0], 0.5)
    with pytest.raises(ValueError, match=r"0\.weight: rank_ratio is 0\.5, but 0\.4"):
        srn.to_torch_state_dict(model, "original")
    assert theirs[0].__dict__.keys() == make()[0].__dict__.keys()


def test_copies_keep_the_form_and_removal_forgets_it() -> None:
    import pickle

    model = srn.convert_spectral_norm(nn.Sequential(legacy_spectral_norm(nn.Linear(6, 6))))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "0.weight_orig" in srn.to_torch_state_dict(twin, "original")
    srn.remove_stable_rank_norm(model)
    assert model[0].__dict__.keys() == nn.Linear(6, 6).__dict__.keys()
    srn.spectral_norm(model[0])
    with pytest.raises(ValueError, match="was not taken over"):
        srn.to_torch_state_dict(model, "original")


@pytest.mark.parametrize("form", WRAPS)
def test_a_replaced_weight_is_written_with_u_and_v_of_its_own(form: str) -> None:
    layer = srn.spectral_norm(nn.Linear(7, 5), init_iterations=1000)
    layer(torch.ones(1, 7))
    layer.weight = nn.Parameter(torch.randn(5, 7))
    found = srn.to_torch_state_dict(layer, form)
    assert not any(t.requires_grad for t in found.values())
    theirs = WRAPS[form](nn.Linear(7, 5)).eval()
    theirs.load_state_dict(found)
    theirs(torch.ones(1, 7))
    assert torch.linalg.matrix_norm(theirs.weight.detach(), 2) == pytest.approx(1, abs=1e-5)


def test_vectors_and_what_no_form_can_say() -> None:
    layer = srn.spectral_norm(nn.Linear(3, 4), "bias")
    theirs = parametrizations.spectral_norm(nn.Linear(3, 4), "bias")
    theirs.load_state_dict(srn.to_torch_state_dict(layer, "parametrization"))
    torch.testing.assert_close(theirs.bias, srn.normalized_weight(layer, "bias"))
    with pytest.raises(ValueError, match=r"bias: .*no vector"):
        srn.to_torch_state_dict(layer)
    zero = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    nn.init.zeros_(zero[1].weight)
    srn.apply_stable_rank_norm(zero, 1.0)
    with pytest.raises(ValueError, match=r"1\.weight: sigma is 0"):
        srn.to_torch_state_dict(zero)
    gained = srn.spectral_norm(nn.Linear(3, 4), gain=True)
    with pytest.raises(ValueError, match=r"weight: .*no gain"):
        srn.to_torch_state_dict(gained)
    bounded = srn.spectral_norm(nn.Linear(3, 4), sigma_max=2.0)
    for form in WRAPS:
        with pytest.raises(ValueError, match=r"weight: .*no sigma_max=2\.0"):
            srn.to_torch_state_dict(bounded, form)
    with torch.device("meta"):
        unmade = srn.spectral_norm(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"weight: .*meta device"):
        srn.to_torch_state_dict(unmade)
    with (
        srn.shared_round(gained),
        pytest.raises(RuntimeError, match=r"to_torch_state_dict cannot be called inside"),
    ):
        srn.to_torch_state_dict(gained)
    with pytest.raises(ValueError, match="form must be one of"):
        srn.to_torch_state_dict(gained, "torch")
    with pytest.raises(ValueError, match="no normalised layer"):
        srn.to_torch_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_u_before_an_iteration(shape: tuple[int, int], iterations: int) -> None:
    """From it, code that keeps u alone arrives at the sigma asked for: between |W v| and s_min."""
    w = torch.randn(shape, dtype=torch.float64)
    s = torch.linalg.svdvals(w)
    u = torch.randn(shape[0], dtype=torch.float64)
    u = u / u.norm()
    for share in (0.999999, 0.9, 0.3):
        x = u
        for _ in range(iterations):
            x = w @ (w.T @ x)
            x = x / x.norm()
        y = x
        for _ in range(iterations):
            t = w.T @ y
            y = w @ (t / t.norm())
            reached = float(y.norm())
            y = y / y.norm()
        sigma = share * reached + (1 - share) * float(s[-1])
        found = u_before(w, x, sigma, iterations)
        for _ in range(iterations):
            v = w.T @ found
            v = v / v.norm()
            found = w @ v
            norm = found.norm()
            found = found / norm
        assert float(norm) == pytest.approx(sigma, rel=1e-7)
    with pytest.raises(ValueError, match="not positive"):
        u_before(w, u, -1.0, 1)
