"""A method by name: how weights are normalised and what is added to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn
from torch.nn.utils import parametrizations

import srn_kernels as srn

MATRIX_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


class Norm(str, Enum):
    """The methods of Section 4 and their peers."""

    NONE = "none"
    SN = "sn"
    SRN = "srn"
    TORCH_SN = "torch-sn"
    WGAN_GP = "wgan-gp"
    ORTHO = "ortho"
    RANDOM = "random"


@dataclass(frozen=True)
class Method:
    """A normalisation with its parameters.

    ``c`` in (0, 1] bounds every stable rank by ``max(1, c * min(rows, columns))`` (Section 4,
    "control parameter"); ``preserve`` is Theorem 1's k. Both are SRN's only.
    """

    norm: Norm = Norm.SRN
    c: float = 1.0
    preserve: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _norm(self.norm))
        if not 0 < self.c <= 1:
            raise ValueError(f"c must be in (0, 1], got {self.c}")
        if self.preserve < 0:
            raise ValueError(f"preserve must be at least 0, got {self.preserve}")
        if self.norm is not Norm.SRN and (self.c, self.preserve) != (1.0, 1):
            raise ValueError(f"c and preserve are parameters of srn, not of {self.norm.value}")

    @property
    def label(self) -> str:
        """The paper's name: SRN-50 has c = 0.5."""
        if self.norm is Norm.SRN:
            kept = "" if self.preserve == 1 else f", k={self.preserve}"
            return f"SRN-{100 * self.c:g}{kept}"
        return _LABELS[self.norm]

    @property
    def trains(self) -> bool:
        """Random networks are evaluated as they are initialised."""
        return self.norm is not Norm.RANDOM

    def apply(self, model: nn.Module) -> nn.Module:
        """Normalise every linear, convolution and embedding layer in place and return the model."""
        present = tuple(t for t in MATRIX_LAYERS if any(isinstance(m, t) for m in model.modules()))
        if self.norm is Norm.SN:
            return srn.apply_stable_rank_norm(model, rank_ratio=1.0, layer_types=present)
        if self.norm is Norm.SRN:
            return srn.apply_stable_rank_norm(
                model, rank_ratio=self.c, preserve=self.preserve, layer_types=present
            )
        if self.norm is Norm.TORCH_SN:
            for _, layer in matrix_layers(model):
                parametrizations.spectral_norm(layer)
        return model


_LABELS = {
    Norm.NONE: "no norm",
    Norm.SN: "SN",
    Norm.TORCH_SN: "SN (torch)",
    Norm.WGAN_GP: "WGAN-GP",
    Norm.ORTHO: "Ortho",
    Norm.RANDOM: "Random",
}


def _norm(value: str | Norm) -> Norm:
    try:
        return Norm(value)
    except ValueError:
        names = ", ".join(norm.value for norm in Norm)
        raise ValueError(f"method must be one of {names}, got {value!r}") from None


def matrix_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The (name, layer) pairs that :meth:`Method.apply` normalises."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, MATRIX_LAYERS)]
