"""The network whose features IS, FID, KID and Intra-FID compare.

``lab``: a classifier that the lab trains once on the data set; its accuracy belongs beside every
number. ``inception``: torch-fidelity's Inception-v3, the literature's, weights by path or download.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from srn_lab.files import write_atomically
from srn_lab.measures.spectra import evaluating
from srn_lab.networks.classifiers import classifier


class FeatureError(RuntimeError):
    """Features that cannot be had here; says why and what to do."""


@dataclass(frozen=True)
class Features:
    """A network that turns images into features and class probabilities."""

    name: str
    network: nn.Module
    accuracy: float | None
    """Of the lab's classifier on held-out images; Inception's data is not here."""

    def __call__(self, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
        """Features (N, d) and class logits (N, classes) of images in [-1, 1], on the CPU."""
        device = next(self.network.parameters()).device
        features, logits = [], []
        with evaluating(self.network):
            for part in images.split(batch):
                found = self.network(part.to(device))
                features.append(found[0].float().cpu())
                logits.append(found[1].float().cpu())
        return torch.cat(features), torch.cat(logits)

    @property
    def stated(self) -> str:
        """For captions."""
        if self.accuracy is None:
            return self.name
        return f"{self.name} (accuracy {100 * self.accuracy:.1f} %)"


class _LabFeatures(nn.Module):
    """What the last layer of a classifier sees, and its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(images)
        return features, self.network.head(features)


def lab_features(network: nn.Module, accuracy: float) -> Features:
    """Features of a trained DenseNet of :mod:`srn_lab.networks.classifiers`."""
    return Features("lab classifier", _LabFeatures(network), accuracy)


def save_lab_features(path: Path, network: nn.Module, accuracy: float, about: dict) -> Path:
    """Keep a trained classifier; ``about`` is what :func:`load_lab_features` will compare."""
    content = io.BytesIO()
    torch.save({"state": network.state_dict(), "accuracy": accuracy, "about": about}, content)
    return write_atomically(path, content.getvalue())


def load_lab_features(path: Path, about: dict, name: str, classes: int, channels: int) -> Features:
    """The features that :func:`save_lab_features` kept."""
    kept = torch.load(path, weights_only=True)
    if kept["about"] != about:
        raise FeatureError(f"{path} is a classifier of another configuration; remove it")
    network = classifier(name, classes, channels)
    network.load_state_dict(kept["state"])
    return lab_features(network, kept["accuracy"])


class _Inception(nn.Module):
    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        return self.extractor(pixels)


def inception_features(weights: str | None = None) -> Features:
    """Inception-v3 exactly as torch-fidelity has it; ``weights`` names its file, None downloads."""
    if weights is not None and not Path(weights).is_file():
        raise FeatureError(f"Inception weights: {weights} does not exist")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        # A torchvision of another torch raises RuntimeError when it registers its operators.
        raise FeatureError(
            f"features inception need torch-fidelity, and the torchvision made for this torch: "
            f"{error}. pip install srn_lab[inception], or use features lab"
        ) from error
    extractor = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )
    return Features("Inception-v3", _Inception(extractor), None)
