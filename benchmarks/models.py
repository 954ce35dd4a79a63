"""Whole discriminators with their real forward, and the training step that is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import srn_kernels as srn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, each side halving the resolution if asked."""

    def __init__(self, inputs: int, outputs: int, downsample: bool, first: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        learned = downsample or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if learned else nn.Identity()
        self.downsample, self.first = downsample, first

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first else F.relu(x)
        h = self.conv2(F.relu(self.conv1(h)))
        if self.downsample:
            # 1x1 convolutions and averaging commute: the shortcut averages first.
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.shortcut(x)


class SelfAttention(nn.Module):
    """Attention over positions, its keys and values pooled, behind a learned gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.output = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2).transpose(1, 2)
        key = F.max_pool2d(self.key(x), 2).flatten(2).transpose(1, 2)
        value = F.max_pool2d(self.value(x), 2).flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        attended = attended.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.gate * self.output(attended)


class ResNetDiscriminator(nn.Module):
    """Residual blocks, a sum over positions and a linear head; labels by projection.

    ``downsamples`` of the blocks halve the resolution, those in front. Attention, if any, follows
    the first block. Sources: Miyato et al. 2018 (arXiv 1802.05957), Brock et al. 2019
    (arXiv 1809.11096).
    """

    def __init__(
        self, channels: Sequence[int], downsamples: int, attention: bool = False, classes: int = 0
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip((3, *channels), channels, strict=False)):
            blocks.append(ResidualBlock(inputs, outputs, i < downsamples, first=i == 0))
            if attention and i == 0:
                blocks.append(SelfAttention(outputs))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], 1)
        self.embedding = nn.Embedding(classes, channels[-1]) if classes else None

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.blocks(x)).sum((2, 3))
        score = self.head(features)
        if self.embedding is not None:
            labels = torch.arange(len(x), device=x.device) % self.embedding.num_embeddings
            score = score + (self.embedding(labels) * features).sum(1, keepdim=True)
        return score


class UNetDiscriminator(nn.Module):
    """A score for every pixel, with skip connections (Wang et al. 2021, arXiv 2107.10833)."""

    plain = ("first", "last")  # the two layers that are not normalised

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        n = features
        self.first = nn.Conv2d(3, n, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(n << i, n << i + 1, 4, stride=2, padding=1, bias=False) for i in range(3)
        )
        self.up = nn.ModuleList(
            nn.Conv2d(n << i + 1, n << i, 3, padding=1, bias=False) for i in (2, 1, 0)
        )
        self.tail = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, bias=False) for _ in range(2))
        self.last = nn.Conv2d(n, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.2)
        skips = []
        for conv in self.down:
            skips.append(x)
            x = F.leaky_relu(conv(x), 0.2)
        for conv, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = F.leaky_relu(conv(x), 0.2) + skip
        for conv in self.tail:
            x = F.leaky_relu(conv(x), 0.2)
        return self.last(x)


@dataclass(frozen=True)
class Model:
    """A workload's discriminator and the images of one step."""

    make: Callable[[], nn.Module]
    batch: int
    resolution: int


MODELS = {
    "sngan_cifar_resnet_D": Model(lambda: ResNetDiscriminator((128,) * 4, 2), 16, 32),
    "real_esrgan_unet_D": Model(UNetDiscriminator, 2, 64),
    "biggan_128_D_ch96": Model(
        lambda: ResNetDiscriminator(
            (96, 192, 384, 768, 1536, 1536), 5, attention=True, classes=1000
        ),
        2,
        128,
    ),
}
NORMALIZED_TYPES = (nn.Linear, nn.Conv2d, nn.Embedding)


def normalized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that the model's authors normalise."""
    left_out = getattr(model, "plain", ())
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, NORMALIZED_TYPES) and name not in left_out
    }


def wrap(model: nn.Module, provider: str, rank_ratio: float | None) -> nn.Module:
    """The model, normalised by one of STEP_PROVIDERS."""
    layers = normalized_layers(model)
    if provider == "torch_sn":
        for layer in layers.values():
            spectral_norm(layer)
    elif provider == "module":
        srn.apply_stable_rank_norm(
            model, rank_ratio, include=list(layers), layer_types=NORMALIZED_TYPES, backend="cpu"
        )
    elif provider != "plain":
        raise ValueError(f"provider must be one of {STEP_PROVIDERS}, got {provider!r}")
    return model


STEP_PROVIDERS = ("plain", "torch_sn", "module")


def make_step(name: str, provider: str, rank_ratio: float | None) -> Callable[[], None]:
    """The discriminator's training step: two forwards, hinge loss, one backward, Adam."""
    spec = MODELS[name]
    torch.manual_seed(0)
    model = wrap(spec.make(), provider, rank_ratio)
    # A tiny rate: the step is timed, and must stay finite without normalisation too.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.0, 0.9))
    shape = (spec.batch, 3, spec.resolution, spec.resolution)
    real, fake = torch.rand(shape) * 2 - 1, torch.rand(shape) * 2 - 1

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.relu(1 - model(real)).mean() + F.relu(1 + model(fake)).mean()
        loss.backward()
        optimizer.step()

    return step
