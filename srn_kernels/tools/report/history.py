"""What each round did to each layer, kept, and handed to whatever draws curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from srn_kernels.core.arguments import check_count
from srn_kernels.maths.scalars import STABLE_RANK, Stats
from srn_kernels.model import root
from srn_kernels.model.weight import NormalizedWeight
from srn_kernels.tools.report.layers import names_in, row_of

Writer = Callable[[dict[str, float], int], object]


class History:
    """A callback that returns, and keeps, what the last round did to each layer.

    ``history = History(model)``; call ``history()`` after a step. It returns {name: {"sigma",
    "stable_rank", "normalized_stable_rank", "gamma", "active"}}, relative to the u, v of that round
    as in :func:`srn_kernels.report`. After an eager forward nothing is computed, only the round's
    scalars are fetched; weights that no eager round has seen (compiled models) are looked at as
    :func:`srn_kernels.report` does. ``rows`` keeps every result.

    Args:
        model: with normalised layers.
        to: where the numbers go as well, under "srn/<layer>/<quantity>": a SummaryWriter of
            TensorBoard (``add_scalar``); Weights & Biases, the module or a run (``log``), where
            "srn/step" becomes their axis; or a function of ({key: number}, step), such as
            ``log_metrics`` of a Lightning logger.

    ``history(step)`` names the step; without it, it is the number of calls before.

    Raises:
        ValueError: nothing is normalised. TypeError: ``to`` is none of these, or a wrong step.

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 4)))
        >>> history = srn.History(model)
        >>> _ = model(torch.randn(2, 8))
        >>> sorted(history()["0.weight"]), len(history.rows)
        (['active', 'gamma', 'normalized_stable_rank', 'sigma', 'stable_rank'], 1)
    """

    def __init__(self, model: nn.Module, to: Any = None) -> None:
        if not root.entries_of(model):
            raise ValueError(f"model: no normalised layer in {type(model).__name__}")
        self.model = model
        self.rows: list[dict[str, dict[str, float]]] = []
        self._write = _writer(to)

    def __call__(self, step: int | None = None) -> dict[str, dict[str, float]]:
        step = len(self.rows) if step is None else check_count(step, "step", 0)
        row = self._look()
        self.rows.append(row)
        if self._write is not None:
            self._write(flat(row), step)
        return row

    def _look(self) -> dict[str, dict[str, float]]:
        entries = root.entries_of(self.model)
        current = {id(e) for e in entries if _is_current(e)}
        records = {e.record for e in entries if id(e) in current}
        stats = {record: record.stats.tolist() for record in records}
        row, names = {}, names_in(self.model)
        for entry in entries:
            name = names[id(entry)]
            if id(entry) in current:
                place = entry.record.place_of(entry.fit)
                row[name] = _numbers(stats[entry.record][place], entry.target_rank())
                continue
            seen = row_of(entry, name)
            row[name] = {
                "sigma": seen.sigma,
                "stable_rank": seen.stable_rank,
                "normalized_stable_rank": seen.normalized_stable_rank,
                "gamma": seen.gamma,
                "active": float(seen.active),
            }
        return row


def flat(row: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One level of keys, as loggers want them."""
    return {f"srn/{name}/{key}": x for name, numbers in row.items() for key, x in numbers.items()}


class _Run:
    """Weights & Biases; our step is an axis, because its own belongs to whoever else logs."""

    AXIS = "srn/step"

    def __init__(self, run: Any) -> None:
        self.run, self.defined = run, False

    def __call__(self, values: dict[str, float], step: int) -> None:
        if not self.defined:  # the module knows no metrics before its init
            self.run.define_metric(self.AXIS)
            self.run.define_metric("srn/*", step_metric=self.AXIS)
            self.defined = True
        self.run.log({**values, self.AXIS: step})


def _writer(to: Any) -> Writer | None:
    """How numbers are written to ``to``, by what it offers."""
    if to is None:
        return None
    if callable(getattr(to, "add_scalar", None)):
        return lambda values, step: [to.add_scalar(key, x, step) for key, x in values.items()]
    if callable(getattr(to, "log", None)):
        return _Run(to)
    if callable(to):
        return to
    raise TypeError(
        "to must have add_scalar (TensorBoard) or log (Weights & Biases), or be a function of "
        f"(values, step); got {type(to).__name__}"
    )


def _is_current(entry: NormalizedWeight) -> bool:
    """Whether the last eager round is the last that moved u (a compiled one leaves no record)."""
    if entry.record is None or not entry.u.numel():
        return False
    record = entry.record
    offset = record.plan.offsets[record.place_of(entry.fit)]
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
