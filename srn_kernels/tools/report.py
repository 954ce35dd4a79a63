"""What normalisation does to each layer of a model, as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from srn_kernels.maths.matrix import first_vector, matrix
from srn_kernels.maths.scalars import STABLE_RANK, Stats
from srn_kernels.model import root
from srn_kernels.model.rounds import current_weights, settled
from srn_kernels.model.weight import NormalizedWeight, is_split
from srn_kernels.model.wrap import skipped
from srn_kernels.tools.operator_norm import LAYERS, input_shapes, operator_norm


@dataclass(frozen=True)
class LayerReport:
    """One normalised parameter."""

    name: str  #: of the parameter in the model
    shape: tuple[int, int]  #: (rows, columns) of the matrix
    sigma: float  #: u^T W v, the estimate in use, or |W|_2 where the rule keeps no u, v
    stable_rank: float  #: of W, |W|_F^2 / sigma^2
    normalized_stable_rank: float  #: of W_hat, by its own singular values' bound |W_hat|_F^2
    target: float  #: r, inf for spectral norm alone
    gamma: float  #: factor of the part beside u v^T; 1 where the constraint does nothing
    active: bool  #: whether the stable-rank constraint changes this weight
    note: str = ""  #: what else there is to say
    #: The norm of W_hat as a convolution on its input's size, its largest if there are several.
    operator_norm: float | None = None


class Report:
    """Rows of :class:`srn_kernels.tools.report.LayerReport`: iterate them, print them as a table,
    or take :meth:`srn_kernels.Report.to_dict`.

    Example:
        >>> shown = srn.report(srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 4))))
        >>> len(shown), shown[0].name, sorted(shown.to_dict())
        (1, '0.weight', ['layers', 'skipped'])
    """

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
        """{"layers": rows as dicts, "skipped": [{"name", "reason"}]}, of plain Python values."""
        return {
            "layers": [asdict(row) for row in self.rows],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }

    def __str__(self) -> str:
        names = [f.name for f in fields(LayerReport)][:9]
        measured = any(row.operator_norm is not None for row in self.rows)
        table = [["layer", *names[1:8], *(["operator_norm"] if measured else []), names[8]]]
        for row in self.rows:
            cells = [
                row.name,
                f"{row.shape[0]}x{row.shape[1]}",
                *(f"{getattr(row, n):.4g}" for n in names[2:7]),
                "yes" if row.active else "no",
            ]
            if measured:
                cells.append("" if row.operator_norm is None else f"{row.operator_norm:.4g}")
            cells.append(row.note)
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
        name=entry.label,
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
    relative to it. Layers of the model's round that are no
    longer part of the model are listed with a note.

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
    rows = [_row(e, "") for e in present]
    if input_shape is not None:
        layers = [module for e in present for module, name in e.sites if name == "weight"]
        shapes = input_shapes(model, layers, input_shape)
        rows = [
            replace(row, operator_norm=_operator_norm(e, shapes))
            for e, row in zip(present, rows, strict=True)
        ]
    rows += [_row(e, "replaced: no longer part of the model") for e in gone]
    return Report(rows, skipped(model))


class History:
    """A callback that returns, and keeps, what the last round did to each layer.

    ``history = History(model)``; call ``history()`` after a step and hand the numbers to a logger:
    {name: {"sigma", "stable_rank", "normalized_stable_rank", "gamma", "active"}}, relative to the
    u, v of that round as in :func:`report`. After an eager forward nothing is computed, only the
    round's scalars are fetched; weights that no eager round has seen (compiled models) are looked
    at as :func:`report` does. ``rows`` keeps every result. Raises ValueError if nothing is
    normalised.

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 4)))
        >>> history = srn.History(model)
        >>> _ = model(torch.randn(2, 8))
        >>> sorted(history()["0.weight"]), len(history.rows)
        (['active', 'gamma', 'normalized_stable_rank', 'sigma', 'stable_rank'], 1)
    """

    def __init__(self, model: nn.Module) -> None:
        if not root.entries_of(model):
            raise ValueError(f"model: no normalised layer in {type(model).__name__}")
        self.model = model
        self.rows: list[dict[str, dict[str, float]]] = []

    def __call__(self) -> dict[str, dict[str, float]]:
        entries = root.entries_of(self.model)
        current = {id(e) for e in entries if _is_current(e)}
        records = {id(e.record[0]): e.record[0] for e in entries if id(e) in current}
        stats = {key: record.stats.tolist() for key, record in records.items()}
        row = {}
        for entry in entries:
            if id(entry) in current:
                record, place = entry.record
                row[entry.label] = _numbers(stats[id(record)][place], entry.target_rank())
                continue
            seen = _row(entry, "")
            row[entry.label] = {
                "sigma": seen.sigma,
                "stable_rank": seen.stable_rank,
                "normalized_stable_rank": seen.normalized_stable_rank,
                "gamma": seen.gamma,
                "active": float(seen.active),
            }
        self.rows.append(row)
        return row


def _is_current(entry: NormalizedWeight) -> bool:
    """Whether the last eager round is the last that moved u (a compiled one leaves no record)."""
    if entry.record is None or not entry.u.numel():
        return False
    record, place = entry.record
    offset = record.plan.offsets[place]
    return torch.equal(record.round_state[offset : offset + entry.u.numel()], entry.u.flatten())


def _numbers(stats: Sequence[float], target_rank: float) -> dict[str, float]:
    seen = Stats(*stats)
    rank = seen.frobenius_sq / seen.sigma**2 if seen.sigma else 0.0
    active = seen.branch == STABLE_RANK
    return {
        "sigma": seen.sigma,
        "stable_rank": rank,
        # |W_hat|_F^2 = r exactly where the constraint acts, and W / sigma has W's otherwise.
        "normalized_stable_rank": target_rank if active else rank,
        "gamma": seen.gamma,
        "active": float(active),
    }
