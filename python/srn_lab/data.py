"""The 1797 handwritten digits that ship with scikit-learn, 8x8 grey pixels: no download."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

NATIVE_RESOLUTION = 8
_LARGEST_PIXEL = 16.0


def digits(resolution: int = NATIVE_RESOLUTION) -> Tensor:
    """All images as float32 (1797, 1, resolution, resolution) in [-1, 1].

    Above 8 pixels they are bilinearly upsampled.
    """
    if resolution < NATIVE_RESOLUTION:
        raise ValueError(f"resolution must be at least {NATIVE_RESOLUTION}, got {resolution}")
    pixels = torch.from_numpy(load_digits().images).float()
    images = (pixels / _LARGEST_PIXEL * 2 - 1).unsqueeze(1)
    if resolution == NATIVE_RESOLUTION:
        return images
    size = (resolution, resolution)
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def batches(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches (batch_size, ...): reshuffled every epoch, an incomplete last one dropped.

    The order depends on ``generator`` alone.
    """
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"batch_size must be in 1..{len(images)}, got {batch_size}")
    while True:
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch_size + 1, batch_size):
            yield images[order[start : start + batch_size]]
