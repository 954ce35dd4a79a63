"""What other libraries, and torch's own functions, find when they meet a normalised layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from models import Discriminator, images
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm, weight_norm
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn

# --- swap_tensors: torch's other way to convert a module's parameters -----------------------------


@pytest.fixture(params=[False, True], ids=["set data", "swap tensors"])
def swapping(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


def converted(form: str) -> nn.Module:
    model = Discriminator()
    if form == "apply":
        return srn.apply_stable_rank_norm(model, 0.5)
    for layer in model.children():
        (legacy_spectral_norm if form == "legacy" else parametrizations.spectral_norm)(layer)
    return srn.convert_spectral_norm(model)


@pytest.mark.parametrize("form", ["apply", "legacy", "parametrization"])
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_both_ways_of_converting_parameters(form: str, trained: bool, swapping: bool) -> None:
    model, x = converted(form), images()
    if trained:
        model(x).sum().backward()
        model.zero_grad()
    model.eval()
    expected = model(x)
    checkpoint = copy.deepcopy(model.state_dict())
    for change in (lambda: model.double(), lambda: model.half(), lambda: model.to(torch.float32)):
        change()
        dtype = torch.float64 if model.conv.weight.dtype == torch.float64 else torch.float32
        assert model.conv.weight_u.dtype == dtype
        out = model(x.to(model.conv.weight.dtype)).float()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)  # half
    model.load_state_dict(checkpoint)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    model.train()(x).sum().backward()
    with pytest.raises(ValueError, match="normalised already"):
        srn.spectral_norm(model.conv)


def test_a_tied_parameter_is_known_again_after_a_conversion(swapping: bool) -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    srn.spectral_norm(a)
    nn.ModuleList([a, b]).double()
    if b.weight is a.weight:
        with pytest.raises(ValueError, match="another normalised layer"):
            srn.spectral_norm(b)
    srn.remove_stable_rank_norm(a)
    srn.spectral_norm(b)
    assert srn.is_normalized(b)


# --- print ----------------------------------------------------------------------------------------


def test_a_normalised_layer_says_so() -> None:
    class Told(nn.Linear):
        def extra_repr(self) -> str:
            return "my own text"

    model = nn.Sequential(nn.Linear(3, 4), Told(4, 5), nn.ReLU(), nn.Bilinear(2, 2, 2))
    plain = str(model)
    srn.apply_stable_rank_norm(model, 0.5, overrides={"1": {"rank_ratio": 1.0}})
    lines = str(model).splitlines()
    assert "bias=True, stable_rank_norm(weight, rank_ratio=0.5)" in lines[1]
    assert "my own text, spectral_norm(weight)" in lines[2]
    assert not any("norm" in line for line in lines[3:])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model[:1]))):
        assert str(twin).splitlines()[1] == lines[1]
        assert type(twin[0]) is nn.Linear
        assert twin[0].__dict__["extra_repr"].module is twin[0]
    srn.set_rank_ratio(model, 0.25)
    assert "rank_ratio=0.25" in str(model)
    srn.remove_stable_rank_norm(model)
    assert str(model) == plain


def test_a_text_that_a_user_gave_one_layer_stays() -> None:
    layer = nn.Linear(3, 4)
    layer.extra_repr = own = lambda: "mine"
    srn.spectral_norm(layer)
    assert str(layer) == "Linear(mine, spectral_norm(weight))"
    srn.remove_stable_rank_norm(layer)
    assert layer.__dict__["extra_repr"] is own


# --- torch's own functions ------------------------------------------------------------------------


def test_torchs_remove_spectral_norm_works() -> None:
    layer, x = srn.stable_rank_norm(nn.Linear(6, 5), rank_ratio=0.4), torch.randn(2, 6)
    srn.spectral_norm(layer, "bias")
    layer(x).sum().backward()
    expected, weight = layer.eval()(x), layer.weight
    assert remove_spectral_norm(layer) is layer
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert layer.weight is weight
    assert srn.is_normalized(layer, "bias") and not srn.is_normalized(layer)
    remove_spectral_norm(layer, "bias")
    assert sorted(layer.__dict__) == sorted(nn.Linear(6, 5).__dict__)
    assert not layer._forward_pre_hooks
    with pytest.raises(ValueError, match="not found"):
        remove_spectral_norm(layer)
    model = srn.apply_stable_rank_norm(Discriminator(), 1.0).eval()
    expected = model(images(1))
    for module in model.children():
        remove_spectral_norm(module)
    torch.manual_seed(0)
    assert not any(srn.is_normalized(m) for m in model.modules())
    model.train()(images(1)).sum().backward()


def test_registering_twice_is_a_runtime_error_and_a_value_error() -> None:
    layer = srn.spectral_norm(nn.Linear(3, 3))
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="normalised already"):
            srn.spectral_norm(layer)
    with pytest.raises(RuntimeError, match="two spectral_norm hooks"):
        legacy_spectral_norm(layer)
    assert srn.is_normalized(layer)
    twice = legacy_spectral_norm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"convert_spectral_norm"):
        srn.spectral_norm(twice)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrization_over_ours_is_refused_at_the_next_look(wrap) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.5)
    model(images()).sum().backward()
    wrap(model.conv)
    looks = (
        lambda: model(images()),
        lambda: srn.report(model),
        lambda: srn.remove_stable_rank_norm(model),
        lambda: srn.normalized_weight(model.conv),
        lambda: srn.export(model),
        lambda: srn.refresh(model),
        lambda: srn.to_torch_state_dict(model, "original"),
    )
    for look in looks:
        with pytest.raises(RuntimeError, match=r"'conv\.weight'.*remove_parametrizations"):
            look()
    assert not srn.is_normalized(model.conv)
    parametrize.remove_parametrizations(model.conv, "weight")
    model(images()).sum().backward()
    assert len(srn.report(model)) == 3


@pytest.mark.parametrize("how", ["deleted", "None"])
def test_a_lost_parameter_is_named(how: str) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.5)
    weight = model.conv.weight
    if how == "deleted":
        del model.conv.weight
    else:
        model.conv.weight = None
    for look in (lambda: srn.report(model), lambda: srn.export(model), lambda: model(images())):
        with pytest.raises(RuntimeError, match=r"'conv\.weight'.*set it again"):
            look()
    model.conv.weight = weight
    model(images()).sum().backward()


# --- containers, fx, per-sample gradients, other norms in the same model --------------------------


def test_containers_and_modules_that_are_never_called_are_refused() -> None:
    for container, name in (
        (nn.ParameterList([nn.Parameter(torch.ones(3, 3))]), "0"),
        (nn.ParameterDict({"w": nn.Parameter(torch.ones(3, 3))}), "w"),
    ):
        with pytest.raises(ValueError, match="is never called"):
            srn.spectral_norm(container, name)
        assert not srn.is_normalized(container, name)


class Reading(nn.Module):
    """Uses its child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.child.weight)


def test_fx_records_a_call_of_a_layer_and_is_refused_where_it_would_record_weights() -> None:
    rooted = srn.apply_stable_rank_norm(Reading(), 0.5)
    layer = srn.spectral_norm(nn.Linear(4, 4))
    nested = nn.Sequential(srn.apply_stable_rank_norm(Reading(), 0.5), nn.ReLU())
    for module in (rooted, layer, nested):
        with pytest.raises(RuntimeError, match=r"torch\.fx.*srn_kernels\.export"):
            torch.fx.symbolic_trace(module)
    calling, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 4)
    assert torch.equal(torch.fx.symbolic_trace(calling)(x), calling(x))
    plain = srn.export(rooted)
    torch.testing.assert_close(torch.fx.symbolic_trace(plain)(x), rooted.eval()(x))
    graph = make_fx(rooted)(x)  # which sees operations, and so W_hat
    torch.testing.assert_close(graph(x), rooted(x))


def test_per_sample_gradients_by_hooks_are_refused_and_torch_func_is_right() -> None:
    model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(4, 4)), 1.0)
    x = torch.randn(3, 4)
    for parameter in model.parameters():
        parameter.grad_sample = None  # as opacus marks every parameter that it looks after
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*opacus.*torch\.func"):
        model(x)
    for parameter in model.parameters():
        del parameter.grad_sample
    model.eval()(x)

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    parameters = {k: p.detach() for k, p in model.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    torch.testing.assert_close(grads["0.weight"].sum(0), model[0].weight.grad)


def test_per_sample_gradients_are_refused_behind_a_frozen_layer_too() -> None:
    model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 1.0)
    model[0].requires_grad_(False)
    for parameter in model[1].parameters():
        parameter.grad_sample = None
    with pytest.raises(RuntimeError, match=r"'1\.weight'.*opacus"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("other", [weight_norm, legacy_spectral_norm])
def test_export_beside_hooks_that_leave_a_computed_weight(other) -> None:
    model = nn.Sequential(nn.Linear(4, 4), other(nn.Linear(4, 4)))
    srn.stable_rank_norm(model[0])
    srn.fuse(model)
    x = torch.randn(2, 4)
    model(x).sum().backward()
    expected = model.eval()(x)
    plain = srn.export(model)
    torch.testing.assert_close(plain(x), expected)
    assert srn.is_normalized(model[0])
    plain(x).sum().backward()


def test_a_copy_inside_a_shared_round_is_refused() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.5)
    with srn.shared_round(model):
        for call in (srn.export, srn.remove_stable_rank_norm, srn.to_torch_state_dict):
            with pytest.raises(RuntimeError, match="inside a forward or a shared_round"):
                call(model)
        for call in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match=r"copied or pickled.*'conv\.weight'"):
                call(model)
    srn.export(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("call", [srn.apply_stable_rank_norm, srn.convert_spectral_norm])
def test_tensors_without_numbers_are_refused(call) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    if call is srn.convert_spectral_norm:
        legacy_spectral_norm(model[0])
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(TypeError, match=r"0\.weight .*meta device.*FakeTensorMode"),
    ):
        call(model)
    assert not srn.is_normalized(model[0])
    call(model)(torch.randn(2, 3))


# --- tied weights ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """A head tied to its embedding, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def test_export_unties_and_remove_refuses_a_parameter_with_another_owner() -> None:
    model, x = srn.apply_stable_rank_norm(Tied(), 0.5), torch.arange(7)
    model(x).sum().backward()
    expected, raw = model.eval()(x), model.embed.weight.detach().clone()
    plain = srn.export(model)
    torch.testing.assert_close(plain(x), expected)
    assert plain.head.weight is not plain.embed.weight
    assert torch.equal(plain.embed.weight, raw)
    with pytest.raises(ValueError, match=r"'head\.weight' is the Parameter 'embed\.weight' too"):
        srn.remove_stable_rank_norm(model)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model.embed.weight, raw)
    both = srn.apply_stable_rank_norm(Tied(), 0.5, layer_types=[nn.Linear, nn.Embedding]).eval()
    expected = both(x)
    torch.testing.assert_close(srn.export(both)(x), expected)
    torch.testing.assert_close(srn.remove_stable_rank_norm(both)(x), expected)
    assert both.head.weight is both.embed.weight


# --- hooks taken off ------------------------------------------------------------------------------


def test_is_normalized_says_no_where_the_hooks_are_gone() -> None:
    layer = srn.spectral_norm(nn.Linear(3, 3))
    assert srn.is_normalized(layer)
    layer._forward_pre_hooks.clear()
    assert not srn.is_normalized(layer)
