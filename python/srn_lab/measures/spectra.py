"""Exact spectra of a model's weights, and the product of their norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import srn_kernels as srn
from srn_lab.methods.method import Method, Norm, matrix_layers


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode with parameters frozen; every flag is restored afterwards.

    Without ``gradients`` nothing is recorded at all; with them, only what depends on the inputs.
    """
    flags = {module: module.training for module in model.modules()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, training in flags.items():
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


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
    """One :class:`Spectrum` per linear, convolution or embedding layer; changes nothing."""
    rows = []
    with evaluating(model):
        for name, layer in matrix_layers(model):
            weight = effective_weight(layer)
            sigma, stable_rank = _sigma_and_stable_rank(weight)
            raw = _sigma_and_stable_rank(raw_weight(layer))
            shape = weight.shape[0], weight[0].numel()
            rows.append(Spectrum(name, *shape, sigma, stable_rank, *raw))
    return rows


def log_product_of_norms(model: nn.Module) -> float:
    """log of prod_i |W_i|_2, the upper bound of Eq. (3) for a chain of layers.

    The norm is the reshaped kernel's, as in the paper; a convolution as an operator can exceed it
    (``srn_kernels.operator_norm``), and where blocks add a shortcut the bound is not a bound of the
    network but still the quantity that normalisation controls.
    """
    return sum(math.log(max(row.sigma, 1e-300)) for row in spectra(model))


def stable_rank_bounds(layers: Sequence[Spectrum], method: Method) -> dict[str, float]:
    """The largest stable rank that ``method`` allows each layer; infinite without a bound."""
    if method.norm is not Norm.SRN or method.c == 1:
        return {row.layer: math.inf for row in layers}
    return {row.layer: max(1.0, method.c * min(row.rows, row.columns)) for row in layers}


def active_layers(layers: Sequence[Spectrum], method: Method) -> list[str]:
    """The layers that SRN changes: the raw weight's stable rank exceeds the layer's bound."""
    bounds = stable_rank_bounds(layers, method)
    return [row.layer for row in layers if row.raw_stable_rank > bounds[row.layer]]


def _sigma_and_stable_rank(weight: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(weight.detach().double().flatten(1))
    sigma = values[0].item()
    return sigma, (values.square().sum() / values[0].square()).item() if sigma > 0 else 0.0
