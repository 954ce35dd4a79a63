"""SN-GAN's residual generator and discriminator, with and without classes.

The layout is that of Miyato et al. (2018), Table 4, which the paper trains (Section 4.2): residual
blocks, batch normalisation in G only, ReLU, global sum pooling and a dense layer. At 32 pixels and
``width`` 128 (D), 256 (G) they are SN-GAN's CIFAR-10 networks; at 64 pixels channels double from
block to block as in Miyato and Koyama (2018); 8 and 16 pixels are the CIFAR-10 layout with fewer
blocks. Given ``classes``, G has class-conditional batch normalisation (Dumoulin et al. 2017) and D
projects its features on an embedding of the class (Miyato and Koyama 2018). Neither normalises its
weights: :class:`srn_lab.methods.Method` does that from outside, the embedding included.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn
from torch.nn import functional as F

RESOLUTIONS = (8, 16, 32, 64)
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


class ClassBatchNorm(nn.Module):
    """Batch normalisation whose scale and shift are looked up by class (Dumoulin et al. 2017)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Embedding(classes, channels)
        self.shift = nn.Embedding(classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scale, shift = self.scale(labels), self.shift(labels)
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class UpBlock(nn.Module):
    """Residual block that doubles the side: (B, C_in, H, H) -> (B, C_out, 2H, 2H)."""

    def __init__(self, channels_in: int, channels_out: int, classes: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels_in, classes), _norm(channels_out, classes)
        self.conv1 = _conv3x3(channels_in, channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.shortcut = _conv1x1(channels_in, channels_out)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        h = F.interpolate(F.relu(_normed(self.norm1, x, labels)), scale_factor=2, mode="nearest")
        h = self.conv2(F.relu(_normed(self.norm2, self.conv1(h), labels)))
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
    """Latent (B, latent), labels (B,) if ``classes`` -> (B, channels, side, side) in (-1, 1)."""

    def __init__(
        self,
        resolution: int = 32,
        *,
        width: int = 256,
        latent: int = 128,
        channels: int = 3,
        classes: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(resolution, width=width, latent=latent, channels=channels)
        self.latent, self.classes = latent, classes
        ups = int(math.log2(resolution // _BASE))
        factors = [2**i for i in range(ups, -1, -1)] if resolution == 64 else [1] * (ups + 1)
        widths = [width * factor for factor in factors]
        self.base = widths[0]
        self.dense = _linear(latent, widths[0] * _BASE * _BASE)
        self.blocks = nn.ModuleList(
            UpBlock(wide, narrow, classes) for wide, narrow in itertools.pairwise(widths)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = _conv3x3(widths[-1], channels)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.dense(z).view(-1, self.base, _BASE, _BASE)
        for block in self.blocks:
            h = block(h, labels)
        return self.to_image(F.relu(self.norm(h))).tanh()


class Discriminator(nn.Module):
    """Image (B, channels, side, side), and labels (B,) if ``classes`` -> one logit each, (B,)."""

    def __init__(
        self, resolution: int = 32, *, width: int = 128, channels: int = 3, classes: int = 0
    ) -> None:
        super().__init__()
        _check_sizes(resolution, width=width, channels=channels)
        self.classes = classes
        blocks = [DownBlock(channels, width, downsample=True, first=True)]
        last = width
        if resolution == 64:
            for _ in range(4):
                blocks.append(DownBlock(last, 2 * last, downsample=True))
                last *= 2
        else:
            if resolution > 8:
                blocks.append(DownBlock(width, width, downsample=True))
            blocks += [DownBlock(width, width, downsample=False) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.dense = _linear(last, 1)
        if classes:
            self.embedding = nn.Embedding(classes, last)
            nn.init.xavier_uniform_(self.embedding.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        features = F.relu(self.blocks(x)).sum(dim=(2, 3))
        logits = self.dense(features).squeeze(1)
        if self.classes:
            logits = logits + (self.embedding(labels) * features).sum(dim=1)
        return logits


def _norm(channels: int, classes: int) -> nn.Module:
    return ClassBatchNorm(channels, classes) if classes else nn.BatchNorm2d(channels)


def _normed(norm: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    return norm(x, labels) if isinstance(norm, ClassBatchNorm) else norm(x)


def _check_sizes(resolution: int, **positive: int) -> None:
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution must be one of {RESOLUTIONS}, got {resolution}")
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
