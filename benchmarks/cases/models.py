"""Whole models with their real forward; steps.py trains them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose gain and bias are linear in a condition."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Linear(condition, channels, bias=False)
        self.bias = nn.Linear(condition, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        return self.norm(x) * gain[..., None, None] + bias[..., None, None]


class GeneratorBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut, both sides at twice the resolution."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(inputs, condition)
        self.norm2 = ConditionalBatchNorm(outputs, condition)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2.0)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), condition)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2.0))


class BigGANGenerator(nn.Module):
    """A class-conditional generator that feeds a part of z to every block.

    Attention, if any, comes before the last block. Source: Brock et al. 2019 (arXiv 1809.11096).
    """

    plain = ("embedding",)  # shared by all blocks, not normalised

    def __init__(
        self, channels: Sequence[int], latent: int, embedding: int = 128, classes: int = 1000
    ) -> None:
        super().__init__()
        self.latent = latent // len(channels) * len(channels)
        part = self.latent // len(channels)
        self.embedding = nn.Embedding(classes, embedding)
        self.first = nn.Linear(part, channels[0] * 16)
        pairs = list(itertools.pairwise(channels))
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, part + embedding) for a, b in pairs)
        self.attention = SelfAttention(channels[-2])
        self.norm = nn.BatchNorm2d(channels[-1])
        self.last = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        first, *parts = z.chunk(len(self.blocks) + 1, 1)
        labels = torch.arange(len(z), device=z.device) % self.embedding.num_embeddings
        shared = self.embedding(labels)
        h = self.first(first).unflatten(1, (-1, 4, 4))
        for i, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            if i == len(self.blocks) - 1:
                h = self.attention(h)
            h = block(h, torch.cat([shared, part], 1))
        return torch.tanh(self.last(F.relu(self.norm(h))))


class ResNetGenerator(nn.Module):
    """SNGAN's generator for 32x32 images, which its authors do not normalise (arXiv 1802.05957)."""

    def __init__(self, channels: int = 256, latent: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.latent = latent
        self.first = nn.Linear(latent, channels * 16)
        self.blocks = nn.ModuleList(GeneratorBlock(channels, channels, 1) for _ in range(blocks))
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z).unflatten(1, (-1, 4, 4))
        for block in self.blocks:
            h = block(h, z[:, :1])
        return torch.tanh(self.last(F.relu(self.norm(h))))


class DenseNet(nn.Module):
    """Every layer of a block sees all before it (Huang et al. 2017, arXiv 1608.06993)."""

    def __init__(self, layers: int = 12, growth: int = 12, channels: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for stage in range(3):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(self.layer(channels, growth, 3))
                channels += growth
            self.stages.append(block)
            if stage < 2:
                self.stages.append(self.layer(channels, channels, 1))
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 10)

    @staticmethod
    def layer(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for stage in self.stages:
            if isinstance(stage, nn.ModuleList):
                for layer in stage:
                    x = torch.cat([x, layer(x)], 1)
            else:
                x = F.avg_pool2d(stage(x), 2)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class MixingBlock(nn.Module):
    """Attention with linear projections, then a feed-forward of 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm1(x).permute(0, 2, 3, 1)  # attention along each row of the grid
        q, k, v = self.qkv(rows).chunk(3, -1)
        mixed = self.proj(F.scaled_dot_product_attention(q, k, v))
        x = x + mixed.permute(0, 3, 1, 2)
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Emulator(nn.Module):
    """A U-shaped weather emulator: next state of a grid from the present one.

    Linear, Conv2d and ConvTranspose2d weights in the mix and number (175) that the users of such
    models normalise, at widths that a CPU steps through.
    """

    def __init__(
        self,
        variables: int = 16,
        widths: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (8, 8, 16, 8),
    ) -> None:
        super().__init__()
        self.down, self.stages = nn.ModuleList(), nn.ModuleList()
        before = variables
        for width, depth in zip(widths, depths, strict=True):
            # Two window sizes side by side, as in cross-scale embedding.
            sizes = (nn.Conv2d(before, width // 2, k, 2, k // 2 - 1) for k in (2, 4))
            self.down.append(nn.ModuleList(sizes))
            self.stages.append(nn.Sequential(*(MixingBlock(width) for _ in range(depth))))
            before = width
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(nn.Conv2d(2 * b, b, 3, padding=1) for _, b in pairs)
        self.last = nn.ConvTranspose2d(widths[0], variables, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        state, skips = x, []
        for sizes, stage in zip(self.down, self.stages, strict=True):
            x = stage(torch.cat([conv(x) for conv in sizes], 1))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return state + self.last(x)
