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
from benchmarks.measure.busy import CASES
from benchmarks.measure.busy import PROVIDERS as BUSY_PROVIDERS
from benchmarks.measure.busy import WORKLOADS as BUSY_WORKLOADS
from benchmarks.measure.growth import CURVES, matches
from benchmarks.measure.growth import PROVIDERS as GROWING
from benchmarks.measure.store import Row
from benchmarks.report.tables import BRIEF_PROVIDERS, BRIEF_WORKLOADS, find, provider_title

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


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _name_line(axes: Axes, x: float, y: float, provider: str) -> None:
    """Writes whose line ends here."""
    title = provider_title((provider, 1.0 if PROVIDERS[provider].spectral else None))
    place = {"xytext": (6, 0), "textcoords": "offset points", "annotation_clip": False}
    colour = COLOURS.get(provider, "black")
    axes.annotate(title, (x, y), color=colour, va="center", fontsize=8, **place)


def overhead(rows: Sequence[Row], path: Path) -> None:
    """Multiples of the copy, forward and backward: a panel a model, a bar a provider."""
    floors = [
        r
        for r in rows
        if r.mode == "forward_backward"
        and r.metric == "time_over_copy_x"
        and r.rank_ratio
        and r.provider in BRIEF_PROVIDERS
        and r.workload in BRIEF_WORKLOADS
    ]
    if not floors:
        raise ValueError("the store holds no measurement to plot")
    order = list(PROVIDERS)
    lines = sorted(
        {(r.provider, r.rank_ratio) for r in floors}, key=lambda x: (-x[1], order.index(x[0]))
    )
    names = [n for n in BRIEF_WORKLOADS if any(r.workload == n for r in floors)]
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(2.6 * len(names) + 2.6, 3.2),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for ax, name in zip(axes[0], names, strict=True):
        for y, line in enumerate(lines):
            row = find(floors, name, provider=line[0], rank_ratio=line[1])
            if row is not None:
                whiskers = [[row.p50 - row.p20], [row.p80 - row.p50]]
                ax.barh(
                    y,
                    row.p50 - 1,
                    left=1,
                    color=COLOURS[line[0]],
                    xerr=whiskers,
                    error_kw={"elinewidth": 0.7},
                )
                ax.text(row.p80 * 1.08, y, f"{row.p50:.1f}", va="center", fontsize=8)
        ax.set_xscale("log")
        ax.set_xlim(1, 1.8 * max(r.p80 for r in floors))
        ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"], fontsize=8)
        ax.set_title(BRIEF_WORKLOADS[name], fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(lines)), [provider_title(x) for x in lines], fontsize=9)
    axes[0][0].invert_yaxis()
    figure.supxlabel(
        "times the copy of the same bytes, forward and backward of all weights", size=9
    )
    _save(figure, path)


def busy(rows: Sequence[Row], path: Path) -> None:
    """Mean times beside busy processes, and beside a loader; lines are named at their end."""
    means = [r for r in rows if r.metric == "mean_ms"]
    names = [n for n in BUSY_WORKLOADS if any(r.workload == n for r in means)]
    if not names:
        raise ValueError("the store holds no measurement to plot")
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names) + 1, 3.6), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], names, strict=True):
        for provider in BUSY_PROVIDERS:
            found = {r.busy: r.p50 for r in means if (r.workload, r.provider) == (name, provider)}
            at = [i for i, case in enumerate(CASES) if case in found]
            shown = [found[case] for case in CASES if case in found]
            ax.plot(at, shown, "o-", color=COLOURS[provider])
            if ax is axes[0][-1] and shown:
                title = provider_title((provider, 1.0))
                ax.annotate(
                    f" {title}",
                    (at[-1], shown[-1]),
                    color=COLOURS[provider],
                    va="center",
                    fontsize=9,
                )
        ax.set_xticks(range(len(CASES)), ["quiet", "1 a core", "2 a core", "loader"], fontsize=9)
        ax.set_yscale("log")
        ax.set_title(BRIEF_WORKLOADS.get(name, name), fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("mean ms, forward and backward")
    _save(figure, path)


def growth(rows: Sequence[Row], path: Path) -> None:
    """Forward and backward against what growth.py varies, with bands from p20 to p80."""
    if not rows:
        raise ValueError("the store holds no measurement to plot")
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for ax, (title, points) in zip(axes.flat, CURVES.items(), strict=True):
        for name in GROWING:
            found = {
                x: r
                for x, point in points.items()
                for r in rows
                if matches(point, r) and r.provider == name and r.metric == "time_ms"
            }
            colour = COLOURS.get(name, "black")
            at = list(found)
            ax.plot(at, [r.p50 for r in found.values()], "o-", color=colour)
            low, high = ([getattr(r, p) for r in found.values()] for p in ("p20", "p80"))
            ax.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            if found:
                _name_line(ax, at[-1], found[at[-1]].p50, name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.margins(x=0.3 if len(points) < 3 else 0.05)
        ax.set_xlabel(title)
        ax.set_ylabel("ms")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Forward and backward of all weights")
    _save(figure, path)


def draw_all(
    rows: Sequence[Row], grown: Sequence[Row], beside: Sequence[Row], folder: Path
) -> None:
    """Every picture that the documents show and the store has rows for."""
    if rows:
        overhead(rows, folder / "overhead.png")
    if grown:
        growth(grown, folder / "growth.png")
    if beside:
        busy(beside, folder / "busy.png")
