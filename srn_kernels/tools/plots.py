"""Pictures of what normalisation does; matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from srn_kernels.core.arguments import check_count
from srn_kernels.maths.matrix import matrix
from srn_kernels.model import root
from srn_kernels.model.freshness import is_split
from srn_kernels.model.rounds import current_weights
from srn_kernels.model.select import Pattern, matcher
from srn_kernels.model.weight import NormalizedWeight
from srn_kernels.tools.report.layers import names_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4


@torch.no_grad()
def singular_values(entry: NormalizedWeight) -> tuple[Tensor, Tensor]:
    """Those of W, and of W_hat as an evaluation would use it; float64, descending."""
    found = []
    for weight in (entry.weight, *current_weights([entry])):
        if is_split(weight):
            weight = weight.full_tensor()
        w = matrix(weight, entry.settings.dim) if weight.dim() > 1 else weight.unsqueeze(0)
        found.append(torch.linalg.svdvals(w.double()).cpu())
    return found[0], found[1]


def plot_spectrum(model: nn.Module, *, include: Pattern = None, limit: int = 24) -> Figure:
    """Draws the singular values of each normalised layer, before (W) and after (W_hat).

    No state changes; needs matplotlib. Each matrix is decomposed, which takes a while for large
    ones. The figure is returned, not shown: ``plot_spectrum(model).savefig("spectrum.png")``.

    Args:
        model: with normalised layers.
        include: names as in :func:`srn_kernels.report` ("blocks.0.conv1.weight"), globs, or a
            callable ``(name, module) -> bool``; None: all.
        limit: at most so many layers are drawn; the title says how many there are.

    Raises:
        ValueError: nothing is normalised, or nothing is included; TypeError: a wrong argument.
        ImportError: no matplotlib.

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 4)), rank_ratio=0.5)
        >>> figure = srn.plot_spectrum(model)
        >>> [axes.get_title() for axes in figure.axes]
        ['0.weight']
    """
    check_count(limit, "limit", 1)
    entries = [entry for entry in root.entries_of(model) if not entry.weight.is_meta]
    names = names_in(model)
    if not entries:
        raise ValueError(f"model: no normalised layer in {type(model).__name__}")
    included, _ = matcher("*" if include is None else include, "include")
    chosen = [entry for entry in entries if included(names[id(entry)], entry.sites[0][0])]
    if not chosen:
        there = ", ".join(repr(names[id(entry)]) for entry in entries[:12])
        raise ValueError(f"include: nothing matches {include!r}; there are {there}")
    from matplotlib.figure import Figure

    drawn = chosen[:limit]
    columns = min(_COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.6), layout="constrained")
    for place, entry in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, place + 1)
        for values, label in zip(singular_values(entry), ("W", "W_hat"), strict=True):
            rank = float(values.square().sum() / values[0] ** 2) if values[0] else 0.0
            mark = "." if len(values) == 1 else ""
            axes.plot(range(1, len(values) + 1), values, marker=mark, label=f"{label}, {rank:.3g}")
        axes.set_yscale("log")
        axes.set_title(names[id(entry)], fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.legend(title="stable rank", fontsize="x-small", title_fontsize="x-small")
    more = "" if len(drawn) == len(chosen) else f", {len(drawn)} of {len(chosen)} layers"
    figure.suptitle(f"singular values before and after normalisation{more}", fontsize="medium")
    return figure
