"""Pictures from the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases.providers import PROVIDERS
from benchmarks.cases.workloads import CORE
from benchmarks.measure.growth import CURVES, matches
from benchmarks.measure.growth import PROVIDERS as GROWING
from benchmarks.measure.store import Row
from benchmarks.report.tables import BRIEF_PROVIDERS, BRIEF_WORKLOADS, provider_title

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


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def overhead(rows: Sequence[Row], path: Path) -> None:
    """Multiples of the copy, forward and backward, and each normalisation's share of a step."""
    floors = [
        r
        for r in rows
        if r.mode == "forward_backward"
        and r.metric == "time_over_copy_x"
        and r.rank_ratio
        and r.provider in BRIEF_PROVIDERS
        and r.workload in BRIEF_WORKLOADS
    ]
    shares = [
        r for r in rows if r.metric == "share_of_step_percent" and r.workload in BRIEF_WORKLOADS
    ]
    if not floors:
        raise ValueError("the store holds no measurement to plot")
    panels = 2 if shares else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(7 * panels, 4.4), squeeze=False, layout="constrained"
    )
    left = axes[0, 0]
    _bars(left, floors, "time / copy of the same bytes")
    left.set_yscale("log")
    left.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set_title("Forward and backward of all weights (dotted: the floor)")
    if shares:
        _bars(axes[0, 1], shares, "% of the training step")
        axes[0, 1].axhline(0, color="black", linewidth=0.8)
        axes[0, 1].set_title("Share of the whole training step")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    _save(figure, path)


def growth(rows: Sequence[Row], path: Path) -> None:
    """Forward and backward against what growth.py varies, with bands from p20 to p80."""
    if not rows:
        raise ValueError("the store holds no measurement to plot")
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for ax, (title, points) in zip(axes.flat, CURVES.items(), strict=True):
        for name in GROWING:
            found = {
                x: r
                for x, point in points.items()
                for r in rows
                if matches(point, r) and r.provider == name and r.metric == "time_ms"
            }
            colour = COLOURS.get(name, "black")
            label = provider_title((name, 1.0 if PROVIDERS[name].spectral else None))
            at = list(found)
            ax.plot(at, [r.p50 for r in found.values()], "o-", color=colour, label=label)
            low, high = ([getattr(r, p) for r in found.values()] for p in ("p20", "p80"))
            ax.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(title)
        ax.set_ylabel("ms")
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle("Forward and backward of all weights")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    _save(figure, path)


def draw_all(rows: Sequence[Row], grown: Sequence[Row], folder: Path) -> None:
    """Every picture that the documents show and the store has rows for."""
    if rows:
        overhead(rows, folder / "overhead.png")
    if grown:
        growth(grown, folder / "growth.png")
