"""What is measured: workloads, and the models and steps that have their weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.cases import models, providers, steps, workloads


def test_workloads_hold_what_they_say():
    known = workloads.load()
    assert all(workloads.find(name).parameters > 0 for name in workloads.CORE)
    assert known["biggan_128_D_ch96"].parameters == 87_970_368


def test_a_wrong_total_is_refused():
    record = {"source": "", "layers": [[2, 3, 1]], "total_params": 7}
    with pytest.raises(ValueError, match="6 parameters, total_params says 7"):
        workloads.Workload.from_record("w", record)


@pytest.mark.parametrize(
    ("name", "shapes"), [("2x3x4", ((3, 4),) * 2), ("densenet40_k12/20", ((16, 27), (12, 2088)))]
)
def test_workloads_made_from_numbers(name, shapes):
    assert workloads.find(name).shapes == shapes


def test_workloads_of_half_precision():
    half = workloads.find("2x3x4@bfloat16")
    assert half.shapes == workloads.find("2x3x4").shapes
    problem = workloads.make_problem(half)
    assert {w.dtype for w in problem.weights + problem.upstream} == {torch.bfloat16}
    assert workloads.floor_bytes(half, "backward") == 3 * 24 * 2


@pytest.mark.parametrize(
    "name", ["nothing", "0x3x4", "vit_b16/0", "nothing/2", "2x3x4@int8", "nothing@bfloat16"]
)
def test_an_unknown_workload_is_named(name):
    with pytest.raises(ValueError, match=name.removesuffix("@bfloat16")):
        workloads.find(name)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 7), (6, 6)])
def test_flat_matrix_has_singular_values_one(shape):
    singular = torch.linalg.svdvals(workloads.flat_matrix(*shape))
    torch.testing.assert_close(singular, torch.ones_like(singular))


def weight_shapes(model: torch.nn.Module) -> Counter:
    """Of the matrices that are normalised; transposed convolutions have their rows second."""
    shapes: Counter = Counter()
    for layer in steps.normalized_layers(model).values():
        rows = layer.weight.shape[isinstance(layer, torch.nn.ConvTranspose2d)]
        shapes[rows, layer.weight.numel() // rows] += 1
    return shapes


@pytest.mark.parametrize("name", steps.MODELS)
def test_models_have_their_workloads_weights(name):
    with torch.device("meta"):
        model = steps.MODELS[name].make()
    assert weight_shapes(model) == Counter(workloads.find(name).shapes)


def test_the_normalized_generator_has_its_workloads_weights():
    with torch.device("meta"):
        generator = steps.MODELS["biggan_128_D_ch96"].generator()
    assert weight_shapes(generator) == Counter(workloads.find("biggan_128_G_ch96").shapes)


@pytest.mark.parametrize("provider", steps.STEP_PROVIDERS)
@pytest.mark.parametrize("kind", ["gan", "images alone", "supervised"])
def test_a_training_step_trains(provider, kind):
    if provider == "module" and (reason := providers.PROVIDERS["module"].unavailable_reason()):
        pytest.skip(reason)
    made: list[torch.nn.Module] = []

    def remember(model: torch.nn.Module) -> torch.nn.Module:
        made.append(model)
        return model

    def discriminator() -> torch.nn.Module:
        return remember(models.ResNetDiscriminator((8, 6), 1, True, 3))

    def generator() -> torch.nn.Module:
        return remember(models.BigGANGenerator((8, 8, 8), 6, 4, 3))

    loss = steps.supervised_step(torch.nn.functional.mse_loss, torch.Tensor.clone)
    images = (2, 3, 16, 16)
    spec = {
        "gan": steps.Model(discriminator, steps.gan_step, images, generator, True),
        "images alone": steps.Model(discriminator, steps.gan_step, images),
        "supervised": steps.Model(
            lambda: remember(models.Emulator(3, (4, 6), (1, 1))), loss, images
        ),
    }[kind]
    step = steps.make_step(spec, steps.How(provider, None if provider == "plain" else 1.0))
    before = [[p.detach().clone() for p in model.parameters()] for model in made]
    step()
    assert len(made) == (2 if kind == "gan" else 1)
    for model, old in zip(made, before, strict=True):
        moved = [not p.equal(q) for p, q in zip(model.parameters(), old, strict=True)]
        assert sum(moved) > len(moved) / 2
        assert all(p.requires_grad for p in model.parameters())
