"""What defines a training run; equal configurations give equal runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from srn_lab.data import DataSpec
from srn_lab.methods import Loss, Method, Norm
from srn_lab.networks import CLASSIFIERS, RESOLUTIONS


def _positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")


@dataclass(frozen=True)
class GanConfig:
    """One GAN; the defaults are SN-GAN's recipe for CIFAR-10, which the paper follows.

    ``steps`` counts updates of G. ``convert_at``: after that many, a D trained with torch's
    spectral norm goes through ``srn_kernels.convert_spectral_norm``.
    """

    data: DataSpec = field(default_factory=DataSpec)
    method: Method = field(default_factory=Method)
    conditional: bool = False
    loss: Loss = Loss.HINGE
    steps: int = 50_000
    n_dis: int = 5
    batch_size: int = 64
    learning_rate: float = 2e-4
    beta1: float = 0.0
    beta2: float = 0.9
    width_d: int = 128
    width_g: int = 256
    latent: int = 128
    gp_weight: float = 10.0
    ortho_weight: float = 1e-4
    ema: float = 0.0
    """Decay of the averaged G that is evaluated; 0: G itself."""
    convert_at: int | None = None
    spectra_every: int = 100
    """Updates of G between two records of every layer's exact spectrum; first and last are kept."""
    mixed_precision: str = "no"
    seed: int = 0
    threads: int = 1
    """torch threads. One is nearly as fast as two at small sizes, far steadier on a busy machine,
    and makes a run repeat bit for bit whatever the number of cores."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", _loss(self.loss))
        _positive(self, "n_dis", "batch_size", "learning_rate", "width_d", "width_g")
        _positive(self, "latent", "spectra_every", "threads")
        if self.steps < 0 or (self.steps == 0 and self.method.trains):
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.data.resolution not in RESOLUTIONS:
            raise ValueError(f"resolution must be one of {RESOLUTIONS}, got {self.data.resolution}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"mixed_precision must be no, fp16, bf16, got {self.mixed_precision}")
        if self.convert_at is not None:
            if self.method.norm is not Norm.TORCH_SN:
                raise ValueError(f"convert_at needs method torch-sn, got {self.method.norm.value}")
            if not 0 < self.convert_at < self.steps:
                raise ValueError(f"convert_at must be in 1..{self.steps - 1}")

    @property
    def label(self) -> str:
        """The name of the run in tables."""
        converted = ", converted half way" if self.convert_at else ""
        return ("cond. " if self.conditional else "") + self.method.label + converted


@dataclass(frozen=True)
class ClassifierConfig:
    """One classifier trained by SGD; the paper's recipe (Section 4.1)."""

    data: DataSpec = field(default_factory=DataSpec)
    method: Method = field(default_factory=lambda: Method(Norm.NONE))
    network: str = "densenet40"
    random_labels: bool = False
    """Labels of the training images shuffled once (the RAND test)."""
    images: int = 0
    """The number of training images, from the start of the set; 0: all."""
    epochs: int = 150
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    halve_every: int = 25
    mixed_precision: str = "no"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "learning_rate", "halve_every", "threads")
        if self.network not in CLASSIFIERS:
            raise ValueError(f"network must be one of {', '.join(CLASSIFIERS)}: {self.network!r}")
        if self.images < 0:
            raise ValueError(f"images must be at least 0, got {self.images}")

    @property
    def label(self) -> str:
        """The name of the run in tables."""
        return "Vanilla" if self.method.norm is Norm.NONE else self.method.label


Config = GanConfig | ClassifierConfig


def to_dict(config: object) -> dict:
    """Plain values, enumerations by value."""
    values = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        values[item.name] = getattr(value, "value", value)
    return values


def gan_config(values: dict) -> GanConfig:
    """The inverse of :func:`to_dict`. Raises TypeError or ValueError for anything else."""
    values = dict(values)
    data, method = DataSpec(**values.pop("data")), Method(**values.pop("method"))
    return GanConfig(data=data, method=method, **values)


def differences(ours: dict, theirs: dict) -> list[str]:
    """What differs between two configurations, one 'name: theirs, not ours' each."""
    names = sorted(ours.keys() | theirs.keys())
    return [
        f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _loss(value: str | Loss) -> Loss:
    try:
        return Loss(value)
    except ValueError:
        names = ", ".join(loss.value for loss in Loss)
        raise ValueError(f"loss must be one of {names}, got {value!r}") from None
