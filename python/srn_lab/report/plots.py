"""The demo's pictures: sample grids, eLhist, stable ranks, timing bars. Each returns a path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from srn_kernels.tools.paired import Spread
from srn_lab.measures.elhist import PairKind, Slopes
from srn_lab.report.style import COLOURS, cycle, figure
from srn_lab.timing.overhead import Overhead
from srn_lab.training.gan import History

_PAIR_TITLES = {
    PairKind.REAL_FAKE: "real and generated",
    PairKind.REAL_REAL: "both real",
    PairKind.FAKE_FAKE: "both generated",
}


def plot_samples(path: Path, columns: Mapping[str, Tensor], side: int = 8) -> Path:
    """One ``side`` x ``side`` grid of images (N, 1, H, W) in [-1, 1] per title."""
    with figure(path, 1, len(columns), (3.1 * len(columns), 3.3)) as (_, axes):
        for axis, (title, images) in zip(axes.flat, columns.items(), strict=True):
            axis.imshow(_tiled(images[: side * side], side), cmap="gray", vmin=-1, vmax=1)
            axis.set_title(title)
            axis.set_axis_off()
    return path


def plot_elhist(path: Path, runs: Mapping[str, Mapping[PairKind, Slopes]]) -> Path:
    """eLhist of several runs, one panel per kind of pair; dashed lines: 95th percentiles."""
    kinds = list(next(iter(runs.values())))
    top = max(s.values.max().item() for run in runs.values() for s in run.values())
    edges = np.linspace(0, top, 51)
    with figure(path, 1, len(kinds), (max(4.2, 3.1 * len(kinds)), 2.9), sharey=True) as (
        drawn,
        axes,
    ):
        for axis, kind in zip(axes.flat, kinds, strict=True):
            for colour, (name, run) in zip(cycle(), runs.items(), strict=False):
                _elhist(axis, name, run[kind], edges, colour)
            axis.set_title(_PAIR_TITLES[kind])
            axis.set_xlim(0, top)
            axis.legend(loc="upper right", title="95th percentile", alignment="left")
        axes.flat[0].set_ylabel("pairs")
        drawn.supxlabel(
            r"slope $|D(x)-D(y)|\,/\,\|x-y\|_2$ (logits per unit of pixel distance)", size=9
        )
    return path


def plot_stable_ranks(
    path: Path, histories: Mapping[str, History], bounds: Mapping[str, float], bounded: str
) -> Path:
    """Stable rank of every normalised layer over training, one panel a layer.

    ``bounds`` maps layer to the stable-rank bound of the run named ``bounded``. Layers with one row
    or column have stable rank 1 whatever the weights, and are left out.
    """
    first = next(iter(histories.values())).spectra[0]["layers"]
    layers = [row for row in first if min(row["rows"], row["columns"]) > 1]
    columns = min(3, len(layers))
    rows = math.ceil(len(layers) / columns)
    size = (2.6 * columns, 1.6 * rows + 0.5)
    with figure(path, rows, columns, size, sharex=True) as (drawn, axes):
        for axis in axes.flat[len(layers) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes.flat, layers, strict=False):
            for colour, (name, history) in zip(cycle(), histories.items(), strict=False):
                steps, ranks = _stable_rank_curve(history, layer["layer"])
                axis.plot(steps, ranks, color=colour, label=name, linewidth=1.6)
            bound = bounds[layer["layer"]]
            if math.isfinite(bound):
                line = {"color": "black", "linestyle": ":", "linewidth": 1.2}
                axis.axhline(bound, **line, label=f"bound of {bounded}")
            rows_, columns_ = layer["rows"], layer["columns"]
            axis.set_title(rf"{layer['layer']}  {rows_}$\times${columns_}", size=8)
            axis.set_ylim(0, min(rows_, columns_))
        handles, names = axes.flat[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside upper left", ncols=len(names))
        drawn.supxlabel("generator steps", size=9)
        drawn.supylabel("stable rank (axis ends at the rank)", size=9)
    return path


def plot_overhead(path: Path, results: Sequence[Overhead]) -> Path:
    """Medians of the timings as bars; the whiskers span the quartiles."""
    config = results[0].config
    steps, alone = [], []
    for index, result in enumerate(results):
        for offset, key, name, colour in (
            (0.0, "torch", f"torch, {result.config.style.value}", COLOURS[1]),
            (0.8, "converted", "the same, converted", COLOURS[0]),
        ):
            position = 2.2 * index + offset
            steps.append((position, name, colour, result.step_ms[key]))
            alone.append((position, name, colour, result.normalisation_ms[key]))
    last = 2.2 * len(results)
    steps.append((last, "no normalisation", "#999999", results[0].step_ms["plain"]))
    height = 1.1 + 0.7 * len(results)
    with figure(path, 1, 2, (8.6, height), sharey=True) as (_, axes):
        _bars(axes[0, 0], steps)
        _bars(axes[0, 1], alone)
        axes[0, 0].invert_yaxis()
        axes[0, 0].set_yticks([p for p, *_ in steps], [name for _, name, *_ in steps])
        batch = r"$\times$".join(map(str, (config.batch, 3, config.size, config.size)))
        axes[0, 0].set_title(f"whole model, batch {batch}")
        axes[0, 1].set_title(f"its {results[0].normalised_layers} normalised weights alone")
    return path


def _tiled(images: Tensor, side: int) -> np.ndarray:
    """(N, 1, H, W) as one picture, with a one-pixel white gap between images."""
    height, width = images.shape[-2:]
    canvas = np.ones((side * (height + 1) - 1, side * (width + 1) - 1))
    for index, image in enumerate(images[:, 0].numpy()):
        top, left = index // side * (height + 1), index % side * (width + 1)
        canvas[top : top + height, left : left + width] = image
    return canvas


def _elhist(axis: Axes, name: str, slopes: Slopes, edges: np.ndarray, colour: str) -> None:
    percentile = slopes.percentile_95
    label = f"{name}  {percentile:.3f}"
    axis.hist(slopes.values.numpy(), edges, histtype="stepfilled", color=colour, alpha=0.25)
    axis.hist(slopes.values.numpy(), edges, histtype="step", color=colour, linewidth=1.2)
    # Shorter than the axes, to stay below the legend.
    axis.axvline(percentile, ymax=0.66, color=colour, linestyle="--", linewidth=1.4, label=label)


def _stable_rank_curve(history: History, layer: str) -> tuple[list[int], list[float]]:
    steps = [record["step"] for record in history.spectra]
    ranks = [
        row["stable_rank"]
        for record in history.spectra
        for row in record["layers"]
        if row["layer"] == layer
    ]
    return steps, ranks


def _bars(axis: Axes, rows: Sequence[tuple[float, str, str, Spread]]) -> None:
    for position, _, colour, spread in rows:
        whiskers = [[spread.median - spread.p25], [spread.p75 - spread.median]]
        axis.barh(position, spread.median, 0.7, xerr=whiskers, color=colour, capsize=2)
        axis.annotate(
            f"{spread.median:.3g}",
            (spread.p75, position),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 1.15 * max(spread.p75 for *_, spread in rows))
    axis.set_xlabel("forward + backward, ms (whiskers: quartiles)")
