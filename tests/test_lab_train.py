"""The GAN trainer: losses, repeatability, and the spectra that each normalisation guarantees."""

import dataclasses

import pytest
import torch

import srn_kernels as srn
from srn_lab.networks import Discriminator, Generator
from srn_lab.normalisation import (
    Norm,
    effective_weight,
    evaluating,
    matrix_layers,
    normalise,
    one_round,
    spectra,
)
from srn_lab.runs import load_run, save_run
from srn_lab.train import TrainConfig, build, hinge_loss_d, hinge_loss_g, train

TINY = TrainConfig(steps=3, n_dis=2, batch_size=8, width=8, latent=4, spectra_every=2)
ALL_NORMS = pytest.mark.parametrize("norm", list(Norm), ids=lambda norm: norm.value)


def test_hinge_losses_equal_hand_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, 0.0, 1.0, -0.5])
    # real: 0 + 0.5 + 2 + 0 over 4; fake: 0 + 1 + 2 + 0.5 over 4.
    assert hinge_loss_d(real, fake).item() == 0.625 + 0.875
    assert hinge_loss_g(fake).item() == 0.625


@pytest.mark.parametrize(("resolution", "convolutions"), [(8, 8), (16, 11), (32, 11)])
def test_network_shapes(resolution, convolutions):
    generator, discriminator = Generator(resolution, width=4), Discriminator(resolution, width=4)
    images = generator(torch.randn(3, generator.latent))
    assert images.shape == (3, 1, resolution, resolution)
    assert images.abs().max() < 1
    assert discriminator(images).shape == (3,)
    assert len(matrix_layers(discriminator)) == convolutions + 0


def test_discriminator_sums_over_positions():
    discriminator = Discriminator(8, width=4).eval()
    torch.nn.init.zeros_(discriminator.blocks[-1].conv2.weight)
    features = {}
    discriminator.blocks.register_forward_hook(lambda m, i, out: features.update(out=out))
    x = torch.rand(2, 1, 8, 8)
    logits = discriminator(x)
    pooled = features["out"].relu().sum(dim=(2, 3))
    expected = pooled @ discriminator.dense.weight[0] + discriminator.dense.bias
    torch.testing.assert_close(logits, expected)


@ALL_NORMS
def test_training_twice_is_bit_identical(norm):
    def run():
        gan, history = train(dataclasses.replace(TINY, norm=norm))
        losses = [dataclasses.replace(record, step_ms=0) for record in history.steps]
        return gan, losses, history.spectra

    torch.manual_seed(1)
    first, first_losses, first_spectra = run()
    torch.manual_seed(2)
    torch.rand(7)
    second, second_losses, second_spectra = run()
    assert first_losses == second_losses
    assert first_spectra == second_spectra
    for name in ("generator", "discriminator"):
        states = [getattr(gan, name).state_dict() for gan in (first, second)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
