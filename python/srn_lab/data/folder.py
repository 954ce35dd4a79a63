"""A folder of images; its subfolders, where it has any, are the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from srn_lab.data.images import Images, MissingDataError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


def image_folder(root: Path, resolution: int) -> Images:
    """RGB images cropped to the middle square and resized; sorted by path."""
    if not root.is_dir():
        raise MissingDataError(f"data set folder: {root} is not a folder; name one with --root")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise MissingDataError(f"data set folder: no {', '.join(sorted(_SUFFIXES))} under {root}")
    classes = sorted({path.parent.name for path in paths if path.parent != root}) or [""]
    pixels, labels = [], []
    for path in paths:
        try:
            image = Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"data set folder: {path} cannot be read: {error}") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels.append(classes.index(path.parent.name) if path.parent.name in classes else 0)
    return Images("folder", torch.stack(pixels), torch.tensor(labels), len(classes))
