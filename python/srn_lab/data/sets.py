"""The data sets by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from srn_lab.data.archives import CIFAR, celeba, cifar
from srn_lab.data.bundled import digits, mnist5k
from srn_lab.data.folder import image_folder
from srn_lab.data.images import Images, MissingDataError, held_out

NAMES = ("digits", "mnist5k", *CIFAR, "celeba", "folder")

__all__ = ["NAMES", "DataSpec", "Images", "MissingDataError", "load"]


@dataclass(frozen=True)
class DataSpec:
    """Which images: a name of :data:`NAMES`, their side in pixels, and where files lie."""

    name: str = "mnist5k"
    resolution: int = 16
    root: str = "data"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"data must be one of {', '.join(NAMES)}, got {self.name!r}")
        least = 8 if self.name == "digits" else 4
        if self.resolution < least:
            raise ValueError(f"resolution must be at least {least}, got {self.resolution}")


@functools.lru_cache(maxsize=4)
def load(spec: DataSpec, part: str = "train", *, download: bool = False) -> Images:
    """Part "train" or "test". Bundled sets and folders hold out the last fifth of every class.

    Raises MissingDataError where files are missing, with where they were looked for and how to get
    them.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part must be train or test, got {part!r}")
    root = Path(spec.root)
    if spec.name in CIFAR:
        return cifar(spec.name, part, root, spec.resolution, download=download)
    if spec.name == "celeba":
        return celeba(part, root, spec.resolution, download=download)
    return _parts(spec)[part]


@functools.lru_cache(maxsize=2)
def _parts(spec: DataSpec) -> dict[str, Images]:
    if spec.name == "folder":
        return dict(held_out(image_folder(Path(spec.root), spec.resolution)))
    whole = {"digits": digits, "mnist5k": mnist5k}[spec.name](spec.resolution)
    return dict(held_out(whole))
