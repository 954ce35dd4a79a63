"""How large experiments are: ``smoke`` for tests, ``cpu`` for a laptop, ``gpu`` as the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from srn_lab.data import DataSpec
from srn_lab.experiments.units import ClassifierUnit, GanMeasures, GanUnit
from srn_lab.measures.divergence import DivergenceConfig
from srn_lab.methods import Loss, Method, Norm
from srn_lab.training.config import ClassifierConfig, GanConfig


@dataclass(frozen=True)
class Preset:
    """Data sets, sizes and numbers of seeds. Costs are seconds on one core, for the time left."""

    name: str
    seeds: int
    cheap_seeds: int
    """Of experiments whose units take less than a minute at preset cpu."""
    data: Mapping[str, DataSpec]
    """By role: "first" is the paper's CIFAR-10, "second" its CIFAR-100."""
    labels: Mapping[str, DataSpec]
    """The same for classification: "first" of the gap, "second" of further random labels."""
    gan: Mapping[str, Any]
    classifier: Mapping[str, Any]
    networks: tuple[str, ...]
    """The classifiers; the first is the one of Table 1 and Figure 1."""
    measures: GanMeasures
    features: Mapping[str, Any] | None
    points: int
    """Of a curve over epochs."""
    complexity_images: int = 500
    gan_cost: float = 1.0
    classifier_cost: float = 1.0
    shuffled: Mapping[str, Any] = field(default_factory=dict)
    """What differs from ``classifier`` where labels are shuffled."""

    def gan_unit(
        self, role: str, method: Method, seed: int, *, conditional: bool = False, half: bool = False
    ) -> GanUnit:
        """A GAN on the data set of ``role``; ``half``: converted half way."""
        values = dict(self.gan)
        if method.norm is Norm.WGAN_GP:
            values["loss"] = Loss.WASSERSTEIN
        if not method.trains:
            values["steps"] = 0
        config = GanConfig(
            data=self.data[role],
            method=method,
            conditional=conditional,
            seed=seed,
            convert_at=values["steps"] // 2 if half else None,
            **values,
        )
        features = None
        if self.features is not None:
            features = ClassifierConfig(
                data=self.data[role], method=Method(Norm.NONE), **self.features
            )
        measures = GanMeasures(
            **{**vars(self.measures), "features": features},
        )
        cost = self.gan_cost * (2 if method.norm is Norm.WGAN_GP else 1)
        return GanUnit(
            config,
            measures,
            f"gan/{role}/{config.label}",
            cost if method.trains else 0.2 * self.gan_cost,
        )

    def classifier_unit(
        self,
        role: str,
        method: Method,
        seed: int,
        *,
        random_labels: bool = False,
        network: str | None = None,
    ) -> ClassifierUnit:
        """A classifier on the data set of ``role``, labels true or shuffled."""
        config = ClassifierConfig(
            data=self.labels[role],
            method=method,
            network=network or self.networks[0],
            random_labels=random_labels,
            seed=seed,
            **{**self.classifier, **(self.shuffled if random_labels else {})},
        )
        task = "RAND" if random_labels else "CLS"
        return ClassifierUnit(
            config,
            f"classifier/{role}/{task}/{config.network}/{config.label}",
            # About as many points of a curve whatever the number of epochs.
            max(1, config.epochs // self.points),
            self.complexity_images,
            self.classifier_cost,
        )


# Each preset writes out all that its experiments depend on, so that the three read alike.
_SMOKE = Preset(
    name="smoke",
    seeds=1,
    cheap_seeds=1,
    data={"first": DataSpec("digits", 8), "second": DataSpec("mnist5k", 8)},
    labels={"first": DataSpec("digits", 8), "second": DataSpec("mnist5k", 8)},
    gan={
        "steps": 4,
        "n_dis": 1,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "width_d": 4,
        "width_g": 4,
        "latent": 4,
        "spectra_every": 2,
    },
    classifier={"epochs": 1, "batch_size": 16, "images": 48, "learning_rate": 0.05},
    networks=("small-densenet",),
    measures=GanMeasures(
        pairs=50,
        images=200,
        jacobian_images=16,
        score_splits=2,
        divergence=DivergenceConfig(steps=2, batch_size=8, width=4, batches=1),
    ),
    features={"network": "small-densenet", "epochs": 1, "images": 128, "batch_size": 32},
    points=1,
    complexity_images=48,
)

_CPU = Preset(
    name="cpu",
    seeds=3,
    cheap_seeds=5,
    data={"first": DataSpec("mnist5k", 16), "second": DataSpec("digits", 16)},
    labels={"first": DataSpec("mnist5k", 16), "second": DataSpec("digits", 8)},
    # Against the recipe: far fewer steps, so a higher rate and fewer steps of D for each of G.
    gan={
        "steps": 1000,
        "n_dis": 2,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "width_d": 16,
        "width_g": 16,
        "latent": 64,
        "spectra_every": 250,
    },
    classifier={"epochs": 40, "batch_size": 64, "images": 1000, "learning_rate": 0.1},
    # So few images that a network of this size can learn them by heart in the time.
    shuffled={"epochs": 100, "batch_size": 20, "images": 200},
    networks=("small-densenet",),
    measures=GanMeasures(
        divergence=DivergenceConfig(steps=300, batch_size=32, width=16, batches=30, ema=0.98)
    ),
    features={"network": "small-densenet", "epochs": 12, "batch_size": 64, "halve_every": 3},
    points=10,
    gan_cost=75.0,
    classifier_cost=30.0,
)

_GPU = Preset(
    name="gpu",
    seeds=3,
    cheap_seeds=3,
    data={
        "first": DataSpec("cifar10", 32),
        "second": DataSpec("cifar100", 32),
    },
    labels={"first": DataSpec("cifar100", 32), "second": DataSpec("cifar10", 32)},
    gan={
        "steps": 50_000,
        "n_dis": 5,
        "batch_size": 64,
        "learning_rate": 2e-4,
        "spectra_every": 1000,
    },
    classifier={"epochs": 150, "batch_size": 128, "learning_rate": 0.1},
    networks=("densenet40", "wrn-28-10", "resnet110", "vgg19-bn", "alexnet"),
    measures=GanMeasures(images=10_000),
    features=None,
    points=30,
    complexity_images=10_000,
    gan_cost=6 * 3600.0,
    classifier_cost=2 * 3600.0,
)

PRESETS = {preset.name: preset for preset in (_SMOKE, _CPU, _GPU)}
