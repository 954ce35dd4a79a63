"""Weight normalisation of a discriminator, chosen by name, and the spectra it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import srn_kernels as srn

_MATRIX_LAYERS = (nn.Linear, nn.Conv2d)


class Norm(str, Enum):
    """How the discriminator's weights are normalised."""

    NONE = "none"
    SN = "sn"
    SRN = "srn"
    TORCH_SN = "torch-sn"


def label(norm: Norm, rank_ratio: float) -> str:
    """Short name for tables and legends, the paper's: SRN-50 has a stable-rank ratio of 0.5."""
    if norm is Norm.SRN:
        return f"SRN-{100 * rank_ratio:g}"
    return {Norm.NONE: "no norm", Norm.SN: "SN", Norm.TORCH_SN: "SN (torch)"}[norm]


def normalise(model: nn.Module, norm: Norm, rank_ratio: float) -> nn.Module:
    """Normalise every linear and convolution layer of ``model`` in place and return it.

    ``rank_ratio`` in (0, 1] bounds each stable rank by ``max(1, rank_ratio * min(rows, columns))``
    (Section 4, "control parameter") and is used by ``srn`` only.
    """
    if norm is Norm.SN:
        return srn.apply_stable_rank_norm(model, rank_ratio=1.0)
    if norm is Norm.SRN:
        return srn.apply_stable_rank_norm(model, rank_ratio=rank_ratio)
    if norm is Norm.TORCH_SN:
        for _, layer in matrix_layers(model):
            parametrizations.spectral_norm(layer)
    return model


def one_round(model: nn.Module, norm: Norm) -> AbstractContextManager[None]:
    """Context in which all forwards of ``model`` share one normalisation and power iteration."""
    if norm in (Norm.SN, Norm.SRN):
        return srn.shared_round(model)
    return parametrize.cached() if norm is Norm.TORCH_SN else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own training flag is restored afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def matrix_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The (name, layer) pairs that :func:`normalise` normalises."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _MATRIX_LAYERS)]


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that ``layer`` computes with, normalised if the layer is."""
    return srn.normalized_weight(layer) if srn.is_normalized(layer) else layer.weight


def raw_weight(layer: nn.Module) -> Tensor:
    """The trainable parameter behind :func:`effective_weight`."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight


@dataclass(frozen=True)
class Spectrum:
    """Exact (SVD) spectral facts of one layer's weight, as a matrix of output rows."""

    layer: str
    rows: int
    columns: int
    sigma: float
    """Largest singular value of the normalised weight."""
    stable_rank: float
    """Squared Frobenius norm over squared spectral norm of the normalised weight (Def. 3.1)."""
    raw_sigma: float
    raw_stable_rank: float


def spectra(model: nn.Module) -> list[Spectrum]:
    """One :class:`Spectrum` per linear or convolution layer; leaves the model as it was."""
    rows = []
    with evaluating(model):
        for name, layer in matrix_layers(model):
            weight = effective_weight(layer)
            sigma, stable_rank = _sigma_and_stable_rank(weight)
            raw = _sigma_and_stable_rank(raw_weight(layer))
            shape = weight.shape[0], weight[0].numel()
            rows.append(Spectrum(name, *shape, sigma, stable_rank, *raw))
    return rows


def _sigma_and_stable_rank(weight: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(weight.detach().double().flatten(1))
    sigma = values[0].item()
    return sigma, (values.square().sum() / values[0].square()).item() if sigma > 0 else 0.0
