"""A report's rows, as text, as a table for notebooks, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

_NUMBERS = ("sigma", "stable_rank", "normalized_stable_rank", "target", "gamma")


@dataclass(frozen=True)
class LayerReport:
    """One normalised parameter."""

    name: str  #: of the parameter in the model
    shape: tuple[int, int]  #: (rows, columns) of the matrix
    sigma: float  #: u^T W v, the estimate in use, or |W|_2 where the rule keeps no u, v
    stable_rank: float  #: of W, |W|_F^2 / sigma^2
    normalized_stable_rank: float  #: of W_hat, relative to its own u^T W_hat v
    target: float  #: r, inf for spectral norm alone
    gamma: float  #: factor of the part beside u v^T; 1 where the constraint does nothing
    active: bool  #: whether the stable-rank constraint changes this weight
    note: str = ""  #: what else there is to say
    #: The norm of W_hat as an operator on the layer's inputs, the largest if these differ in size.
    operator_norm: float | None = None


class Report:
    """Rows of :class:`srn_kernels.tools.report.LayerReport`: iterate them, print them as a table
    (in a notebook with a bar a layer), or take :meth:`srn_kernels.Report.to_dict`.

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

    def _cells(self) -> list[list[str]]:
        """The heading, and one line a row."""
        measured = any(row.operator_norm is not None for row in self.rows)
        last = ["operator_norm", "note"] if measured else ["note"]
        table = [["layer", "shape", *_NUMBERS, "active", *last]]
        for row in self.rows:
            cells = [
                row.name,
                f"{row.shape[0]}x{row.shape[1]}",
                *(f"{getattr(row, n):.4g}" for n in _NUMBERS),
                "yes" if row.active else "no",
            ]
            if measured:
                cells.append("" if row.operator_norm is None else f"{row.operator_norm:.4g}")
            cells.append(row.note)
            table.append(cells)
        return table

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """The table in a notebook, with a bar a layer: its stable rank before and after, and a
        mark where the target is."""
        heading, *lines = self._cells()
        drawn = ["stable rank", *heading]
        body = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in drawn)}</tr>"]
        for row, cells in zip(self.rows, lines, strict=True):
            texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            body.append(f"<tr><td>{_bar(row)}</td>{texts}</tr>")
        left = "".join(f"<li>{escape(f'{name}: {reason}')}</li>" for name, reason in self.skipped)
        more = f"<details><summary>skipped: {len(self.skipped)}</summary><ul>{left}</ul></details>"
        return f"<table>{''.join(body)}</table>{more if left else ''}"

    __repr__ = __str__


_WIDTH, _HEIGHT = 120, 12  # of a bar, in pixels


def _bar(row: LayerReport) -> str:
    """W's stable rank pale, W_hat's full, the target as a line; in the colours of the page."""
    bounded = [row.target] if math.isfinite(row.target) else []
    known = [x for x in (row.stable_rank, row.normalized_stable_rank, *bounded) if x == x]
    scale = _WIDTH / max([*known, 1.0])
    parts = []
    for value, opacity in ((row.stable_rank, 0.25), (row.normalized_stable_rank, 0.8)):
        if value == value:
            parts.append(
                f'<rect width="{value * scale:.1f}" height="{_HEIGHT}" fill="currentColor" '
                f'fill-opacity="{opacity}"/>'
            )
    for target in bounded:
        parts.append(
            f'<rect x="{max(0.0, target * scale - 2):.1f}" width="2" height="{_HEIGHT}" '
            'fill="#d62728"/>'
        )
    said = f"{row.stable_rank:.4g} before, {row.normalized_stable_rank:.4g} after"
    said += f", target {row.target:.4g}" if bounded else ""
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><title>{escape(said)}</title>'
        f"{''.join(parts)}</svg>"
    )
