"""The GAN trainer: losses, repeatability, and the spectra that each normalisation guarantees."""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
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
from srn_lab.train import TrainConfig, Trainer, build, hinge_loss_d, hinge_loss_g, train

import srn_kernels as srn

TINY = TrainConfig(steps=3, n_dis=2, batch_size=8, width=8, latent=4, spectra_every=2)
ALL_NORMS = pytest.mark.parametrize("norm", list(Norm), ids=lambda norm: norm.value)


@pytest.fixture(autouse=True)
def one_thread():
    """The work is tiny, and on a busy machine a second thread mostly waits for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_hinge_losses_equal_hand_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, 0.0, 1.0, -0.5])
    # real: 0 + 0.5 + 2 + 0 over 4; fake: 0 + 1 + 2 + 0.5 over 4.
    assert hinge_loss_d(real, fake).item() == 0.625 + 0.875
    assert hinge_loss_g(fake).item() == 0.625


@pytest.mark.parametrize(("resolution", "weights"), [(8, 8), (16, 11), (32, 11)])
def test_network_shapes(resolution, weights):
    generator, discriminator = Generator(resolution, width=4), Discriminator(resolution, width=4)
    images = generator(torch.randn(3, generator.latent))
    assert images.shape == (3, 1, resolution, resolution)
    assert images.abs().max() < 1
    assert discriminator(images).shape == (3,)
    assert len(matrix_layers(discriminator)) == weights


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


def test_learning_rate_decays_linearly_to_zero():
    trainer = Trainer(build(dataclasses.replace(TINY, steps=4)))
    rates = []
    for step in range(1, 5):
        trainer.step(step)
        rates += [o.param_groups[0]["lr"] for o in (trainer.optimizer_d, trainer.optimizer_g)]
    assert rates == pytest.approx([r * 2e-4 for r in (1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25)])


@pytest.mark.parametrize("norm", [Norm.NONE, Norm.SN, Norm.SRN], ids=lambda norm: norm.value)
def test_generator_step_moves_the_generator_and_nothing_of_the_discriminator(norm):
    gan = build(dataclasses.replace(TINY, norm=norm))
    trainer = Trainer(gan)
    trainer.step_d()
    before_d = copy.deepcopy(gan.discriminator.state_dict())
    before_g = copy.deepcopy(dict(gan.generator.named_parameters()))
    trainer.step_g()
    after_d = gan.discriminator.state_dict()
    assert all(torch.equal(before_d[key], after_d[key]) for key in before_d)
    assert all(p.requires_grad for p in gan.discriminator.parameters())
    moved = {name for name, p in gan.generator.named_parameters() if not p.equal(before_g[name])}
    # A bias before batch normalisation has no effect, hence no certain gradient.
    assert moved >= {name for name in before_g if name.endswith("weight")}


@pytest.mark.parametrize("norm", [Norm.SN, Norm.SRN, Norm.TORCH_SN], ids=lambda norm: norm.value)
def test_one_round_is_one_power_iteration_for_two_forwards(norm):
    def advanced(forwards, shared):
        model = build(dataclasses.replace(TINY, norm=norm)).discriminator
        x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with one_round(model, norm) if shared else nullcontext():
            outputs = [model(x) for _ in range(forwards)]
        return outputs, dict(model.named_buffers())

    (single,), once = advanced(1, shared=False)
    (first, second), shared = advanced(2, shared=True)
    _, twice = advanced(2, shared=False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, single, rtol=0, atol=0)
    assert once.keys() == shared.keys() != set()
    assert all(torch.equal(once[key], shared[key]) for key in once)
    assert not all(torch.equal(once[key], twice[key]) for key in once)


def test_no_normalisation_leaves_the_discriminator_untouched():
    model = Discriminator(8, width=8)
    before = copy.deepcopy(model)
    assert normalise(model, Norm.NONE, 0.5) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)


def converged(norm, rank_ratio):
    """A wider discriminator (uneven spectra) whose u, v are the top singular pairs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Discriminator(16, width=24)
        # Full stable rank: any bound below the rank would show.
        torch.nn.init.orthogonal_(model.blocks[1].conv1.weight)
        normalise(model, norm, rank_ratio)
    return srn.refresh(model, iterations=500) or model


def singular_values(model):
    with evaluating(model):
        return {
            name: torch.linalg.svdvals(effective_weight(layer).double().flatten(1))
            for name, layer in matrix_layers(model)
        }


def test_sn_makes_every_spectral_norm_one_and_keeps_the_other_ratios():
    model = converged(Norm.SN, 0.3)
    raw = {
        name: torch.linalg.svdvals(m.weight.double().flatten(1)) for name, m in matrix_layers(model)
    }
    for name, values in singular_values(model).items():
        torch.testing.assert_close(values, raw[name] / raw[name][0], rtol=1e-4, atol=1e-5)


def test_srn_bounds_every_stable_rank_at_spectral_norm_one():
    model = converged(Norm.SRN, 0.3)
    active = 0
    for row in spectra(model):
        bound = max(1.0, 0.3 * min(row.rows, row.columns))
        assert row.sigma == pytest.approx(1, abs=1e-4), row
        assert row.stable_rank <= bound * (1 + 1e-5), row
        if row.raw_stable_rank > bound * (1 + 1e-5):
            active += 1
            assert row.stable_rank == pytest.approx(bound, rel=1e-4), row
        else:
            assert row.stable_rank == pytest.approx(row.raw_stable_rank, rel=1e-4), row
    assert 0 < active < len(spectra(model))


@ALL_NORMS
def test_spectra_report_the_exact_singular_values_and_change_nothing(norm):
    gan, _ = train(dataclasses.replace(TINY, norm=norm))
    model = gan.discriminator
    before = copy.deepcopy(model.state_dict())
    rows = spectra(model)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    values = singular_values(model)
    assert [row.layer for row in rows] == list(values)
    for row in rows:
        s = values[row.layer]
        assert row.sigma == pytest.approx(s[0].item())
        assert row.stable_rank == pytest.approx((s.square().sum() / s[0] ** 2).item())
        raw = dict(model.named_modules())[row.layer]
    assert raw is model.dense


@ALL_NORMS
def test_checkpoint_restores_the_same_networks(norm, tmp_path):
    gan, history = train(dataclasses.replace(TINY, norm=norm))
    loaded = load_run(save_run(tmp_path, gan, history)["checkpoint"])
    assert loaded.config == gan.config
    random = [torch.Generator().manual_seed(0) for _ in range(2)]
    images = gan.sample(5, random[0])
    torch.testing.assert_close(loaded.sample(5, random[1]), images, rtol=0, atol=0)
    with evaluating(gan.discriminator), evaluating(loaded.discriminator):
        expected = gan.discriminator(images)
        torch.testing.assert_close(loaded.discriminator(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank_ratio", 0.0), ("rank_ratio", 1.1), ("steps", 0), ("learning_rate", -1.0)],
)
def test_bad_configuration_names_the_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*got {value}"):
        TrainConfig(**{field: value})


def test_training_runs_on_the_configured_threads_and_restores_the_number():
    seen = []
    config = dataclasses.replace(TINY, norm=Norm.NONE, threads=2)
    train(config, lambda record: seen.append((record.step, torch.get_num_threads())))
    assert seen == [(1, 2), (2, 2), (3, 2)]
    assert torch.get_num_threads() == 1
