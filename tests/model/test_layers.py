"""Wrapping and selecting, every type of layer, and the one clear error for bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from models import (
    Discriminator,
    assert_untouched,
    images,
    sigma_max,
    snapshot,
    state,
    wrapped_layers,
)
from torch import nn

import srn_kernels as srn

BAD_CALLS = {
    "rank_ratio 0": (lambda m: srn.apply_stable_rank_norm(m, 0.0), ValueError, "rank_ratio.* 0"),
    "rank_ratio 1.5": (lambda m: srn.apply_stable_rank_norm(m, 1.5), ValueError, "rank_ratio.*1.5"),
    "rank_ratio nan": (
        lambda m: srn.stable_rank_norm(m.conv, rank_ratio=math.nan),
        ValueError,
        "rank_ratio",
    ),
    "rank_ratio str": (lambda m: srn.apply_stable_rank_norm(m, "0.7"), TypeError, "rank_ratio"),
    "stable_rank": (
        lambda m: srn.stable_rank_norm(m.conv, stable_rank=0.5),
        ValueError,
        "stable_rank.*0.5",
    ),
    "stable_rank inf": (
        lambda m: srn.stable_rank_norm(m.conv, stable_rank=math.inf),
        ValueError,
        "stable_rank.*inf",
    ),
    "iterations": (
        lambda m: srn.stable_rank_norm(m.conv, n_power_iterations=0),
        ValueError,
        "n_power_iterations",
    ),
    "eps": (lambda m: srn.spectral_norm(m.conv, eps=-1.0), ValueError, "eps.*-1"),
    "dim": (lambda m: srn.stable_rank_norm(m.conv, dim=4), ValueError, "weight: dim = 4"),
    "name": (
        lambda m: srn.stable_rank_norm(m.conv, "wieght"),
        ValueError,
        "'wieght'.*'bias', 'weight'",
    ),
    "no parameter": (lambda m: srn.stable_rank_norm(m), ValueError, "no parameter 'weight'"),
    "not a module": (lambda m: srn.stable_rank_norm(torch.ones(2, 2)), TypeError, "module.*Tensor"),
    "model": (lambda m: srn.apply_stable_rank_norm([m]), TypeError, "model.*list"),
    "backend": (
        lambda m: srn.apply_stable_rank_norm(m, backend="gpu"),
        ValueError,
        "backend.*'gpu'",
    ),
    "include": (lambda m: srn.apply_stable_rank_norm(m, include="conv*,x"), ValueError, "include"),
    "include typo": (
        lambda m: srn.apply_stable_rank_norm(m, include=["conv", "haed"]),
        ValueError,
        "include.*haed",
    ),
    "exclude typo": (
        lambda m: srn.apply_stable_rank_norm(m, exclude="haed"),
        ValueError,
        "exclude.*haed",
    ),
    "exclude all": (lambda m: srn.apply_stable_rank_norm(m, exclude="*"), ValueError, "no layer"),
    "override typo": (
        lambda m: srn.apply_stable_rank_norm(m, overrides={"haed": {"eps": 1e-6}}),
        ValueError,
        "overrides.*haed",
    ),
    "override key": (
        lambda m: srn.apply_stable_rank_norm(m, overrides={"head": {"ratio": 1}}),
        ValueError,
        "overrides.*ratio",
    ),
    "override value": (
        lambda m: srn.apply_stable_rank_norm(m, overrides={"head": {"rank_ratio": 2}}),
        ValueError,
        "rank_ratio.*2",
    ),
    "layer types": (
        lambda m: srn.apply_stable_rank_norm(m, layer_types=["Linear"]),
        TypeError,
        "layer_types",
    ),
    "no such type": (
        lambda m: srn.apply_stable_rank_norm(m, layer_types=[nn.GRU]),
        ValueError,
        "no layer",
    ),
    "convert": (lambda m: srn.convert_spectral_norm(m), ValueError, "spectral norm"),
    "fuse": (lambda m: srn.fuse(m), ValueError, "no normalised layer"),
    "remove": (lambda m: srn.remove_stable_rank_norm(m), ValueError, "no normalised layer"),
    "report": (lambda m: srn.report(m), ValueError, "no normalised layer"),
    "refresh": (lambda m: srn.refresh(m), ValueError, "no normalised layer"),
    "normalized_weight": (
        lambda m: srn.normalized_weight(m.conv),
        ValueError,
        "'weight' of Conv2d",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_gives_one_clear_error_and_changes_nothing(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    model = Discriminator()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8], ids=str)
def test_weights_that_are_not_real_floating_point_raise(dtype: torch.dtype) -> None:
    model = Discriminator()
    model.head.weight = nn.Parameter(model.head.weight.detach().to(dtype), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"head\.weight must be a real floating-point"):
        srn.apply_stable_rank_norm(model)
    assert_untouched(model, before)


def test_wrapping_twice_raises_and_apply_leaves_wrapped_layers() -> None:
    model = Discriminator()
    srn.stable_rank_norm(model.conv, rank_ratio=0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="normalised already"):
        srn.spectral_norm(model.conv)
    assert_untouched(model, before)
    srn.apply_stable_rank_norm(model, 1.0)
    targets = {row.name: row.target for row in srn.report(model)}
    assert targets["conv.weight"] == pytest.approx(6.0)  # 0.5 * min(12, 27), as it was
    assert targets["up.weight"] == math.inf
    assert ("conv.weight", "normalised already") in srn.skipped(model)
    srn.apply_stable_rank_norm(model, 0.2)
    assert {row.name: row.target for row in srn.report(model)} == targets


def test_a_tied_parameter_is_not_wrapped_under_two_names() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    srn.stable_rank_norm(a)
    with pytest.raises(ValueError, match="another normalised layer"):
        srn.stable_rank_norm(b)
    assert not srn.is_normalized(b)


def test_a_lone_attention_output_is_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        srn.spectral_norm(attention.out_proj)
    assert not srn.is_normalized(attention.out_proj)


def test_selection_and_overrides() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(8, 8),
            "b": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Embedding(5, 4)),
            "c": nn.GRU(3, 4),
        }
    )
    srn.apply_stable_rank_norm(
        model,
        0.5,
        include=lambda name, module: name != "c",
        exclude="a",
        layer_types=[nn.Linear, nn.Conv2d, nn.Embedding, nn.GRU],
        overrides={"b.*": {"n_power_iterations": 3}, "b.1": {"stable_rank": 2.0, "dim": 1}},
    )
    rows = {row.name: row for row in srn.report(model)}
    assert set(rows) == {"b.0.weight", "b.1.weight"}
    assert rows["b.0.weight"].target == 4.0
    assert rows["b.1.weight"].target == 2.0
    assert rows["b.1.weight"].shape == (4, 5)
    assert srn.skipped(model) == [("a", "in exclude"), ("c", "not in include")]
    gru = srn.apply_stable_rank_norm(nn.GRU(3, 4), 1.0, layer_types=[nn.GRU])
    assert [row.name for row in srn.report(gru)] == ["weight_ih_l0", "weight_hh_l0"]


def test_recurrent_weights_act() -> None:
    gru, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        gru.weight_hh_l0.mul_(10)
    srn.apply_stable_rank_norm(gru, 1.0, layer_types=[nn.GRU]).eval()
    plain = srn.export(gru)
    torch.testing.assert_close(gru(x)[0], plain(x)[0])
    assert all(
        w is getattr(gru, n)
        for w, n in zip(gru._flat_weights, gru._flat_weights_names, strict=True)
    )
    gru.train()(x)[0].sum().backward()
    assert gru.weight_hh_l0.grad.abs().sum() > 0
    assert sigma_max(gru, "weight_hh_l0") == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(5, 7), torch.randn(2, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 9)),
        (nn.Conv2d(3, 5, 3, dilation=2), torch.randn(2, 3, 9, 9)),
        (nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2), torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2), torch.randn(1, 2, 4, 4, 4)),
        (nn.Embedding(10, 4), torch.arange(6)),
        (nn.Linear(9, 1), torch.randn(2, 9)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("rank_ratio", [1.0, 0.4], ids=["SN", "SRN"])
def test_every_layer_type_against_the_svd(
    layer: nn.Module, x: torch.Tensor, rank_ratio: float
) -> None:
    layer = copy.deepcopy(layer).double()
    w = layer.weight.detach().clone()
    srn.stable_rank_norm(layer, rank_ratio=rank_ratio, init_iterations=3000).eval()
    dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    m = w.movedim(dim, 0).flatten(1)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    s = s / s[0]
    r = max(1.0, rank_ratio * min(m.shape))
    if rank_ratio < 1 and min(m.shape) > 1 and s.square().sum() > r:
        s[1:] *= ((r - 1) / s[1:].square().sum()).sqrt()
    expected = (u * s) @ vh
    got = srn.normalized_weight(layer)
    torch.testing.assert_close(got.movedim(dim, 0).flatten(1), expected, rtol=1e-9, atol=1e-9)
    x = x.double() if x.is_floating_point() else x
    torch.testing.assert_close(layer(x), srn.export(layer)(x), rtol=1e-12, atol=1e-12)


def test_the_bias_of_a_transposed_convolution_is_a_row() -> None:
    layer = srn.spectral_norm(nn.ConvTranspose2d(4, 6, 3), "bias")
    assert srn.normalized_weight(layer, "bias").norm().item() == pytest.approx(1, abs=1e-6)
    assert srn.report(layer)[0].shape == (1, 6)
    written = srn.to_torch_state_dict(layer, "parametrization")
    assert written["parametrizations.bias.original"].shape == (6,)


def test_one_dimensional_parameter_becomes_unit() -> None:
    layer = nn.Linear(3, 4)
    srn.stable_rank_norm(layer, "bias").eval()
    torch.testing.assert_close(srn.normalized_weight(layer, "bias"), layer.bias / layer.bias.norm())
    layer.train()(torch.randn(2, 3)).sum().backward()
    # d(w / |w|) keeps only the part of the gradient beside w
    assert (layer.bias.grad @ layer.bias).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_state_keeps_its_dtype_whatever_the_module_does(dtype: torch.dtype) -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3)
    before = state(model)
    model.to(dtype)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    for key, value in state(model).items():
        assert value.dtype == want
        assert torch.equal(value, before[key].to(want)), key
    assert model(images().to(dtype)).dtype == dtype
    before = state(model)
    model.eval().float()
    assert all(torch.equal(v, before[k].float()) for k, v in state(model).items())


def test_meta_device_then_to_empty() -> None:
    with torch.device("meta"):
        model = srn.apply_stable_rank_norm(Discriminator(), 1.0)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    model.eval()(images())
    for layer in wrapped_layers(model):
        assert 0.999 < sigma_max(layer) < 1.1


def test_channels_last_is_read_in_place() -> None:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.3).eval()
    expected = model(images(1)), srn.normalized_weight(model.conv)
    torch.manual_seed(0)
    model.to(memory_format=torch.channels_last)
    w_hat = srn.normalized_weight(model.conv)
    assert w_hat.stride() == model.conv.weight.stride() != expected[1].stride()
    torch.testing.assert_close(w_hat, expected[1])


def test_initial_state_depends_on_name_and_shape_alone() -> None:
    layers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = nn.Linear(6, 5)
        nn.init.eye_(layer.weight)
        before = torch.random.get_rng_state()
        layers.append(srn.stable_rank_norm(layer))
        assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(layers[0].weight_u, layers[1].weight_u)


@pytest.mark.parametrize("module", ["state", "rounds", "checkpoint"])
def test_a_whole_model_pickle_of_an_older_version_names_state_dict(module: str) -> None:
    pickled = f"csrn_kernels.{module}\nNormalizedWeight\n.".encode()
    with pytest.raises(ModuleNotFoundError, match=r"before 0\.2.*state_dict"):
        pickle.loads(pickled)
