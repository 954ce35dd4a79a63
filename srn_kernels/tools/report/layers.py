"""What normalisation does to each layer of a model, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from srn_kernels.maths.matrix import first_vector, matrix
from srn_kernels.maths.scalars import STABLE_RANK, Stats
from srn_kernels.model import root
from srn_kernels.model.freshness import is_split
from srn_kernels.model.rounds import current_weights, settled
from srn_kernels.model.weight import KEY, NormalizedWeight
from srn_kernels.model.wrap import skipped
from srn_kernels.tools.operator_norm import LAYERS, input_shapes, operator_norm
from srn_kernels.tools.report.table import LayerReport, Report


def names_in(model: nn.Module) -> dict[int, str]:
    """{id(entry): its parameter's name in ``model``}. A layer that was wrapped by itself, or in
    another root, knows another one."""
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, entry in module.__dict__.get(KEY, {}).items():
            names.setdefault(id(entry), f"{path}.{name}" if path else name)
    return names


def row_of(entry: NormalizedWeight, name: str, note: str = "") -> LayerReport:
    """The numbers of one parameter."""
    rows, columns = entry.matrix_shape()
    if entry.weight.is_meta:
        nan = float("nan")
        return LayerReport(
            name,
            (rows, columns),
            nan,
            nan,
            nan,
            entry.target_rank(),
            nan,
            False,
            note or "on the meta device",
        )
    with torch.no_grad():
        u, v = settled(entry)
        weight = entry.matrix_weight()
        if is_split(weight):  # only for looking at; all processes have to ask for the report
            weight = weight.full_tensor()
        dim = entry.settings.dim if entry.weight.dim() > 1 else 0
        settings, rule = entry.settings, entry.settings.chosen_rule
        target = entry.target_rank()
        layer = rule.normalize_layer(weight, u, v, target, 0, settings.eps, dim, torch.float64)
        notes = [note, rule.note(layer.stats)]
        notes += [f"sigma_max={settings.sigma_max:g}"] if settings.sigma_max else []
        notes += [f"gain {entry.gain.item():.4g}"] if settings.gain else []
        seen = Stats(*layer.stats.tolist())
        w_hat, sigma = matrix(layer.weight, dim), seen.sigma
        if rule.pairs(rows, columns):
            u, v = (first_vector(x).double() for x in (layer.u, layer.v))
            own_sigma = (u @ w_hat @ v).item()
        else:  # a rule without vectors has no estimate in use
            w = matrix(weight, dim).double()
            sigma, own_sigma = (torch.linalg.matrix_norm(x, 2).item() for x in (w, w_hat))
        normalized = w_hat.square().sum().item() / own_sigma**2 if own_sigma else 0.0
    return LayerReport(
        name=name,
        shape=(rows, columns),
        sigma=sigma,
        stable_rank=seen.frobenius_sq / sigma**2 if sigma else 0.0,
        normalized_stable_rank=normalized,
        target=target,
        gamma=seen.gamma,
        active=seen.branch == STABLE_RANK,
        note="; ".join(filter(None, notes)),
    )


def _operator_norm(entry: NormalizedWeight, shapes: Mapping[int, set[Any]]) -> float | None:
    with torch.no_grad():
        (w_hat,) = current_weights([entry])
    norms = [
        operator_norm(module, shape, w_hat, output_size=size)
        for module, name in entry.sites
        if name == "weight" and isinstance(module, LAYERS)
        for shape, size in shapes.get(id(module), ())
    ]
    return max(norms, default=None)


def report(model: nn.Module, input_shape: Sequence[int] | None = None) -> Report:
    """One row for each normalised parameter of ``model``; no state changes.

    sigma is the estimate u^T W v that the layers use (converged first, on a copy, where the weight
    was replaced), and the stable ranks, |W|_F^2 / sigma^2 (arXiv 1906.04659, Definition 3.1), are
    relative to it. Layers of the model's round that are no longer part of the model are listed with
    a note.

    With ``input_shape``, the shape of the model's input (with or without a batch dimension), a copy
    of the model is run once on zeros, and the rows of linear layers and convolutions also get the
    norm of W_hat as an operator on the inputs that they then see: a matrix norm of 1 does not make
    a convolution 1-Lipschitz.

    Raises ValueError if nothing is normalised, or if the model does not run on ``input_shape``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4, bias=False))
        >>> _ = nn.init.eye_(model[0].weight)  # stable rank 4
        >>> row = srn.report(srn.apply_stable_rank_norm(model, rank_ratio=0.5))[0]
        >>> row.shape, row.target, row.active, round(row.normalized_stable_rank, 4)
        ((4, 8), 2.0, True, 2.0)
    """
    present = root.entries_of(model)
    this = model.__dict__.get(root.GROUP)
    registered = [] if this is None else this.current()
    gone = [e for e in registered if all(e is not p for p in present)]
    if not present and not gone:
        raise ValueError(f"model: no normalised layer in {type(model).__name__}")
    names = names_in(model)
    rows = [row_of(e, names[id(e)]) for e in present]
    if input_shape is not None:
        layers = [module for e in present for module, name in e.sites if name == "weight"]
        shapes = input_shapes(model, layers, input_shape)
        rows = [
            replace(row, operator_norm=_operator_norm(e, shapes))
            for e, row in zip(present, rows, strict=True)
        ]
    rows += [row_of(e, e.label, "replaced: no longer part of the model") for e in gone]
    return Report(rows, skipped(model))
