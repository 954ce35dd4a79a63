"""How models are trained: penalties, accumulation, clipping, optimisers, averages, copies."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from models import (
    Discriminator,
    images,
    is_raw,
    matrix,
    same_state,
    sigma_max,
    state,
    wrapped_layers,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import srn_kernels as srn
from srn_kernels.backends import cpu


def pair(rank_ratio: float = 1.0) -> tuple[nn.Module, nn.Module]:
    """A float64 model of ours, and torch's own with the same weights and state."""
    ours = Discriminator().double()
    theirs = copy.deepcopy(ours)
    for layer in theirs.children():
        parametrizations.spectral_norm(layer)
    srn.apply_stable_rank_norm(ours, rank_ratio)
    for name, layer in ours.named_children():
        norm = getattr(theirs, name).parametrizations.weight[0]
        layer.weight_u.copy_(norm._u)
        layer.weight_v.copy_(norm._v)
    return ours, theirs


def raw(model: nn.Module) -> list[Tensor]:
    """The parameters in one order, whatever form of spectral norm holds them."""
    found = []
    for layer in model.children():
        plain = srn.is_normalized(layer)
        found.append(layer.weight if plain else layer.parametrizations.weight.original)
        found.append(layer.bias)
    return found


def r1(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return torch.relu(1 - out).mean() + 5 * g.square().sum((1, 2, 3)).mean()


def wgan_gp(model: nn.Module, x: Tensor) -> Tensor:
    mixed = (0.3 * x + 0.7 * x.flip(0)).requires_grad_()
    (g,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
    return model(x).mean() - model(-x).mean() + 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("penalty", [r1, wgan_gp])
def test_gradient_penalties_train_like_torchs_own(penalty) -> None:
    ours, theirs = pair()
    optimisers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (ours, theirs)]
    for _ in range(4):
        x = images(4).double()
        for m, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            penalty(m, x).backward()
            optimiser.step()
    for a, b in zip(raw(ours), raw(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rank_ratio", [1.0, 0.3], ids=["SN", "SRN"])
def test_r1_gradient_against_finite_differences(rank_ratio: float) -> None:
    """In evaluation, where u and v stand still, the derivative of the penalty is complete."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 1)).double()
    srn.apply_stable_rank_norm(model, rank_ratio).eval()
    x, weight = images().double(), model[0].weight
    r1(model, x).backward()
    direction, h, values = torch.randn_like(weight), 1e-5, []
    for step in (h, -h):
        shifted = {"0.weight": weight.detach() + step * direction}
        y = x.clone().requires_grad_()
        out = torch.func.functional_call(model, shifted, (y,))
        (g,) = torch.autograd.grad(out.sum(), y)
        penalty = 5 * g.square().sum((1, 2, 3)).mean()
        values.append((torch.relu(1 - out).mean() + penalty).item())
    expected = (values[0] - values[1]) / (2 * h)
    assert (weight.grad * direction).sum().item() == pytest.approx(expected, rel=1e-6)


def test_accumulated_micro_batches_equal_one_batch_inside_a_shared_round() -> None:
    whole = srn.apply_stable_rank_norm(Discriminator().double(), 0.3)
    parts, x = copy.deepcopy(whole), images(6).double()
    whole(x).square().sum().backward()
    with srn.shared_round(parts):
        for chunk in x.split(2):
            parts(chunk).square().sum().backward()
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)
    assert same_state(parts, state(whole))


def test_accumulation_with_one_round_each_equals_torchs_own() -> None:
    ours, theirs = pair()
    x = images(6).double()
    for m in (ours, theirs):
        for chunk in x.split(2):
            m(chunk).square().sum().backward()
    for a, b in zip(raw(ours), raw(theirs), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


OPTIMISERS = {
    "fused Adam": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
    "foreach Adam": lambda p: torch.optim.Adam(p, 1e-3, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1, fused=True),
    "foreach SGD": lambda p: torch.optim.SGD(
        p, 1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True
    ),
    "fused SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_clipping_and_weight_decay_equal_torchs_own(name: str) -> None:
    """None of their steps is taken for a new weight, and weight decay acts on the raw weight."""
    ours, theirs = pair()
    optimisers = [OPTIMISERS[name](raw(m)) for m in (ours, theirs)]
    for step in range(6):
        x = images().double()
        for m, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad(set_to_none=step % 2 == 0)
            m(x).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(m.parameters(), 1e-2)
            assert norm > 1e-2 or step
            nn.utils.clip_grad_value_(m.parameters(), 5e-3)
            optimiser.step()
    for a, b in zip(raw(ours), raw(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    for name, layer in ours.named_children():
        norm = getattr(theirs, name).parametrizations.weight[0]
        torch.testing.assert_close(layer.weight_u, norm._u, rtol=1e-7, atol=1e-9)


def test_lbfgs_closures_train() -> None:
    model, x = srn.apply_stable_rank_norm(Discriminator().double(), 0.3), images().double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=5)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    assert optimiser.step(closure) > closure()


def test_a_frozen_discriminator_passes_gradients_and_keeps_still() -> None:
    """The generator's step: torch's own moves u and v here, ours does not."""
    ours, theirs = pair()
    z = images().double().requires_grad_()
    before, theirs_before = state(ours), theirs.conv.parametrizations.weight[0]._u.clone()
    for m in (ours, theirs):
        m.requires_grad_(False)
        assert torch.autograd.grad(m(z).sum(), z)[0].abs().sum() > 0
    assert same_state(ours, before)
    assert not torch.equal(theirs.conv.parametrizations.weight[0]._u, theirs_before)


# --- averages ------------------------------------------------------------------------------------


def hand_written_average(model: nn.Module):
    average = copy.deepcopy(model)

    def update() -> None:
        with torch.no_grad():
            for a, b in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 0.05)
            for a, b in zip(average.buffers(), model.buffers(), strict=True):
                a.lerp_(b, 0.05)

    return average, average, update


def averaged_model(model: nn.Module):
    wrapper = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    return wrapper, wrapper.module, lambda: wrapper.update_parameters(model)


def stochastic_weights(model: nn.Module):
    wrapper = AveragedModel(model)
    return wrapper, wrapper.module, lambda: wrapper.update_parameters(model)


def state_dict_average(model: nn.Module):
    average = copy.deepcopy(model)

    def update() -> None:
        new = model.state_dict()
        average.load_state_dict({k: v.lerp(new[k], 0.05) for k, v in average.state_dict().items()})

    return average, average, update


def worst(model: nn.Module) -> float:
    return max(sigma_max(layer) for layer in wrapped_layers(model))


@pytest.mark.parametrize(
    "average_of", [averaged_model, hand_written_average, stochastic_weights, state_dict_average]
)
def test_averages_stay_normalised(average_of) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 1.0)
    wrapper, average, update = average_of(model)
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)
    schedule = SWALR(optimiser, swa_lr=2e-2)
    for _ in range(40):
        optimiser.zero_grad()
        model(images()).square().mean().backward()
        optimiser.step()
        schedule.step()
        update()
    wrapper.eval()
    wrapper(images())
    assert worst(average) < 1.05
    update_bn([images()], wrapper)
    torch.testing.assert_close(srn.export(average)(x := images()), average(x))
    assert is_raw(average)


def test_torchs_own_average_inflates_the_weights() -> None:
    """The same average over torch's buffers: u and v shrink, sigma is underestimated."""
    model = Discriminator()
    for layer in model.children():
        parametrizations.spectral_norm(layer)
    wrapper, average, update = averaged_model(model)
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(40):
        optimiser.zero_grad()
        model(images()).square().mean().backward()
        optimiser.step()
        update()
    wrapper.eval()
    norms = [
        torch.linalg.matrix_norm(matrix(layer, layer.weight).double(), 2).item()
        for layer in average.children()
    ]
    assert max(norms) > 1.05


# --- copies --------------------------------------------------------------------------------------


def test_a_target_network_is_a_deepcopy_and_follows() -> None:
    online = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    online(images()).sum().backward()  # after a forward, where torch's legacy hook cannot be copied
    target = copy.deepcopy(online).requires_grad_(False)
    for _ in range(3):
        online(images()).square().mean().backward()
        torch.optim.SGD(online.parameters(), 0.1).step()
        with torch.no_grad():
            for a, b in zip(target.parameters(), online.parameters(), strict=True):
                a.lerp_(b, 0.1)
    target(images())  # a network that is written but never trained converges u, v by itself
    assert worst(target) < 1.01
    target.load_state_dict(online.state_dict())
    online.eval(), target.eval()
    assert torch.equal(target(x := images()), online(x))


def test_torchs_legacy_hook_cannot_be_copied_nor_its_parametrization_pickled() -> None:
    legacy = nn.utils.spectral_norm(nn.Linear(3, 4))
    legacy(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(legacy)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(parametrizations.spectral_norm(nn.Linear(3, 4)))


def test_a_shallow_copy_is_refused() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    layer = copy.copy(model.conv)
    with pytest.raises(RuntimeError, match=r"shallow copy .* 'conv\.weight' .* copy\.deepcopy"):
        layer(images())
    assert is_raw(model)
    model(images())
    copy.copy(model)(images())  # of the root: its layers are the same objects
    assert is_raw(model)


SCRIPT = """
import sys, torch
from srn_kernels.backends import cpu
if sys.argv[5] != "None":  # another instruction set rounds otherwise
    assert cpu._cpu.select_instruction_set(sys.argv[5])
model = torch.load(sys.argv[1], weights_only=False)
x = torch.load(sys.argv[2])
state = torch.load(sys.argv[3])  # weights_only: tensors alone
model.load_state_dict(state)
torch.save((model(x), model.state_dict()), sys.argv[4])
"""


def test_whole_model_and_state_travel_between_processes(tmp_path) -> None:
    files = [str(tmp_path / name) for name in ("model", "x", "state", "out")]
    model, x = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(4, 3)), 0.5), torch.randn(2, 4)
    model(x).sum().backward()
    torch.save(model, files[0])
    torch.save(x, files[1])
    torch.save(model.state_dict(), files[2])
    arguments = [*files, str(cpu.instruction_set())]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True)
    out, after = torch.load(files[3])
    assert torch.equal(out, model(x))
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())


def _evaluate(model: nn.Module, x: Tensor, queue) -> None:
    with torch.no_grad():
        queue.put(model(x).tolist())


def test_a_model_is_an_argument_of_a_forked_process() -> None:
    model, x = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(4, 3)), 0.5).eval(), torch.ones(4)
    model(x)
    model.share_memory()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_evaluate, args=(model, x, queue))
    process.start()
    out = queue.get()
    process.join()
    torch.testing.assert_close(torch.tensor(out), model(x))
