"""Methods by name, the spectra they guarantee, losses and penalties by hand."""

import copy
import math

import pytest
import torch
from srn_lab.measures import active_layers, spectra, stable_rank_bounds
from srn_lab.measures.spectra import Spectrum, effective_weight, evaluating
from srn_lab.methods import Loss, Method, Norm
from srn_lab.methods.losses import between, gradient_penalty, orthogonality_penalty
from srn_lab.methods.method import matrix_layers
from srn_lab.networks import Discriminator
from torch import nn

import srn_kernels as srn


def test_labels_are_the_papers():
    assert Method("srn", 0.5).label == "SRN-50"
    assert Method("srn", 0.5, preserve=2).label == "SRN-50, k=2"
    assert [Method(n).label for n in ("sn", "wgan-gp", "random")] == ["SN", "WGAN-GP", "Random"]
    assert not Method("random").trains


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spectral",), "method must be one of none, sn, .* got 'spectral'"),
        (("srn", 0.0), r"c must be in \(0, 1\], got 0"),
        (("srn", 1.5), r"c must be in \(0, 1\], got 1.5"),
        (("sn", 0.5), "parameters of srn, not of sn"),
        (("srn", 0.5, -1), "preserve must be at least 0, got -1"),
    ],
)
def test_bad_methods_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        Method(*arguments)


def discriminator(**keywords):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Discriminator(16, width=24, channels=1, **keywords)
        # Full stable rank: any bound below the rank would show.
        nn.init.orthogonal_(model.blocks[1].conv1.weight)
    return model


@pytest.mark.parametrize("norm", ["none", "wgan-gp", "ortho", "random"])
def test_methods_without_normalisation_leave_the_weights_alone(norm):
    model = discriminator()
    before = copy.deepcopy(model)
    assert Method(norm).apply(model) is model
    assert list(model.state_dict()) == list(before.state_dict())
    x = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)


def converged(method):
    model = method.apply(discriminator(classes=4))
    return srn.refresh(model, iterations=500) or model


def test_sn_makes_every_spectral_norm_one_the_embeddings_too():
    model = converged(Method("sn"))
    rows = spectra(model)
    assert "embedding" in {row.layer for row in rows}
    for row in rows:
        assert row.sigma == pytest.approx(1, abs=1e-4), row
        assert row.stable_rank == pytest.approx(row.raw_stable_rank, rel=1e-4), row


def test_srn_bounds_every_stable_rank_at_spectral_norm_one():
    method = Method("srn", 0.3)
    model = converged(method)
    rows = spectra(model)
    bounds = stable_rank_bounds(rows, method)
    active = active_layers(rows, method)
    assert 0 < len(active) < len(rows)
    for row in rows:
        assert row.sigma == pytest.approx(1, abs=1e-4), row
        expected = bounds[row.layer] if row.layer in active else row.raw_stable_rank
        assert row.stable_rank == pytest.approx(expected, rel=1e-4), row


def test_preserve_keeps_the_top_singular_values():
    layer = nn.Linear(12, 8)
    nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        layer.weight *= torch.linspace(1, 0.5, 8)[:, None]
    raw = torch.linalg.svdvals(layer.weight)
    model = nn.Sequential(layer)
    Method("srn", 0.4, preserve=2).apply(model)
    srn.refresh(model, iterations=500)
    model.eval()
    values = torch.linalg.svdvals(effective_weight(layer).detach())
    torch.testing.assert_close(values[:2], raw[:2] / raw[0], rtol=1e-4, atol=1e-5)
    assert values[2] < 0.95 * raw[2] / raw[0]


def test_torchs_sn_equals_ours():
    ours, torchs = converged(Method("sn")), discriminator(classes=4)
    Method("torch-sn").apply(torchs)
    for _ in range(500):
        for _, layer in matrix_layers(torchs):
            _ = layer.weight
    x, labels = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
    with evaluating(ours), evaluating(torchs):
        torch.testing.assert_close(ours(x, labels), torchs(x, labels), rtol=1e-3, atol=1e-4)


def test_bounds_are_the_ratio_times_the_shorter_side_and_at_least_one():
    shapes = {"wide": (16, 144), "tall": (32, 9), "head": (1, 32)}
    layers = [Spectrum(name, *shape, 1.0, 1.0, 1.0, 1.0) for name, shape in shapes.items()]
    found = stable_rank_bounds(layers, Method("srn", 0.3))
    assert found == pytest.approx({"wide": 4.8, "tall": 2.7, "head": 1.0})
    for method in (Method("sn"), Method("srn", 1.0), Method("none")):
        assert set(stable_rank_bounds(layers, method).values()) == {math.inf}


REAL, FAKE = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, 0.0, 1.0, -0.5])


def test_losses_equal_hand_values():
    # real: 0 + 0.5 + 2 + 0 over 4; fake: 0 + 1 + 2 + 0.5 over 4.
    assert Loss.HINGE.discriminator(REAL, FAKE).item() == 0.625 + 0.875
    assert Loss.HINGE.generator(FAKE).item() == 0.625
    assert Loss.WASSERSTEIN.discriminator(REAL, FAKE).item() == -0.625 - 0.625
    assert Loss.WASSERSTEIN.generator(FAKE).item() == 0.625

    def softplus(values):
        return sum(math.log1p(math.exp(v)) for v in values) / 4

    expected = softplus([-2.0, -0.5, 1.0, -1.0]) + softplus([-3.0, 0.0, 1.0, -0.5])
    assert Loss.NON_SATURATING.discriminator(REAL, FAKE).item() == pytest.approx(expected)
    expected = softplus([3.0, 0.0, -1.0, 0.5])
    assert Loss.NON_SATURATING.generator(FAKE).item() == pytest.approx(expected)


def test_gradient_penalty_of_a_linear_function_and_its_gradient():
    w = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
    x = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(x @ w, x)
    assert penalty.item() == pytest.approx((5 - 1) ** 2)
    penalty.backward()
    # d (|w| - 1)^2 / dw = 2 (|w| - 1) w / |w|
    torch.testing.assert_close(w.grad, 2 * 4 * w.detach() / 5)


def test_points_between_lie_on_their_segments():
    real, fake = torch.zeros(50, 1, 2, 2), torch.ones(50, 1, 2, 2)
    points = between(real, fake, torch.Generator().manual_seed(0))
    assert points.requires_grad
    flat = points.detach().flatten(1)
    assert (flat == flat[:, :1]).all()
    assert 0 <= flat.min() < 0.2 < 0.8 < flat.max() <= 1


def test_orthogonality_penalty_by_hand_and_zero_for_orthogonal_weights():
    weight = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    # W W^T = diag(4, 2), less the identity diag(3, 1).
    assert orthogonality_penalty([weight]).item() == 10
    assert orthogonality_penalty([weight.t(), weight]).item() == 20
    kernel = torch.empty(6, 2, 3, 3)
    nn.init.orthogonal_(kernel)
    assert orthogonality_penalty([kernel]).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("norm", list(Norm), ids=lambda norm: norm.value)
def test_spectra_are_the_exact_singular_values_and_change_nothing(norm):
    model = Method(norm).apply(discriminator())
    before = copy.deepcopy(model.state_dict())
    rows = spectra(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    layers = dict(matrix_layers(model))
    for row in rows:
        with evaluating(model):
            weight = effective_weight(layers[row.layer]).double().flatten(1)
        s = torch.linalg.svdvals(weight)
        assert row.sigma == pytest.approx(s[0].item())
        assert row.stable_rank == pytest.approx((s.square().sum() / s[0] ** 2).item())
