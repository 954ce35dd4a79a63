"""The one form in which every data set arrives, and what is done to pixels on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


class MissingDataError(FileNotFoundError):
    """A data set that is not where it was looked for; says where, and how to get it."""


@dataclass(frozen=True)
class Images:
    """One part of a data set."""

    name: str
    pixels: Tensor
    """uint8 (N, C, H, W): four times smaller than what the networks see."""
    labels: Tensor
    """int64 (N,) in 0..classes - 1; all 0 where the data has no classes."""
    classes: int

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise TypeError(f"pixels must be uint8 (N, C, H, W), got {self.pixels.shape}")
        if self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(f"{len(self.pixels)} images but labels {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return tuple(self.pixels.shape[1:])

    @property
    def images(self) -> Tensor:
        """All images, float32 in [-1, 1]."""
        return scaled(self.pixels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images (float32 in [-1, 1]) and labels at ``index``."""
        return scaled(self.pixels[index]), self.labels[index]

    def subset(self, index: Tensor) -> Images:
        """The part at ``index``."""
        return Images(self.name, self.pixels[index], self.labels[index], self.classes)


def scaled(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def resized(pixels: Tensor, resolution: int) -> Tensor:
    """uint8 (N, C, H, W) to a square of ``resolution`` pixels, bilinear; smaller: antialiased."""
    if pixels.shape[-2:] == (resolution, resolution):
        return pixels
    size = (resolution, resolution)
    shrinks = min(pixels.shape[-2:]) > resolution
    parts = [
        F.interpolate(part.float(), size=size, mode="bilinear", antialias=shrinks)
        for part in pixels.split(4096)
    ]
    return torch.cat(parts).round().clamp(0, 255).byte()


def held_out(images: Images, share: float = 0.2) -> Mapping[str, Images]:
    """Train and test parts of a set that has none: of every class the last ``share`` is held out.

    The order of the set decides, no random numbers: every run everywhere has the same parts.
    """
    test = torch.zeros(len(images), dtype=torch.bool)
    for label in range(images.classes):
        members = (images.labels == label).nonzero().flatten()
        test[members[len(members) - round(share * len(members)) :]] = True
    return {
        "train": images.subset((~test).nonzero().flatten()),
        "test": images.subset(test.nonzero().flatten()),
    }
