"""Every measure against a closed form or an independent computation."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg as scipy_linalg
from srn_lab.measures import (
    PairKind,
    Slopes,
    complexity,
    draw_pairs,
    jacobian_norms,
    log_product_of_norms,
    roughness,
    slopes,
)
from srn_lab.measures.complexity import log_spec_fro, log_spec_l1
from srn_lab.measures.divergence import DivergenceConfig, neural_divergence
from srn_lab.measures.evaluate import evaluate, frechet_distance_pca
from srn_lab.measures.features import FeatureError, inception_features
from srn_lab.measures.scores import fid, inception_score, intra_fid, kid
from torch import nn

DOUBLE = torch.float64


class Linear(nn.Module):
    """f(x) = <w, x> + 3 on flattened images; counts how it was called."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return x.flatten(1) @ self.w + 3


def images(count, seed):
    return torch.randn(count, 1, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_slopes_of_a_linear_function_are_bounded_by_its_norm_and_reach_it():
    w = torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0, 0.0])
    f = Linear(w)
    found = slopes(f, images(700, 1), images(700, 2))
    assert found.values.shape == (700,)
    assert found.values.max() <= 5 * (1 + 1e-5)
    x = images(1, 3)
    along, across = w.view(1, 1, 2, 3), torch.eye(6)[1].view(1, 1, 2, 3)
    # Along w the slope is |w| = 5, across it 0, and half-way (unit w plus unit e1) 5 / sqrt(2).
    shifts = torch.cat([0.3 * along, across, along / 5 + across])
    exact = slopes(f, x + shifts, x.expand(3, -1, -1, -1))
    torch.testing.assert_close(exact.values.tolist(), [5.0, 0.0, 5 / 2**0.5], rtol=1e-5, atol=1e-5)


def test_slopes_of_vectors_are_norms_and_labels_reach_the_network():
    class Scaled(nn.Module):
        def forward(self, x, labels):
            return x.flatten(1) * labels[:, None]

    x, y = images(4, 1), images(4, 2)
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = slopes(Scaled(), x, y, (labels, labels))
    torch.testing.assert_close(found.values, labels.double(), rtol=1e-5, atol=1e-5)


def test_slopes_run_in_evaluation_mode_without_gradients_and_restore_the_mode():
    f = nn.Sequential(Linear(torch.ones(6)), nn.Dropout(0.5))
    f[1].eval()
    slopes(f, images(600, 1), images(600, 2))
    assert set(f[0].seen) == {(False, False)}
    assert (f.training, f[0].training, f[1].training) == (True, True, False)
    assert f[0].w.requires_grad


def test_identical_pairs_are_left_out_and_counted():
    x, y = images(4, 1), images(4, 2)
    y[1], y[3] = x[1], x[3]
    found = slopes(Linear(torch.ones(6)), x, y)
    assert found.identical_pairs == 2
    assert found.values.shape == (2,)
    assert found.values.isfinite().all()
    with pytest.raises(ValueError, match="no pair of distinct images"):
        slopes(Linear(torch.ones(6)), x, x)


def test_percentile_95_and_summary_of_known_slopes():
    found = Slopes(torch.arange(101, dtype=DOUBLE), identical_pairs=4)
    assert found.percentile_95 == 95.0
    assert found.summary() == {
        "pairs": 101,
        "identical_pairs_left_out": 4,
        "mean_slope": 50.0,
        "median_slope": 50.0,
        "percentile_95_slope": 95.0,
        "max_slope": 100.0,
    }


KINDS = pytest.mark.parametrize(
    ("kind", "x_sign", "y_sign"),
    [(PairKind.REAL_FAKE, 1, -1), (PairKind.REAL_REAL, 1, 1), (PairKind.FAKE_FAKE, -1, -1)],
    ids=lambda value: getattr(value, "value", None),
)


@KINDS
def test_pairs_come_from_the_named_sets_and_never_join_an_image_with_itself(kind, x_sign, y_sign):
    real = torch.arange(1.0, 6.0)[:, None]
    fake = -torch.arange(1.0, 4.0)[:, None]
    x, y, labels = draw_pairs(real, fake, kind, 400, torch.Generator().manual_seed(0))
    assert labels is None
    assert x.shape == y.shape == (400, 1)
    assert (x.sign() == x_sign).all()
    assert (y.sign() == y_sign).all()
    assert (x != y).all()
    pools = {1: set(real.flatten().tolist()), -1: set(fake.flatten().tolist())}
    assert set(x.flatten().tolist()) == pools[x_sign]
    assert set(y.flatten().tolist()) == pools[y_sign]


@KINDS
def test_conditional_pairs_share_a_class_drawn_uniformly(kind, x_sign, y_sign):
    # Class c holds c + 2 images, so drawing images first would favour the large ones.
    labels = torch.tensor([c for c in range(4) for _ in range(c + 2)])
    real = (torch.arange(len(labels)) + 1.0 + 100 * labels)[:, None]
    x, y, drawn = draw_pairs(
        real, -real, kind, 4000, torch.Generator().manual_seed(0), (labels,) * 2
    )
    assert (x.sign() == x_sign).all()
    assert (y.sign() == y_sign).all()
    assert torch.equal(x.abs().flatten() // 100, drawn.float())
    assert torch.equal(y.abs().flatten() // 100, drawn.float())
    if kind is not PairKind.REAL_FAKE:
        assert (x != y).all()
    # Four standard deviations of a binomial count.
    assert (drawn.bincount() - 1000).abs().max() < 4 * math.sqrt(4000 * 0.25 * 0.75)
    with pytest.raises(ValueError, match="no class has images"):
        draw_pairs(real[:1], real[:1], PairKind.REAL_REAL, 3, torch.Generator(), (labels[:1],) * 2)


def test_jacobian_of_a_linear_network_is_its_norm():
    matrix = torch.randn(5, 6, dtype=DOUBLE)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5).double())
    with torch.no_grad():
        network[1].weight.copy_(matrix)
    found = jacobian_norms(network, images(9, 0).double(), iterations=500, tol=1e-10)
    expected = torch.linalg.matrix_norm(matrix, 2).expand(9)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    scalar = Linear(torch.tensor([3.0, 0, -4.0, 0, 0, 0]))
    torch.testing.assert_close(
        jacobian_norms(scalar, images(3, 0)), torch.full((3,), 5.0, dtype=DOUBLE)
    )


def test_jacobian_of_a_convolutional_network_equals_the_full_matrix():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4)
        ).double()
    x = images(3, 5).double()
    full = torch.autograd.functional.jacobian(network, x)
    expected = torch.stack(
        [torch.linalg.matrix_norm(full[i, :, i].flatten(1), 2) for i in range(3)]
    )
    found = jacobian_norms(network, x, iterations=1000, tol=1e-12, batch=2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert network[0].weight.grad is None
    assert network[0].weight.requires_grad


def test_product_of_norms():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Conv2d(2, 2, 3))
    expected = sum(
        math.log(np.linalg.norm(layer.weight.detach().double().flatten(1).numpy(), 2))
        for layer in network
    )
    assert log_product_of_norms(network) == pytest.approx(expected)


def gaussian(count, mean, covariance, seed):
    """Features whose sample mean and covariance are exactly the given ones."""
    x = torch.randn(count, len(mean), dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(dim=0)
    root = torch.linalg.cholesky(torch.cov(x.t()))
    white = torch.linalg.solve_triangular(root, x.t(), upper=False).t()
    return white @ torch.linalg.cholesky(covariance).t() + mean


def test_fid_of_two_known_gaussians():
    first = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]], dtype=DOUBLE)
    second = torch.tensor([[1.0, -0.3, 0.1], [-0.3, 2.0, 0.0], [0.1, 0.0, 0.5]], dtype=DOUBLE)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    x, y = gaussian(400, torch.zeros(3), first, 0), gaussian(300, mean, second, 1)
    root = scipy_linalg.sqrtm((first @ second).numpy()).real
    expected = mean.square().sum() + first.trace() + second.trace() - 2 * np.trace(root)
    assert fid(x, y) == pytest.approx(expected.item(), rel=1e-6)
    assert fid(x, x) == pytest.approx(0, abs=1e-6)


def test_intra_fid_is_the_mean_over_classes():
    labels = torch.tensor([0, 1]).repeat(100)
    covariance = torch.eye(2, dtype=DOUBLE)
    real = torch.zeros(200, 2, dtype=DOUBLE)
    fake = torch.zeros(200, 2, dtype=DOUBLE)
    for label, shift in ((0, 3.0), (1, 1.0)):
        mean = torch.tensor([shift, 0.0], dtype=DOUBLE)
        real[labels == label] = gaussian(100, torch.zeros(2), covariance, label)
        fake[labels == label] = gaussian(100, mean, covariance, label + 5)
    assert intra_fid(real, labels, fake, labels) == pytest.approx((9 + 1) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="class 1 has fewer than 2"):
        intra_fid(real, labels, fake, torch.zeros_like(labels))


def test_kid_is_the_unbiased_cubic_mmd():
    x, y = (torch.randn(60, 4, dtype=DOUBLE) + shift for shift in (0.0, 1.0))

    def kernel(a, b):
        return (a @ b.t() / 4 + 1) ** 3

    n = len(x)
    within = [(k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y))]
    expected = within[0] + within[1] - 2 * kernel(x, y).mean()
    # Subsets of all images: every one gives the same number.
    assert kid(x, y, subset=60, subsets=3) == pytest.approx(expected.item(), rel=1e-5)


def test_inception_score_of_certain_and_of_constant_answers():
    certain = 100 * torch.eye(5).repeat(40, 1)
    # Two halves of 200 shuffled answers: their classes are not quite equally many.
    assert 4.8 < inception_score(certain, splits=2)[0] <= 5 + 1e-4
    assert inception_score(torch.zeros(50, 5), splits=2)[0] == pytest.approx(1, rel=1e-6)


def test_inception_says_what_it_needs(tmp_path):
    with pytest.raises(FeatureError, match=r"none\.pth does not exist"):
        inception_features(str(tmp_path / "none.pth"))


def test_neural_divergence_is_higher_for_the_same_images_than_for_others():
    real = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = DivergenceConfig(
        steps=60, batch_size=16, width=4, learning_rate=3e-3, batches=10, ema=0.9
    )

    def same(count, random):
        return real[torch.randint(len(real), (count,), generator=random)]

    def other(count, random):
        return torch.ones(count, 1, 8, 8)

    equal = neural_divergence(real, same, config)
    assert equal == neural_divergence(real, same, config)
    assert neural_divergence(real, other, config) < equal - 1


def test_spec_measures_by_svd():
    weights = [torch.randn(5, 7, dtype=DOUBLE), torch.randn(3, 2, 3, 3, dtype=DOUBLE)]
    flat = [w.flatten(1).numpy() for w in weights]
    norms = [np.linalg.svd(w, compute_uv=False)[0] for w in flat]
    ranks = sum(np.linalg.norm(w) ** 2 / s**2 for w, s in zip(flat, norms, strict=True))
    expected = math.prod(s**2 for s in norms) * ranks
    assert math.exp(log_spec_fro(weights)) == pytest.approx(expected)
    sums = [np.abs(np.linalg.norm(w, axis=1)).sum() for w in flat]
    inner = sum((t / s) ** (2 / 3) for t, s in zip(sums, norms, strict=True)) ** 3
    assert math.exp(log_spec_l1(weights)) == pytest.approx(math.prod(s**2 for s in norms) * inner)


def test_complexity_of_two_linear_layers_by_hand():
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    network = nn.Sequential(first, second).double()
    x = torch.randn(6, 4, dtype=DOUBLE)
    a, b = first.weight.detach(), second.weight.detach()
    hidden = x @ a.t()
    logits = hidden @ b.t()
    labels = logits.argmax(dim=1)
    labels[0] = 1 - labels[0]  # a wrong answer has no measure
    found = complexity(network, x, labels, batch=4)
    margin = (logits.amax(dim=1) - logits.amin(dim=1))[1:]
    assert found.positive == pytest.approx(5 / 6)
    expected = log_spec_fro([a, b]) - 2 * margin.log()
    torch.testing.assert_close(found.spec_fro, expected)
    torch.testing.assert_close(found.spec_l1, log_spec_l1([a, b]) - 2 * margin.log())
    # The only hidden layer is h = A x; the margin's gradient there is the difference of B's rows.
    slope = (b[0] - b[1]).norm()
    expected = (hidden[1:].norm(dim=1) * slope / margin).log()
    torch.testing.assert_close(found.jac_norm, expected)
    with pytest.raises(ValueError, match="no sample has a positive margin"):
        complexity(network, x, 1 - logits.argmax(dim=1))


def test_roughness_sees_noise_and_no_trend():
    line = [0.01 * step for step in range(400)]
    assert roughness(line) == pytest.approx(0, abs=1e-12)
    alternating = [value + (1 if step % 2 else -1) for step, value in enumerate(line)]
    # Against a mean of 25 steps, of which 13 or 12 have the step's own sign: 1 -+ 1/25.
    assert roughness(alternating) == pytest.approx(1, abs=0.05)
    assert roughness([3 * v for v in alternating]) == pytest.approx(3 * roughness(alternating))
    with pytest.raises(ValueError, match="at least 4 steps"):
        roughness([1.0])


def test_frechet_distance_in_pca_axes_sees_a_shift_exactly():
    real = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance_pca(real, real) == pytest.approx(0, abs=1e-6)
    pixels = real.flatten(1).double().numpy()
    axes = np.linalg.eigh(np.cov(pixels.T)).eigenvectors[:, -32:]
    expected = np.square(axes.T @ np.full(64, 0.1)).sum()
    assert frechet_distance_pca(real, real + 0.1) == pytest.approx(expected, rel=1e-3)


def test_evaluation_repeats_for_a_seed():
    real, fake = images(50, 0).repeat(1, 1, 4, 3), images(50, 1).repeat(1, 1, 4, 3)
    network = Linear(torch.ones(72))
    first, again, other = (evaluate(network, real, fake, pairs=40, seed=s) for s in (1, 1, 2))
    assert first.to_dict() == again.to_dict()
    assert first.elhist[PairKind.REAL_REAL].values.shape == (40,)
    assert first.to_dict() != other.to_dict()
