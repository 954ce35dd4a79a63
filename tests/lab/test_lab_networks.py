"""The networks: sizes against the published ones, shapes, what is summed and projected."""

import pytest
import torch
from srn_lab.networks import CLASSIFIERS, Critic, Discriminator, Generator, classifier


def count(network):
    return sum(p.numel() for p in network.parameters())


# As their papers and the usual CIFAR collections state them, to the digits given there.
PUBLISHED = {
    "wrn-28-10": (36.5e6, 0.05e6),
    "resnet110": (1.7e6, 0.05e6),
    "vgg19-bn": (20.0e6, 0.05e6),
    "alexnet": (2.5e6, 0.05e6),
    # 1.0 M with 16 first channels; the paper's 24 add 4 %.
    "densenet40": (1.04e6, 0.05e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_classifiers_have_the_published_numbers_of_parameters(name):
    published, rounding = PUBLISHED[name]
    with torch.device("meta"):
        assert count(classifier(name, 10)) == pytest.approx(published, abs=rounding)


def test_gans_have_sn_gans_numbers_of_parameters():
    with torch.device("meta"):
        # By hand from Table 4 of SN-GAN: dense 128 -> 4x4x256, three blocks of 256, a 3x3 to RGB.
        block = 2 * (256 * 256 * 9 + 256) + (256 * 256 + 256) + 2 * 2 * 256
        dense, image = 129 * 4096, 2 * 256 + 256 * 3 * 9 + 3
        assert count(Generator(32)) == dense + 3 * block + image
        plain = 2 * (128 * 128 * 9 + 128)
        shortcut = 128 * 128 + 128
        first = (3 * 128 * 9 + 128) + (128 * 128 * 9 + 128) + (3 * 128 + 128)
        assert count(Discriminator(32)) == first + plain + shortcut + 2 * plain + 129


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_give_logits(name):
    if name == "wrn-28-10":  # 5 GFLOPs an image
        network, x = classifier(name, 7, 3).to("meta"), torch.rand(2, 3, 32, 32, device="meta")
    else:
        network, x = classifier(name, 7, 3), torch.rand(2, 3, 32, 32)
    assert network(x).shape == (2, 7)


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match=r"network must be one of densenet40.* got 'resnet'"):
        classifier("resnet", 10)


@pytest.mark.parametrize(("resolution", "layers"), [(8, 8), (16, 11), (32, 11), (64, 16)])
def test_gan_shapes(resolution, layers):
    generator = Generator(resolution, width=4, latent=6, channels=1)
    discriminator = Discriminator(resolution, width=4, channels=1)
    images = generator(torch.randn(3, 6))
    assert images.shape == (3, 1, resolution, resolution)
    assert images.abs().max() < 1
    assert discriminator(images).shape == (3,)
    weights = [m for m in discriminator.modules() if hasattr(m, "weight")]
    assert len(weights) == layers
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in discriminator.modules())
    with pytest.raises(ValueError, match=r"resolution must be one of .* got 12"):
        Generator(12)


def test_discriminator_sums_over_positions():
    discriminator = Discriminator(8, width=4, channels=1).eval()
    torch.nn.init.zeros_(discriminator.blocks[-1].conv2.weight)
    features = {}
    discriminator.blocks.register_forward_hook(lambda m, i, out: features.update(out=out))
    x = torch.rand(2, 1, 8, 8)
    logits = discriminator(x)
    pooled = features["out"].relu().sum(dim=(2, 3))
    expected = pooled @ discriminator.dense.weight[0] + discriminator.dense.bias
    torch.testing.assert_close(logits, expected)


def test_conditional_discriminator_projects_on_the_class():
    plain = Discriminator(8, width=4, channels=1)
    conditional = Discriminator(8, width=4, channels=1, classes=3)
    conditional.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(3, 1, 8, 8)
    labels = torch.tensor([0, 2, 1])
    features = plain.blocks(x).relu().sum(dim=(2, 3))
    expected = plain(x) + (conditional.embedding.weight[labels] * features).sum(dim=1)
    torch.testing.assert_close(conditional(x, labels), expected)


def test_conditional_generator_starts_as_the_plain_one_and_follows_its_class():
    plain = Generator(8, width=4, latent=5, channels=1)
    conditional = Generator(8, width=4, latent=5, channels=1, classes=2)
    missing = conditional.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(".scale." in key or ".shift." in key or ".norm." in key for key in missing)
    z = torch.randn(6, 5)
    torch.testing.assert_close(conditional(z, torch.zeros(6).long()), plain(z))
    with torch.no_grad():
        conditional.blocks[0].norm1.shift.weight[1] += 1
    conditional.eval()
    same, other = (conditional(z, torch.full((6,), label)) for label in (0, 1))
    assert not torch.allclose(same, other)


def test_critic_gives_one_value_an_image():
    assert Critic(16, 1, width=4)(torch.rand(3, 1, 16, 16)).shape == (3,)
    with pytest.raises(ValueError, match="resolution must be a multiple of 8, got 12"):
        Critic(12)
