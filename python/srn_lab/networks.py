"""SNGAN's residual generator and discriminator, scaled down to 8, 16 or 32 pixels.

The layout follows the CIFAR-10 networks that the paper trains (Section 4.2; Miyato et al. 2018,
Table 4): residual blocks, batch normalisation in the generator only, ReLU, global sum pooling and a
dense layer with one output. At 32 pixels the block counts are exactly SNGAN's. Neither network
normalises its weights: :mod:`srn_lab.normalisation` does that from outside.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

RESOLUTIONS = (8, 16, 32)
_BASE = 4  # side of the generator's first feature map


def _conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    nn.init.xavier_uniform_(conv.weight, gain=math.sqrt(2))
    nn.init.zeros_(conv.bias)
    return conv


def _conv1x1(channels_in: int, channels_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, 1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _linear(features_in: int, features_out: int) -> nn.Linear:
    linear = nn.Linear(features_in, features_out)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class UpBlock(nn.Module):
    """Residual block that doubles the side: (B, C, H, H) -> (B, C, 2H, 2H)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv3x3(channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.shortcut = _conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x)), scale_factor=2, mode="nearest")
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        # A 1x1 convolution commutes with nearest upsampling; before it, it costs a quarter.
        return h + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest")


class DownBlock(nn.Module):
    """Residual block of the discriminator: (B, C_in, H, H) -> (B, C_out, H / 2 or H, same).

    ``first`` leaves out the leading ReLU, which would discard the negative half of an image.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, downsample: bool, first: bool = False
    ) -> None:
        super().__init__()
        self.first = first
        self.downsample = downsample
        self.conv1 = _conv3x3(channels_in, channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        learned_shortcut = downsample or channels_in != channels_out
        self.shortcut = _conv1x1(channels_in, channels_out) if learned_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if not self.downsample:
            return h + self.shortcut(x)
        # Average pooling commutes with the 1x1 convolution as well.
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


class Generator(nn.Module):
    """Latent (B, latent) -> image (B, channels, resolution, resolution) in (-1, 1)."""

    def __init__(
        self, resolution: int = 8, *, width: int = 64, latent: int = 64, channels: int = 1
    ) -> None:
        super().__init__()
        _check_sizes(resolution, width=width, latent=latent, channels=channels)
        self.latent = latent
        self.width = width
        self.dense = _linear(latent, width * _BASE * _BASE)
        ups = int(math.log2(resolution // _BASE))
        self.blocks = nn.Sequential(*(UpBlock(width) for _ in range(ups)))
        self.norm = nn.BatchNorm2d(width)
        self.to_image = _conv3x3(width, channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.dense(z).view(-1, self.width, _BASE, _BASE)
        return self.to_image(F.relu(self.norm(self.blocks(h)))).tanh()


class Discriminator(nn.Module):
    """Image (B, channels, resolution, resolution) -> one logit an image, (B,).

    One (8 pixels) or two down blocks, two blocks at constant side, ReLU, sum over positions, dense.
    """

    def __init__(self, resolution: int = 8, *, width: int = 64, channels: int = 1) -> None:
        super().__init__()
        _check_sizes(resolution, width=width, channels=channels)
        blocks = [DownBlock(channels, width, downsample=True, first=True)]
        if resolution > 8:
            blocks.append(DownBlock(width, width, downsample=True))
        blocks += [DownBlock(width, width, downsample=False) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.dense = _linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.blocks(x)).sum(dim=(2, 3))
        return self.dense(features).squeeze(1)


def _check_sizes(resolution: int, **positive: int) -> None:
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution must be one of {RESOLUTIONS}, got {resolution}")
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
