"""The digits, the batch order, and the distance between image sets."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from srn_lab.data import batches, digits
from srn_lab.quality import frechet_distance, frechet_distance_pca


def test_digits_are_the_bundled_images_scaled_to_minus_one_to_one():
    images = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    pixels = torch.from_numpy(load_digits().images)
    torch.testing.assert_close((images[:, 0].double() + 1) * 8, pixels, rtol=0, atol=0)


def test_upsampled_digits_interpolate_between_pixel_centres():
    native, large = digits(), digits(16)
    assert large.shape == (1797, 1, 16, 16)
    assert large.min() >= -1
    assert large.max() <= 1
    # The centre of target pixel 5 lies a quarter of a pixel right of the centre of source pixel 2.
    weights = torch.tensor([0.75, 0.25])
    expected = torch.einsum("nij,i,j->n", native[:, 0, 2:4, 2:4], weights, weights)
    torch.testing.assert_close(large[:, 0, 5, 5], expected)


def test_batches_cover_an_epoch_once_and_follow_the_generator():
    images = torch.arange(10.0)[:, None]

    def draw(seed, count):
        stream = batches(images, 3, torch.Generator().manual_seed(seed))
        return [next(stream).flatten().tolist() for _ in range(count)]

    epoch = [value for batch in draw(0, 3) for value in batch]
    assert len(set(epoch)) == 9
    assert draw(0, 7) == draw(0, 7)
    assert draw(0, 3) != draw(1, 3)
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.10, got 11"):
        next(batches(images, 11, torch.Generator()))


def test_frechet_distance_of_gaussians_with_known_moments():
    rng = np.random.default_rng(0)
    # Whitening makes the sample moments exact, so the closed form holds to rounding.
    x = rng.normal(size=(500, 3))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    scale, shift = np.array([2.0, 0.5, 3.0]), np.array([1.0, -2.0, 0.0])
    expected = np.square(shift).sum() + np.square(scale - 1).sum()
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_pca_sees_a_brightness_shift():
    images = digits()
    # In the space of 32 of 64 axes the shift (0.1 on each of 64 pixels) keeps at most its length.
    distance = frechet_distance_pca(images, images + 0.1)
    mean = (images + 1).flatten(1).double()
    axes = torch.linalg.eigh(torch.cov(mean.T)).eigenvectors[:, -32:]
    expected = (axes.T @ torch.full((64,), 0.1, dtype=torch.float64)).square().sum().item()
    assert distance == pytest.approx(expected, rel=1e-3)
