"""Pictures from the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.providers import PROVIDERS
from benchmarks.store import Row
from benchmarks.tables import provider_title
from benchmarks.workloads import CORE

# Okabe and Ito's colours, which colour-blind readers can tell apart; ours in the warm ones.
COLOURS = {
    "torch_sn": "#999999",
    "torch_sn_legacy": "#cccccc",
    "torch_sn_compiled": "#56b4e9",
    "foreach": "#0072b2",
    "layerwise": "#009e73",
    "reference": "#f0e442",
    "functional": "#e69f00",
    "module": "#d55e00",
}
HATCHES = {1.0: "", 0.7: "//", 0.5: "xx"}


def _bars(axes: Axes, rows: Sequence[Row], ylabel: str) -> None:
    """Grouped bars: workloads across, providers side by side, whiskers from p20 to p80."""
    workloads = [w for w in CORE if any(r.workload == w for r in rows)]
    order = list(PROVIDERS)
    lines = sorted(
        {(r.provider, r.rank_ratio) for r in rows}, key=lambda x: (-x[1], order.index(x[0]))
    )
    width = 0.85 / max(1, len(lines))
    for i, line in enumerate(lines):
        place = {r.workload: r for r in rows if (r.provider, r.rank_ratio) == line}
        at = [j + (i - (len(lines) - 1) / 2) * width for j, w in enumerate(workloads) if w in place]
        shown = [place[w] for w in workloads if w in place]
        axes.bar(
            at,
            [r.p50 for r in shown],
            width,
            yerr=[[r.p50 - r.p20 for r in shown], [r.p80 - r.p50 for r in shown]],
            error_kw={"elinewidth": 0.7},
            color=COLOURS.get(line[0], "#000000"),
            hatch=HATCHES.get(line[1], ".."),
            edgecolor="white",
            linewidth=0.4,
            label=provider_title(line),
        )
    axes.set_xticks(range(len(workloads)), [w.replace("_", " ") for w in workloads], fontsize=9)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def overhead(rows: Sequence[Row], path: Path) -> None:
    """Multiples of the copy, forward and backward, and each normalisation's share of a step."""
    floors = [
        r
        for r in rows
        if r.mode == "forward_backward" and r.metric == "time_over_copy_x" and r.rank_ratio
    ]
    shares = [r for r in rows if r.metric == "share_of_step_percent"]
    if not floors:
        raise ValueError("the store holds no measurement to plot")
    panels = 2 if shares else 1
    figure, axes = plt.subplots(
        panels, 1, figsize=(11, 4.2 * panels), squeeze=False, layout="constrained"
    )
    top = axes[0, 0]
    _bars(top, floors, "time / copy of the same bytes")
    top.set_yscale("log")
    top.axhline(1, color="black", linewidth=0.8, linestyle=":")
    top.set_title("Forward and backward of all weights (lower is better; dotted: the floor)")
    if shares:
        _bars(axes[1, 0], shares, "% of the training step")
        axes[1, 0].axhline(0, color="black", linewidth=0.8)
        axes[1, 0].set_title("Share of the discriminator's training step")
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
