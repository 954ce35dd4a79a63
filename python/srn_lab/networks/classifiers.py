"""Classifiers for 32x32 images by name, and a small DenseNet for CPUs.

They are the CIFAR forms of their papers. No package that installs beside every build of torch has
them: the well-known ones are ImageNet's. The small DenseNet takes any side of at least 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Block = Callable[..., nn.Module]


def _conv(channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class _Composite(nn.Module):
    """Batch norm, ReLU, convolution, dropout: the unit of a DenseNet."""

    def __init__(self, channels_in: int, channels_out: int, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.conv = _conv(channels_in, channels_out, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(F.relu(self.norm(x))))


class DenseNet(nn.Module):
    """DenseNet (Huang et al. 2017) in three blocks: 40 layers, growth 12 is the paper's.

    ``first`` channels leave the first convolution; ``dropout`` follows every convolution but it.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        *,
        depth: int = 40,
        growth: int = 12,
        first: int = 24,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f"depth must be 3 n + 4 with n >= 1, got {depth}")
        width = first
        self.stem = _conv(channels, width)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for block in range(3):
            layers = []
            for _ in range((depth - 4) // 3):
                layers.append(_Composite(width, growth, 3, dropout))
                width += growth
            self.blocks.append(nn.ModuleList(layers))
            if block < 2:
                self.transitions.append(_Composite(width, width, 1, dropout))
        self.norm = nn.BatchNorm2d(width)
        self.num_features = width
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, (B, num_features)."""
        h = self.stem(x)
        for index, block in enumerate(self.blocks):
            for layer in block:
                h = torch.cat([h, layer(h)], dim=1)
            if index < len(self.transitions):
                h = F.avg_pool2d(self.transitions[index](h), 2)
        return F.relu(self.norm(h)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class _Basic(nn.Module):
    """ResNet's block for CIFAR; where the shape changes the shortcut is subsampled and padded."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels_in, channels_out, 3, stride), _bn(channels_out)
        self.conv2, self.norm2 = _conv(channels_out, channels_out), _bn(channels_out)
        self.stride, self.padding = stride, channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(h + shortcut)


class _Wide(nn.Module):
    """The pre-activated block of a wide ResNet (Zagoruyko and Komodakis 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _bn(channels_in), _conv(channels_in, channels_out, 3, stride)
        self.norm2, self.conv2 = _bn(channels_out), _conv(channels_out, channels_out)
        self.dropout = nn.Dropout(dropout)
        same = channels_in == channels_out
        self.shortcut = None if same else _conv(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(h)))))
        return shortcut + h


class _Stages(nn.Module):
    """A stem, three stages of equal blocks at sides 32, 16, 8, the mean over positions, a head."""

    def __init__(
        self,
        block: Block,
        widths: tuple[int, int, int],
        blocks: int,
        classes: int,
        channels: int,
        *,
        norm_last: bool,
    ) -> None:
        super().__init__()
        self.stem, self.stem_norm = _conv(channels, 16), nn.Identity() if norm_last else _bn(16)
        stages, width = [], 16
        for stage, wide in enumerate(widths):
            for index in range(blocks):
                stages.append(block(width, wide, 2 if stage and not index else 1))
                width = wide
        self.stages = nn.Sequential(*stages)
        self.last_norm = _bn(width) if norm_last else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h if isinstance(self.stem_norm, nn.Identity) else F.relu(self.stem_norm(h))
        return self.head(F.relu(self.last_norm(self.stages(h))).mean(dim=(2, 3)))


def resnet110(classes: int, channels: int = 3) -> nn.Module:
    """ResNet-110 (He et al. 2016): 18 blocks of 16, 32 and 64 channels."""
    return _Stages(_Basic, (16, 32, 64), 18, classes, channels, norm_last=False)


def wrn_28_10(classes: int, channels: int = 3, dropout: float = 0.3) -> nn.Module:
    """WRN-28-10 (Zagoruyko and Komodakis 2016): 4 blocks of 160, 320 and 640 channels."""

    def block(channels_in: int, channels_out: int, stride: int) -> nn.Module:
        return _Wide(channels_in, channels_out, stride, dropout)

    return _Stages(block, (160, 320, 640), 4, classes, channels, norm_last=True)


def vgg19_bn(classes: int, channels: int = 3) -> nn.Module:
    """VGG-19 with batch norm and one dense layer, the form used for 32x32 images."""
    layers: list[nn.Module] = []
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), _bn(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))


def alexnet(classes: int, channels: int = 3) -> nn.Module:
    """AlexNet's five convolutions and one dense layer, the form used for 32x32 images."""
    return nn.Sequential(
        nn.Conv2d(channels, 64, 11, stride=4, padding=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def small_densenet(classes: int, channels: int = 3, dropout: float = 0.2) -> nn.Module:
    """A DenseNet of 10 layers, growth 8, for CPUs."""
    return DenseNet(classes, channels, depth=10, growth=8, first=16, dropout=dropout)


def _bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "densenet40": DenseNet,
    "resnet110": resnet110,
    "wrn-28-10": wrn_28_10,
    "vgg19-bn": vgg19_bn,
    "alexnet": alexnet,
    "small-densenet": small_densenet,
}


def classifier(name: str, classes: int, channels: int = 3) -> nn.Module:
    """A classifier by name; logits (B, classes)."""
    if name not in CLASSIFIERS:
        raise ValueError(f"network must be one of {', '.join(CLASSIFIERS)}, got {name!r}")
    return CLASSIFIERS[name](classes, channels)
