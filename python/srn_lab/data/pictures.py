"""Grids of generated images as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from srn_lab.files import write_atomically


def sample_grid(path: Path, images: Tensor, side: int = 8, scale: int = 2) -> Path:
    """The first ``side`` x ``side`` images (N, C, H, W) in [-1, 1], enlarged ``scale`` times."""
    tiled = tiles(images[: side * side], side)
    picture = Image.fromarray(((tiled + 1) * 127.5).round().clip(0, 255).astype(np.uint8))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BOX)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return write_atomically(path, content.getvalue())


def tiles(images: Tensor, side: int) -> np.ndarray:
    """Images (N, C, H, W) in rows of ``side``: (rows * H, side * W), or with 3 channels last."""
    count, channels, height, width = images.shape
    rows = -(-count // side)
    padded = images.new_zeros(rows * side, channels, height, width)
    padded[:count] = images
    grid = padded.view(rows, side, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, side * width, channels)
    return (grid.squeeze(2) if channels == 1 else grid).numpy()
