"""CIFAR-10, CIFAR-100 and CelebA from the archives that their authors publish.

The readers are small and need no torchvision, whose builds load only beside one exact build of
torch; the files and folders are the ones torchvision keeps, so a root made by it serves here.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srn_lab.data.images import Images, MissingDataError, resized


@dataclass(frozen=True)
class _Cifar:
    archive: str
    folder: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label: bytes
    classes: int

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


CIFAR = {
    "cifar10": _Cifar(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        "c58f30108f718f92721af3b95e74349a",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        b"labels",
        10,
    ),
    "cifar100": _Cifar(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("train",),
        ("test",),
        b"fine_labels",
        100,
    ),
}

_CELEBA_ZIP, _CELEBA_PARTS = "img_align_celeba.zip", "list_eval_partition.txt"
_CELEBA_CROP = 108  # pixels about the middle, as in DCGAN and its successors


def cifar(name: str, part: str, root: Path, resolution: int, *, download: bool) -> Images:
    """``part`` "train" or "test" of CIFAR, from the folder or the archive under ``root``."""
    spec = CIFAR[name]
    archive = root / spec.archive
    if not (root / spec.folder).is_dir() and not archive.is_file():
        if not download:
            raise MissingDataError(
                f"data set {name}: neither {root / spec.folder} nor {archive} exists; "
                f"pass --download, or fetch {spec.url} into {root}"
            )
        _download(spec.url, archive, spec.md5)
    data, labels = [], []
    for member in spec.train if part == "train" else spec.test:
        with _member(root, spec, member) as file:
            batch = _PlainArrays(file, encoding="bytes").load()
        data.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels += batch[spec.label]
    pixels = resized(torch.from_numpy(np.concatenate(data)), resolution)
    return Images(name, pixels, torch.tensor(labels, dtype=torch.int64), spec.classes)


def celeba(part: str, root: Path, resolution: int, *, download: bool) -> Images:
    """CelebA's aligned faces, cropped to the middle 108 pixels; no classes."""
    folder = root / "celeba"
    archive, parts = folder / _CELEBA_ZIP, folder / _CELEBA_PARTS
    missing = [str(path) for path in (archive, parts) if not path.is_file()]
    if missing:
        how = "its authors' page gives them out by hand, --download cannot"
        raise MissingDataError(f"data set celeba: {' and '.join(missing)} missing; {how}")
    wanted = {"train": ("0", "1"), "test": ("2",)}[part]
    names = [
        line.split()[0]
        for line in parts.read_text().splitlines()
        if line.strip() and line.split()[1] in wanted
    ]
    with zipfile.ZipFile(archive) as images:
        pixels = torch.stack(
            [_face(images.read(f"img_align_celeba/{name}"), resolution) for name in names]
        )
    return Images("celeba", pixels, torch.zeros(len(names), dtype=torch.int64), 1)


def _face(encoded: bytes, resolution: int) -> Tensor:
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    left, top = (image.width - _CELEBA_CROP) // 2, (image.height - _CELEBA_CROP) // 2
    image = image.crop((left, top, left + _CELEBA_CROP, top + _CELEBA_CROP))
    image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def _member(root: Path, spec: _Cifar, member: str) -> Iterator[BinaryIO]:
    unpacked = root / spec.folder / member
    if (root / spec.folder).is_dir():
        if not unpacked.is_file():
            raise MissingDataError(f"{unpacked} is missing from an unpacked {spec.archive}")
        with unpacked.open("rb") as file:
            yield file
        return
    with tarfile.open(root / spec.archive) as archive:
        try:
            file = archive.extractfile(f"{spec.folder}/{member}")
        except KeyError as error:
            raise MissingDataError(f"{root / spec.archive} has no {member}") from error
        yield file


class _PlainArrays(pickle.Unpickler):
    """Reads what CIFAR's batches hold, NumPy arrays in dictionaries; a pickle may run no code."""

    _ARRAYS = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "ndarray", "dtype")
    )

    def find_class(self, module: str, name: str) -> type:
        # _codecs.encode is how Python 3 writes bytes in the old protocol of these files.
        if (module, name) not in self._ARRAYS | {("_codecs", "encode")}:
            raise pickle.UnpicklingError(f"a CIFAR batch needs no {module}.{name}")
        return super().find_class(module, name)


def _download(url: str, path: Path, md5: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with urllib.request.urlopen(url) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise MissingDataError(f"could not download {url} to {path}: {error}") from error
    found = hashlib.md5(partial.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        partial.unlink()
        raise MissingDataError(f"{url} has MD5 {found}, not the published {md5}")
    partial.rename(path)
