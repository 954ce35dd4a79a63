"""The units of work: one training run or one computation each, with everything measured on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from srn_lab.data import load
from srn_lab.data.pictures import sample_grid
from srn_lab.measures import (
    PairKind,
    active_layers,
    complexity,
    draw_pairs,
    jacobian_norms,
    log_product_of_norms,
    roughness,
    slopes,
    spectra,
)
from srn_lab.measures.divergence import DivergenceConfig, neural_divergence
from srn_lab.measures.features import (
    Features,
    inception_features,
    load_lab_features,
    save_lab_features,
)
from srn_lab.measures.scores import fid, inception_score, intra_fid, kid
from srn_lab.training.classifier import train_classifier
from srn_lab.training.config import ClassifierConfig, GanConfig, to_dict
from srn_lab.training.engine import is_main, wait_for_everyone
from srn_lab.training.gan import Gan, train_gan

RESULT_VERSION = 1
"""Part of every key: raised when the meaning of a result changes, so that old rows do not count."""

_BINS = 40
_CURVE = 60  # points of a stored curve


@dataclass(frozen=True)
class Place:
    """Where a unit may write, and how it says how far it is."""

    folder: Path
    features: Path
    progress: Callable[[float], None] = lambda fraction: None
    download: bool = False


class Unit(Protocol):
    """What the store caches. ``slot`` names the part it plays in experiments, without the seed."""

    slot: str
    seed: int
    cost: float

    def describe(self) -> dict: ...

    def run(self, place: Place) -> dict: ...


def key(unit: Unit) -> str:
    """Equal for equal configurations of the unit and of everything measured on it."""
    text = json.dumps([RESULT_VERSION, type(unit).__name__, unit.describe()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(config: object) -> dict:
    """A configuration without the paths, which differ from machine to machine."""
    return _without(to_dict(config), ("root", "inception_weights"))


def _without(values: dict, names: tuple[str, ...]) -> dict:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in names
    }


@dataclass(frozen=True)
class GanMeasures:
    """How much is measured on a GAN. ``features`` None: Inception, from ``inception_weights``."""

    pairs: int = 2000
    images: int = 2000
    """Real images, and generated ones, of FID, KID, Intra-FID and the inception score."""
    jacobian_images: int = 256
    score_splits: int = 10
    divergence: DivergenceConfig | None = field(default_factory=DivergenceConfig)
    features: ClassifierConfig | None = None
    inception_weights: str | None = None


@dataclass(frozen=True)
class FeatureUnit:
    """The lab's feature network of one data set."""

    config: ClassifierConfig
    slot: str = "features"
    cost: float = 1.0

    @property
    def seed(self) -> int:
        return self.config.seed

    def describe(self) -> dict:
        return _described(self.config)

    def path(self, folder: Path) -> Path:
        """Its file under ``folder``."""
        return folder / f"{key(self)}.pt"

    def run(self, place: Place) -> dict:
        epochs = self.config.epochs
        trainer = train_classifier(
            self.config,
            place.folder,
            on_epoch=lambda epoch: place.progress(epoch / epochs),
            record_every=epochs,
            download=place.download,
        )
        accuracy = trainer.curves[-1]["test_accuracy"]
        path = self.path(place.features)
        if is_main():
            save_lab_features(path, trainer.network, accuracy, self.describe())
        wait_for_everyone()
        return {"accuracy": accuracy, "curves": trainer.curves}


@dataclass(frozen=True)
class GanUnit:
    """One GAN trained and measured."""

    config: GanConfig
    measures: GanMeasures
    slot: str
    cost: float = 1.0

    @property
    def seed(self) -> int:
        return self.config.seed

    def describe(self) -> dict:
        return {"config": _described(self.config), "measures": _described(self.measures)}

    @property
    def features(self) -> FeatureUnit | None:
        """What has to be there first."""
        config = self.measures.features
        return None if config is None else FeatureUnit(config, f"features/{config.data.name}")

    def run(self, place: Place) -> dict:
        features = self._features(place)  # first: what is missing shows before hours of training
        steps = max(self.config.steps, 1)
        # Measuring takes a few percent of what training takes.
        trainer = train_gan(
            self.config,
            place.folder,
            on_step=lambda record: place.progress(0.95 * record.step / steps),
            on_samples=lambda step, x: _picture(place.folder / f"samples-{step:06d}.png", x),
            samples_every=max(1, steps // 4),
            download=place.download,
        )
        gan = trainer.evaluated
        samples, _ = gan.sample(64, torch.Generator().manual_seed(0))
        _picture(place.folder / "samples.png", samples)
        losses = [record["loss_d"] for record in trainer.history.steps]
        return {
            **measure_gan(gan, self.measures, features),
            "roughness": roughness(losses) if len(losses) >= 4 else None,
            "curve": {name: _thinned(trainer.history.steps, name) for name in ("step", "loss_d")},
        }

    def _features(self, place: Place) -> Features:
        if self.features is None:
            return inception_features(self.measures.inception_weights)
        data, needed = load(self.config.data), self.features
        return load_lab_features(
            needed.path(place.features),
            needed.describe(),
            needed.config.network,
            data.classes,
            data.shape[0],
        )


def _picture(path: Path, images: Tensor) -> None:
    if is_main():
        sample_grid(path, images)


def measure_gan(gan: Gan, how: GanMeasures, features: Features) -> dict:
    """Every measure of one GAN, in plain numbers; draws depend on the GAN's seed alone."""
    config = gan.config
    random = torch.Generator().manual_seed(config.seed)
    train, test = load(config.data), load(config.data, "test")
    chosen = torch.randperm(len(train), generator=random)[: how.images]
    real, real_labels = train.take(chosen)
    fake, fake_labels = gan.sample(how.images, random)
    result: dict = {"elhist": {}, "jacobian": {}}
    both_labels = (real_labels, fake_labels)
    for kind in PairKind:
        x, y, drawn = draw_pairs(
            real, fake, kind, how.pairs, random, both_labels if config.conditional else None
        )
        found = slopes(gan.discriminator, x, y, None if drawn is None else (drawn, drawn))
        result["elhist"][kind.value] = {**found.summary(), "histogram": histogram(found.values)}
    for name, images, labels in (("real", real, real_labels), ("fake", fake, fake_labels)):
        conditions = labels[: how.jacobian_images] if config.conditional else None
        norms = jacobian_norms(gan.discriminator, images[: how.jacobian_images], conditions)
        result["jacobian"][name] = {
            "mean": norms.mean().item(),
            "percentile_95": torch.quantile(norms, 0.95).item(),
            "histogram": histogram(norms),
        }
    layers = spectra(gan.discriminator)
    result["log_product_of_norms"] = log_product_of_norms(gan.discriminator)
    result["layers"] = [dataclasses.asdict(layer) for layer in layers]
    result["active"] = active_layers(layers, config.method)
    result["scores"] = _scores(real, real_labels, fake, fake_labels, how, features, config)
    result["features"] = {"name": features.name, "accuracy": features.accuracy}
    if how.divergence is not None:
        result["divergence"] = neural_divergence(
            test.images,
            lambda count, r: gan.sample(count, r)[0],
            how.divergence,
            seed=config.seed,
            device=next(gan.generator.parameters()).device,
        )
    return result


def _scores(
    real: Tensor,
    real_labels: Tensor,
    fake: Tensor,
    fake_labels: Tensor,
    how: GanMeasures,
    features: Features,
    config: GanConfig,
) -> dict[str, float]:
    of_real, _ = features(real)
    of_fake, logits = features(fake)
    mean, deviation = inception_score(logits, how.score_splits)
    scores = {
        "fid": fid(of_real, of_fake),
        "kid": kid(of_real, of_fake),
        "inception_score": mean,
        "inception_score_deviation": deviation,
    }
    if config.conditional:
        scores["intra_fid"] = intra_fid(of_real, real_labels, of_fake, fake_labels)
    return scores


@dataclass(frozen=True)
class ClassifierUnit:
    """One classifier trained, its gap followed and its sample complexity measured at the end."""

    config: ClassifierConfig
    slot: str
    record_every: int = 1
    complexity_images: int = 500
    cost: float = 1.0

    @property
    def seed(self) -> int:
        return self.config.seed

    def describe(self) -> dict:
        return {
            "config": _described(self.config),
            "record_every": self.record_every,
            "complexity_images": self.complexity_images,
        }

    def run(self, place: Place) -> dict:
        config = self.config
        trainer = train_classifier(
            config,
            place.folder,
            on_epoch=lambda epoch: place.progress(0.95 * epoch / config.epochs),
            record_every=self.record_every,
            download=place.download,
        )
        last = trainer.curves[-1]
        part = trainer.train.subset(torch.arange(min(self.complexity_images, len(trainer.train))))
        result = {
            **{name: value for name, value in last.items() if name != "epoch"},
            "gap_accuracy": abs(last["train_accuracy"] - last["test_accuracy"]),
            "gap_loss": abs(last["train_loss"] - last["test_loss"]),
            "curves": trainer.curves,
            "layers": [dataclasses.asdict(layer) for layer in spectra(trainer.network)],
        }
        # Margins over the training images, as in the bounds; a network may have none above 0.
        try:
            found = complexity(trainer.network, part.images, part.labels)
        except ValueError as error:
            return {**result, "complexity": None, "complexity_missing": str(error)}
        return {**result, "complexity": found.summary()}


def histogram(values: Tensor) -> dict:
    """Counts of ``values`` in equal bins from 0 to their largest."""
    top = max(values.max().item(), 1e-12)
    return {"top": top, "counts": torch.histc(values, _BINS, 0, top).int().tolist()}


def _thinned(records: list[dict], name: str) -> list[float]:
    """A curve as means over equal spans, at most ``_CURVE`` of them."""
    values = [record[name] for record in records]
    span = max(1, math.ceil(len(values) / _CURVE))
    parts = [values[i : i + span] for i in range(0, len(values), span)]
    return [float(f"{sum(part) / len(part):.6g}") for part in parts]
