"""convert takes what it knows exactly: everything else stays, with its reason and one warning."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from models import Discriminator, images
from peer_hooks import (
    ConvolutionHook,
    DetachedHook,
    ScaledHook,
    SoftHook,
    add_hook,
    add_stable_rank_hook,
)
from peers import ClassConditional, Mimicry, OwnConv, SelfAttention, Wrapper
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn


@pytest.mark.parametrize("coeff", [0.3, 50.0])
@pytest.mark.parametrize("train", [0, 3])
def test_a_soft_bound_becomes_sigma_max(coeff: float, train: int) -> None:
    model = nn.Sequential(*[add_hook(nn.Linear(6, 6), SoftHook, coeff) for _ in range(2)])
    x = torch.randn(4, 6)
    for _ in range(train):
        model(x)
    checkpoint = copy.deepcopy(model.state_dict())
    expected = model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        srn.convert_spectral_norm(model)
    torch.testing.assert_close(model(x), expected, rtol=2e-6, atol=2e-6)
    assert set(model.state_dict()) == {
        f"{i}.{k}" for i in "01" for k in ("weight", "bias", "weight_u", "weight_v")
    }
    model.load_state_dict(checkpoint)  # weight_sigma is a log
    torch.testing.assert_close(model(x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ScaledHook, "another weight"),
        (DetachedHook, "another gradient"),
        (ConvolutionHook, r"\(9, 11\)|elements"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_only_resembles_torchs_hook_stays_and_is_named(kind: type, reason: str) -> None:
    coeff = None if kind is DetachedHook else 1.0
    odd = add_hook(nn.Conv2d(3, 6, 3), kind, coeff)
    if kind is ConvolutionHook:  # of a 3 x 8 x 8 input
        odd.weight_u, odd.weight_v = torch.ones(6 * 36) / 14.7, torch.ones(3 * 64) / 13.9
    model = nn.ModuleDict({"odd": odd, "known": legacy_spectral_norm(nn.Conv2d(3, 6, 3))})
    if kind is not ConvolutionHook:
        odd(images())
        before = odd.eval()(images())
    hook = next(iter(odd._forward_pre_hooks.values()))
    with pytest.warns(UserWarning, match=r"odd\.weight") as caught:
        srn.convert_spectral_norm(model)
    assert len(caught) == 1
    assert not srn.is_normalized(odd)
    assert srn.is_normalized(model["known"])
    assert next(iter(odd._forward_pre_hooks.values())) is hook
    assert "weight_orig" in odd._parameters
    ((name, _),) = srn.skipped(model)
    assert name == "odd.weight"
    with pytest.raises(ValueError, match=reason):
        srn.convert_spectral_norm(nn.Sequential(odd))
    if kind is not ConvolutionHook:
        assert odd(images()).shape == before.shape


def test_a_hook_that_is_odd_on_one_side_of_its_bound_stays() -> None:
    class Odd(SoftHook):
        def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> torch.Tensor:
            soft = super().compute_weight(module, do_power_iteration)
            return soft * torch.where(module.weight_sigma > self.coeff, 0.5, 1.0)

    with pytest.raises(ValueError, match="another weight"):
        srn.convert_spectral_norm(nn.Sequential(add_hook(nn.Linear(6, 6), Odd, 1.0)))


def test_hooks_of_another_dimension_and_of_no_stable_rank_are_taken() -> None:
    turned = legacy_spectral_norm(nn.ConvTranspose2d(4, 6, 3))  # dim 1
    hook = next(iter(turned._forward_pre_hooks.values()))
    hook.__class__, hook.coeff = SoftHook, 0.3
    turned.register_buffer("weight_sigma", torch.ones(1))
    free = add_stable_rank_hook(nn.Linear(6, 5), 1.5)  # a ratio beyond 1 does nothing
    for layer, x in ((turned, torch.randn(2, 4, 5, 5)), (free, torch.randn(2, 6))):
        layer(x)
        expected = layer.eval()(x)
        model = srn.convert_spectral_norm(nn.Sequential(layer))
        torch.testing.assert_close(model(x), expected, rtol=2e-6, atol=2e-6)
    assert srn.report(model)[0].target == float("inf")


@pytest.mark.parametrize("zero", [False, True])
def test_a_vector_is_taken_with_u_and_v_of_its_own(zero: bool) -> None:
    layer = nn.Linear(3, 4)
    if zero:
        nn.init.zeros_(layer.bias)
    model = nn.Sequential(parametrizations.spectral_norm(layer, "bias")).eval()
    expected = model(torch.ones(1, 3))
    srn.convert_spectral_norm(model)
    torch.testing.assert_close(model(torch.ones(1, 3)), expected)
    assert model[0].bias_v.isfinite().all()


def test_nothing_of_the_other_code_stays() -> None:
    layer, own = legacy_spectral_norm(nn.Linear(4, 4)), OwnConv(3, 4, 3)
    srn.convert_spectral_norm(nn.Sequential(layer, nn.Sequential(own)))
    assert not layer._state_dict_hooks
    assert not {"num_itrs", "num_svs", "transpose", "eps"}.intersection(own.__dict__)


def test_what_cannot_be_served_is_named_and_nothing_changes() -> None:
    layer, small = legacy_spectral_norm(nn.Linear(4, 4)), OwnConv(3, 4, 3)
    dead = next(n for n, reason in srn.available_backends().items() if reason)
    with pytest.raises(RuntimeError, match=r"0\.weight: backend"):
        srn.convert_spectral_norm(nn.Sequential(layer), backend=dead)
    assert "weight_orig" in layer._parameters
    small.u0 = torch.ones(1, 3)
    with pytest.raises(ValueError, match="its u has 3 elements, a 4 x 27 matrix needs others"):
        srn.convert_spectral_norm(nn.Sequential(small))


def test_forms_that_are_not_known_are_left() -> None:
    class SpectralNormParametrization(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w / torch.linalg.matrix_norm(w, 2)

    class LipschitzLinear(nn.Linear):
        pass

    class Bounded(OwnConv):
        def W_(self) -> torch.Tensor:
            return 0.9 * super().W_()

    class BoundedWrapper(Wrapper):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.bound = 2.0

    chain = parametrizations.spectral_norm(nn.Linear(4, 4))
    parametrize.register_parametrization(chain, "weight", nn.Identity())
    other = nn.Linear(4, 4)
    parametrize.register_parametrization(other, "weight", SpectralNormParametrization())
    extra = add_stable_rank_hook(nn.Linear(4, 4), 0.5)
    next(iter(extra._forward_pre_hooks.values())).bound = 2.0
    reordered = add_stable_rank_hook(nn.Conv2d(4, 4, 3), 0.5)
    next(iter(reordered._forward_pre_hooks.values())).dim = 1
    reordered.weight_v = reordered.weight_v  # 4 x 36 either way
    left = {
        "chain": (chain, "other parametrizations.*Identity"),
        "other": (other, "SpectralNormParametrization"),
        "named": (LipschitzLinear(4, 4), "class LipschitzLinear"),
        "bounded": (Bounded(3, 4, 3), "another weight"),
        "wrapper": (BoundedWrapper(nn.Linear(4, 4)), "'bound'"),
        "extra": (extra, "'bound'"),
        "reordered": (reordered, "dim is not 0"),
    }
    model = nn.ModuleDict({k: m for k, (m, _) in left.items()})
    model["known"] = legacy_spectral_norm(nn.Linear(4, 4))
    before = {k: copy.copy(m.__dict__) for k, m in model.items()}
    with pytest.warns(UserWarning, match="7|chain"):
        srn.convert_spectral_norm(model)
    reasons = dict(srn.skipped(model))
    for key, (module, pattern) in left.items():
        label = f"{key}.weight"
        assert label in reasons, key
        import re

        assert re.search(pattern, reasons[label]), (key, reasons[label])
        assert module.__dict__.keys() == before[key].keys()
    assert srn.is_normalized(model["known"])


def test_one_line_to_the_logger_and_no_warning_where_all_is_taken(caplog) -> None:
    model = ClassConditional()
    with caplog.at_level(logging.INFO, "srn_kernels"), warnings.catch_warnings():
        warnings.simplefilter("error")
        srn.convert_spectral_norm(model)
    (record,) = caplog.records
    assert "5 layers of ClassConditional taken over (5 from a class)" in record.getMessage()
    assert srn.skipped(model) == []


def test_another_setting_for_a_converted_model_is_refused() -> None:
    model = srn.convert_spectral_norm(nn.Sequential(legacy_spectral_norm(nn.Linear(6, 6))))
    with pytest.raises(ValueError, match=r"rank_ratio: '0\.weight' .*set_rank_ratio"):
        srn.convert_spectral_norm(model, 0.5)
    with pytest.raises(ValueError, match=r"sigma_max: '0\.weight'"):
        srn.convert_spectral_norm(model, sigma_max=2.0)
    assert srn.convert_spectral_norm(model) is model  # nothing else is asked for
    assert srn.report(model)[0].target == float("inf")


@pytest.mark.parametrize("form", ["legacy", "parametrization", "stable rank"])
def test_fresh_layers_convert_with_the_same_output(form: str) -> None:
    """torch's first evaluation uses u, v of either sign; half of the seeds have sigma < 0."""
    wrap = {
        "legacy": legacy_spectral_norm,
        "parametrization": parametrizations.spectral_norm,
        "stable rank": lambda layer: add_stable_rank_hook(layer, 0.6),
    }[form]
    signs = set()
    for seed in range(12):
        torch.manual_seed(seed)
        model, x = nn.Sequential(wrap(nn.Linear(6, 5))).eval(), torch.randn(3, 6)
        expected = model(x)
        srn.convert_spectral_norm(model)
        # sigma may be small: its error is a sum's, relative to |W|
        error = 1e-5 * float(expected.detach().abs().max())
        torch.testing.assert_close(model(x), expected, rtol=0, atol=error)
        signs.add(srn.report(model)[0].sigma > 0)
        model.train()(x).sum().backward()
        assert srn.report(model)[0].sigma > 0
    assert signs == ({True} if form == "parametrization" else {True, False})


# --- apply on models that somebody else normalises ------------------------------------------------


def test_apply_refuses_a_model_where_nothing_is_left_to_normalise() -> None:
    model = nn.Sequential(
        legacy_spectral_norm(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Linear(4, 4))
    )
    with pytest.raises(ValueError, match=r"0\.weight: .*convert_spectral_norm.*1\.weight"):
        srn.apply_stable_rank_norm(model)
    assert "_srn_group" not in model.__dict__
    model.append(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"0\.weight.*1\.weight") as caught:
        srn.apply_stable_rank_norm(model)
    assert len(caught) == 1
    assert [srn.is_normalized(m) for m in model] == [False, False, True]
    for make, count in ((ClassConditional, 5), (Mimicry, 2)):
        with pytest.raises(ValueError, match="convert_spectral_norm"):
            srn.apply_stable_rank_norm(make())
        assert len(srn.report(srn.convert_spectral_norm(make()))) == count


def test_reasons_name_what_is_in_the_way() -> None:
    pruned, normed = nn.Linear(4, 4), weight_norm(nn.Linear(4, 4))
    prune.random_unstructured(pruned, "weight", 0.5)
    new = parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict({"pruned": pruned, "normed": normed, "new": new, "free": nn.Linear(4, 4)})
    srn.apply_stable_rank_norm(model)
    reasons = dict(srn.skipped(model))
    assert "prune.remove" in reasons["pruned.weight"]
    assert "remove_weight_norm" in reasons["normed.weight"]
    assert "remove_parametrizations" in reasons["new.weight"]
    assert not any("convert" in reason for reason in reasons.values())
    for layer, match in ((pruned, "pruned"), (normed, "weight_norm"), (new, "parametrized by")):
        with pytest.raises(ValueError, match=match):
            srn.spectral_norm(layer)


def test_matrices_of_other_classes_are_listed() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(5))

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Conv1D(), "c": nn.BatchNorm1d(4)})
    srn.apply_stable_rank_norm(model)
    assert srn.skipped(model) == [("b.weight", "Conv1D is not in layer_types")]


def test_a_wrapper_whose_layer_has_a_name_of_its_own() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.model = nn.Sequential(Wrapper(self.conv), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    model, x = Named(), images()
    for _ in range(3):
        model(x)
    checkpoint = copy.deepcopy(model.state_dict())
    assert {"conv.weight_bar", "model.0.module.weight_bar"} <= set(checkpoint)
    twin = Named()
    twin.load_state_dict(checkpoint)
    expected = twin.eval()(x)
    fresh = srn.convert_spectral_norm(Named()).eval()
    fresh.load_state_dict(checkpoint)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-5, atol=1e-5)
    again = Named()
    again.load_state_dict(srn.to_torch_state_dict(fresh, "original"))
    torch.testing.assert_close(again.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_self_attention_and_a_discriminator_convert_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        srn.convert_spectral_norm(SelfAttention())
        model = Discriminator()
        for layer in model.children():
            add_stable_rank_hook(layer, 1.0)
        srn.convert_spectral_norm(model)
