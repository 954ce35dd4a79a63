"""What a round finds changed under it is said, and whatever happens, the Parameter is back."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from models import Discriminator, images, is_raw, same_state, state, wrapped
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import srn_kernels as srn
from srn_kernels.model import begin, shadow

# --- another hand on the Parameter ----------------------------------------------------------------


def prune_it(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def delete_it(layer: nn.Module) -> None:
    del layer.weight


def drop_it(layer: nn.Module) -> None:
    layer.weight = None


def double(layer: nn.Module) -> nn.Module:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    return parametrize.register_parametrization(layer, "weight", Double())


HIDDEN = {
    "pruned": (prune_it, "another hook keeps it as weight_orig .*prune"),
    "parametrized": (double, "the parametrization Double was put over it"),
    "torch's parametrization": (
        parametrizations.spectral_norm,
        "the parametrization _SpectralNorm was put over it",
    ),
    "deleted": (delete_it, "it was deleted or moved; set it again"),
    "None": (drop_it, "it is None; set it again"),
}


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("trained", [True, False])
def test_a_hidden_parameter_is_named_by_every_look(case: str, trained: bool) -> None:
    model = wrapped()
    if trained:
        model(images()).sum().backward()
    hide, message = HIDDEN[case]
    hide(model.up)
    looks = [
        lambda: model(images()),
        lambda: model.eval()(images()),
        lambda: model.up(torch.randn(1, 12, 4, 4)),
        lambda: srn.report(model),
        lambda: srn.normalized_weight(model.up),
        lambda: srn.export(model),
        lambda: srn.refresh(model),
        lambda: copy.deepcopy(model),
    ]
    for look in looks:
        with pytest.raises(RuntimeError, match=rf"'up\.weight' cannot be normalised.*{message}"):
            look()
    assert "weight" not in model.conv.__dict__ and "weight" not in model.head.__dict__


def test_pruning_before_wrapping_works() -> None:
    model = Discriminator()
    for layer in model.children():
        prune.l1_unstructured(layer, "weight", 0.5)
        prune.remove(layer, "weight")
    srn.apply_stable_rank_norm(model, 0.3)
    model(images()).sum().backward()


def test_a_weight_set_during_a_forward_raises_after_it() -> None:
    model = wrapped()

    def replace(layer: nn.Module, args: object) -> None:
        layer.weight = nn.Parameter(torch.ones_like(layer._parameters["weight"]))

    handle = model.up.register_forward_pre_hook(replace)
    with pytest.raises(RuntimeError, match=r"'up\.weight' was set during a forward"):
        model(images())
    assert is_raw(model)
    handle.remove()
    model(images())


def test_data_of_another_dtype_or_shape_names_the_layer() -> None:
    model = wrapped()
    model(images())
    weight = model.conv.weight.data
    for other in (weight.double(), weight[:7], weight[:, :2]):
        model.conv.weight.data = other
        with pytest.raises(RuntimeError, match=r"'conv\.weight': its weight is now"):
            model(images())
        model.conv.weight.data = weight
    model(images())


@pytest.mark.parametrize("trained", [True, False])
def test_data_of_another_memory_order_works(trained: bool) -> None:
    model, twin = wrapped(), wrapped()
    twin.load_state_dict(model.state_dict())
    if trained:
        for m in (model, twin):
            m(x := torch.ones(1, 3, 8, 8)).sum().backward()
    strided = torch.empty(24, 3, 3, 3)[::2].copy_(model.conv.weight.detach())
    model.conv.weight.data = strided  # not dense
    for _ in range(3):
        torch.testing.assert_close(model(x := images()), twin(x), rtol=1e-5, atol=1e-6)
        assert srn.normalized_weight(model.conv).shape == (12, 3, 3, 3)


# --- our own hooks --------------------------------------------------------------------------------


def take_off(*modules: nn.Module) -> None:
    for module in modules:
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()


def test_hooks_taken_off_a_root_or_a_layer_are_missed() -> None:
    model = wrapped()
    take_off(model)
    with pytest.raises(RuntimeError, match=r"hooks that normalise model Discriminator .*fuse"):
        model(images())
    take_off(model.conv)
    with pytest.raises(RuntimeError, match=r"hooks that normalise layer 'conv\.weight' .*fuse"):
        model.conv(images())
    srn.fuse(model)
    x = images()
    assert torch.equal(model.eval()(x), srn.export(model)(x))
    model.conv(x)


def test_forward_called_directly_is_normalised() -> None:
    model, x = wrapped(), images()
    model(x).sum().backward()
    model.eval()
    assert torch.equal(model.forward(x), model(x))
    assert torch.equal(model.conv.forward(x), model.conv(x))
    assert is_raw(model)
    twin = copy.deepcopy(model.train())
    model.train()(x), twin.forward(x)
    assert same_state(model, state(twin))
    assert inspect.signature(model.forward) == inspect.signature(Discriminator().forward)


def test_a_forward_replaced_after_wrapping_is_normalised() -> None:
    model, x = wrapped().eval(), images()
    expected = model(x)
    original = model.conv.forward
    model.conv.forward = lambda y: 2 * original(y) / 2
    model.forward = lambda y: model.head(model.features(y))
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert is_raw(model)


def test_a_shallow_copy_of_a_root_runs_as_itself() -> None:
    class Scaled(Discriminator):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * super().forward(x)

    model, x = srn.apply_stable_rank_norm(Scaled(), 0.3).eval(), images()
    twin = copy.copy(model)
    twin.scale = 3.0
    torch.testing.assert_close(twin(x), 3 * model(x))


# --- exceptions -----------------------------------------------------------------------------------


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Stop, GeneratorExit])
@pytest.mark.parametrize("where", ["conv", "up", "head", "root"])
@pytest.mark.parametrize("how", ["root", "forward", "shared", "layer", "nested"])
def test_every_look_after_an_exception_finds_the_parameter(
    error: type[BaseException], where: str, how: str
) -> None:
    model, x = wrapped(), images()
    outer = srn.apply_stable_rank_norm(nn.Sequential(model, nn.Linear(1, 2)), 1.0)
    armed = [True]

    def fail(*_: object) -> None:
        if armed[0]:
            raise error("stop")

    target = model if where == "root" else getattr(model, where)
    target.register_forward_pre_hook(fail)

    def call() -> None:
        if how == "layer":
            model.head(model.features(x)) if where != "root" else model(x)
        elif how == "shared":
            with srn.shared_round(model):
                model(x)
        elif how == "nested":
            outer(x)
        else:
            (model if how == "root" else model.forward)(x)

    if how == "forward" and where == "root":
        armed[0] = False  # no hook runs around it
        call()
        armed[0] = True
    else:
        with pytest.raises(error) as caught:
            call()
        assert caught.value  # its traceback keeps every frame alive
    assert is_raw(model) and is_raw(outer)
    assert not begin._leases.stack
    nn.init.orthogonal_(model.conv.weight)
    copy.deepcopy(model)
    torch.save(model.state_dict(), io.BytesIO())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    armed[0] = False
    model(x).sum().backward()
    srn.export(model)(x)
    assert is_raw(model)


def test_a_copy_inside_a_shared_round_is_refused_by_name() -> None:
    model = wrapped()
    with (
        srn.shared_round(model),
        pytest.raises(RuntimeError, match=r"copied or pickled inside.*'conv\.weight'"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_an_interrupt_while_w_hat_is_shown_stays_an_interrupt(monkeypatch) -> None:
    model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0.5)
    put = shadow.put

    def interrupted(entries, outs) -> None:
        put(entries[:1], outs[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shadow, "put", interrupted)
        model(torch.ones(2, 4))
    assert is_raw(model)
    model(torch.ones(2, 4)).sum().backward()
    assert is_raw(model)
