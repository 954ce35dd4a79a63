"""The training step of whole models, and what normalising them adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import srn_kernels as srn
from benchmarks.cases import models

Step = Callable[[], None]
CPU = torch.device("cpu")
NORMALIZED_TYPES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
STEP_PROVIDERS = ("plain", "torch_sn", "module")


@dataclass(frozen=True)
class How:
    """How a step is taken; provider: one of STEP_PROVIDERS, backend: of "module"."""

    provider: str
    rank_ratio: float | None
    backend: str = "cpu"
    device: torch.device = CPU
    autocast: torch.dtype | None = None  # of the forwards; None: the weights' own

    def precision(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


@dataclass(frozen=True)
class Model:
    """A workload's model and its step.

    make: the model whose weights are the workload's
    step: trains it, given the model and the images of one step
    images: (batch, channels, height, width)
    generator: of the fake images; None: they are what is trained
    """

    make: Callable[[], nn.Module]
    step: Callable[[Model, nn.Module, How], Step]
    images: tuple[int, int, int, int]
    generator: Callable[[], nn.Module] | None = None
    normalize_generator: bool = False
    long: bool = False  # seconds a step: measured only where steps are asked for by name


def normalized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that the model's authors normalise."""
    left_out = getattr(model, "plain", ())
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, NORMALIZED_TYPES) and name not in left_out
    }


def wrap(model: nn.Module, how: How) -> nn.Module:
    """The model, normalised."""
    layers = normalized_layers(model)
    if how.provider == "module":
        srn.apply_stable_rank_norm(
            model,
            how.rank_ratio,
            include=list(layers),
            layer_types=NORMALIZED_TYPES,
            backend=how.backend,
        )
    elif how.provider == "torch_sn":
        for layer in layers.values():
            spectral_norm(layer)
    elif how.provider != "plain":
        raise ValueError(f"provider must be one of {STEP_PROVIDERS}, got {how.provider!r}")
    return model


def _adam(parameters: Iterable[Tensor], how: How) -> torch.optim.Adam:
    # A tiny rate: the step is timed, and must stay finite without normalisation too.
    graphs = how.device.type == "cuda"
    return torch.optim.Adam(parameters, lr=1e-6, betas=(0.0, 0.9), capturable=graphs)


def gan_step(spec: Model, model: nn.Module, how: How) -> Step:
    """D(real), D(fake) and a discriminator update, then the generator's through a frozen D.

    Without a generator the fake images themselves get its gradient, as a network's output would.
    """
    real = torch.rand(spec.images) * 2 - 1
    generator: nn.Module | None = None
    trained: list[Tensor] = [(torch.rand(spec.images) * 2 - 1).requires_grad_()]
    if spec.generator is not None:
        generator = spec.generator()
        if spec.normalize_generator:
            wrap(generator, how)
        latent = torch.randn(spec.images[0], generator.latent)
        trained = list(generator.parameters())
    optimizers = _adam(model.parameters(), how), _adam(trained, how)

    def fake() -> Tensor:
        return trained[0] if generator is None else generator(latent)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with how.precision():
            images = fake()
            loss = F.relu(1 - model(real)).mean() + F.relu(1 + model(images.detach())).mean()
        loss.backward()
        optimizers[0].step()
        model.requires_grad_(False)
        with how.precision():
            loss = -model(images).mean()
        loss.backward()
        model.requires_grad_(True)
        optimizers[1].step()

    return step


def supervised_step(
    loss: Callable[[Tensor, Tensor], Tensor], target: Callable[[Tensor], Tensor]
) -> Callable[[Model, nn.Module, How], Step]:
    """One forward, one backward, one update."""

    def make(spec: Model, model: nn.Module, how: How) -> Step:
        optimizer = _adam(model.parameters(), how)
        images = torch.randn(spec.images)
        wanted = target(images)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with how.precision():
                error = loss(model(images), wanted)
            error.backward()
            optimizer.step()

        return step

    return make


MODELS = {
    "sngan_cifar_resnet_D": Model(
        lambda: models.ResNetDiscriminator((128,) * 4, 2),
        gan_step,
        (16, 3, 32, 32),
        models.ResNetGenerator,
    ),
    "real_esrgan_unet_D": Model(models.UNetDiscriminator, gan_step, (2, 3, 64, 64)),
    "densenet40_k12": Model(
        models.DenseNet,
        supervised_step(F.cross_entropy, lambda x: torch.arange(len(x)) % 10),
        (8, 3, 32, 32),
    ),
    "emulator_175": Model(
        models.Emulator, supervised_step(F.mse_loss, Tensor.clone), (1, 16, 64, 128)
    ),
    "biggan_128_D_ch96": Model(
        lambda: models.ResNetDiscriminator(
            (96, 192, 384, 768, 1536, 1536), 5, attention=True, classes=1000
        ),
        gan_step,
        (2, 3, 128, 128),
        lambda: models.BigGANGenerator((1536, 1536, 768, 384, 192, 96), 120),
        normalize_generator=True,
        long=True,
    ),
}


def make_step(spec: Model, how: How) -> Step:
    """The training step of a model, on its device."""
    torch.manual_seed(0)
    with how.device:
        return spec.step(spec, wrap(spec.make(), how), how)
