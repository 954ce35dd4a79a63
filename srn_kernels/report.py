"""What normalisation does to each layer of a model, as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from srn_kernels import block, rounds
from srn_kernels.layers import _converged_copy, skipped
from srn_kernels.reference import STABLE_RANK, matrix, normalize_layer
from srn_kernels.state import NormalizedWeight


@dataclass(frozen=True)
class LayerReport:
    """One normalised parameter."""

    name: str
    shape: tuple[int, int]  # of the matrix view: rows, columns
    sigma: float  # u^T W v, the estimate in use
    stable_rank: float  # of W, |W|_F^2 / sigma^2
    normalized_stable_rank: float  # of W_hat, by its own singular values' bound |W_hat|_F^2
    target: float  # r; inf: spectral norm alone
    gamma: float  # factor of the part beside u v^T; 1 where the constraint does nothing
    active: bool  # whether the stable-rank constraint changes this weight
    note: str = ""


class Report:
    """Rows of :class:`LayerReport`: iterate them, print them, or take :meth:`to_dict`."""

    def __init__(self, rows: list[LayerReport], left_out: list[tuple[str, str]]) -> None:
        self.rows = rows
        self.skipped = left_out

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LayerReport:
        return self.rows[index]

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(row) for row in self.rows],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }

    def __str__(self) -> str:
        names = [f.name for f in fields(LayerReport)]
        table = [["layer", *names[1:]]]
        for row in self.rows:
            cells = [
                row.name,
                f"{row.shape[0]}x{row.shape[1]}",
                *(f"{getattr(row, n):.4g}" for n in names[2:7]),
                "yes" if row.active else "no",
                row.note,
            ]
            table.append(cells)
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def _row(entry: NormalizedWeight, note: str) -> LayerReport:
    rows, columns = entry.matrix_shape()
    if entry.weight.is_meta:
        nan = float("nan")
        return LayerReport(
            entry.label,
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
        u, v = _converged_copy(entry) if entry.is_stale() else (entry.u, entry.v)
        weight = entry.matrix_weight()
        dim = entry.settings.dim if entry.weight.dim() > 1 else 0
        settings, k = entry.settings, entry.settings.preserve
        arguments = (weight, u, v, entry.target_rank(), 0, settings.eps, dim)
        if k == 1:
            layer = normalize_layer(*arguments, torch.float64)
        else:
            layer = block.normalize_layer(*arguments, k, torch.float64)
            kept = f"keeps the top {int(layer.stats[7])} of preserve={k}; plain PyTorch (reference)"
            note = f"{note}; {kept}" if note else kept
        sigma, frobenius_sq, _, gamma, *_ = layer.stats.tolist()
        w_hat = matrix(layer.weight, dim)
        u, v = (x.reshape(len(x), -1)[:, 0] for x in (layer.u, layer.v))
        own_sigma = (u.double() @ w_hat @ v.double()).item()
        normalized = w_hat.square().sum().item() / own_sigma**2 if own_sigma else 0.0
    return LayerReport(
        name=entry.label,
        shape=(rows, columns),
        sigma=sigma,
        stable_rank=frobenius_sq / sigma**2 if sigma else 0.0,
        normalized_stable_rank=normalized,
        target=entry.target_rank(),
        gamma=gamma,
        active=layer.stats[6].item() == STABLE_RANK,
        note=note,
    )


def report(model: nn.Module) -> Report:
    """One row for each normalised parameter of ``model``; no state changes.

    sigma is the estimate u^T W v that the layers use (converged first, on a copy, where the weight
    was replaced), and the stable ranks are relative to it. Layers of the model's round that are no
    longer part of the model are listed with a note. ValueError if nothing is normalised.
    """
    present = rounds.entries_of(model)
    this = model.__dict__.get(rounds.ROUND)
    registered = [] if this is None else this.current()
    gone = [e for e in registered if all(e is not p for p in present)]
    if not present and not gone:
        raise ValueError(f"model: no normalised layer in {type(model).__name__}")
    rows = [_row(e, "") for e in present]
    rows += [_row(e, "replaced: no longer part of the model") for e in gone]
    return Report(rows, skipped(model))
