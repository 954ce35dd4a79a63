"""The figures of the experiments, drawn from stored rows; PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from srn_lab.experiments.catalogue import Experiment
from srn_lab.experiments.results import Results
from srn_lab.experiments.store import Row
from srn_lab.report.style import cycle, figure
from srn_lab.report.tables import name_of


@dataclass(frozen=True)
class Picture:
    """A figure with what has to be said of it."""

    caption: str
    png: bytes


_KINDS = {
    "real-fake": "real and generated",
    "real-real": "both real",
    "fake-fake": "both generated",
}


def pictures(experiment: Experiment, results: Results) -> list[Picture]:
    """The figures of one experiment, none where it has no rows or needs none."""
    draw = _FIGURES.get(experiment.name)
    rows = _rows(experiment, results)
    return [draw(rows)] if draw and rows else []


def _rows(experiment: Experiment, results: Results) -> dict[str, list[Row]]:
    found = {}
    for slot in results.of_experiment[experiment.name]:
        rows = [row for row in results.slots.get(slot, {}).values() if not row.failed]
        if rows:
            found[name_of(slot)] = rows
    return found


def _elhist(rows: dict[str, list[Row]]) -> Picture:
    def of(kind: str) -> Callable[[Row], dict]:
        return lambda row: {
            "histogram": row.result["elhist"][kind]["histogram"],
            "mark": row.result["elhist"][kind]["percentile_95_slope"],
        }

    panels = {title: of(kind) for kind, title in _KINDS.items()}
    return Picture(
        "Empirical Lipschitz histograms, mean over seeds; dashed: 95th percentile. "
        "Slopes in logits per unit of pixel distance.",
        _histograms(rows, panels, "slope"),
    )


def _jacobian(rows: dict[str, list[Row]]) -> Picture:
    def of(kind: str) -> Callable[[Row], dict]:
        return lambda row: {
            "histogram": row.result["jacobian"][kind]["histogram"],
            "mark": row.result["jacobian"][kind]["percentile_95"],
        }

    return Picture(
        "Norm of D's gradient with respect to the image, mean over seeds; dashed: 95th percentile.",
        _histograms(
            rows, {"at real images": of("real"), "at generated images": of("fake")}, "gradient norm"
        ),
    )


def _histograms(
    rows: dict[str, list[Row]], panels: dict[str, Callable[[Row], dict]], xlabel: str
) -> bytes:
    out = io.BytesIO()
    with figure(out, 1, len(panels), (3.3 * len(panels), 3.0)) as (drawn, axes):
        for axis, (title, get) in zip(axes.flat, panels.items(), strict=True):
            found = {name: [get(row) for row in of] for name, of in rows.items()}
            top = max(item["histogram"]["top"] for of in found.values() for item in of)
            edges = np.linspace(0, top, 61)
            for colour, (name, of) in zip(cycle(), found.items(), strict=False):
                density = np.mean([_density(item["histogram"], edges) for item in of], axis=0)
                mark = float(np.mean([item["mark"] for item in of]))
                axis.stairs(density, edges, color=colour, linewidth=1.2, label=name)
                axis.axvline(mark, color=colour, linestyle="--", linewidth=1.0)
            axis.set_title(title)
            axis.set_xlabel(xlabel)
            axis.set_yticks([])
            axis.set_xlim(0, top)
        handles, names = axes.flat[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8)
    return out.getvalue()


def _density(histogram: dict, edges: np.ndarray) -> np.ndarray:
    """A stored histogram on other bins: its mass is spread evenly inside each of its own."""
    counts = np.asarray(histogram["counts"], dtype=float)
    own = np.linspace(0, histogram["top"], len(counts) + 1)
    cumulative = np.concatenate([[0.0], counts.cumsum()]) / counts.sum()
    return np.diff(np.interp(edges, own, cumulative)) / np.diff(edges)


def _lines(
    rows: dict[str, list[Row]],
    get: Callable[[Row], tuple[Iterable[float], Iterable[float]]],
    xlabel: str,
    ylabel: str,
) -> bytes:
    out = io.BytesIO()
    with figure(out, 1, 1, (6.4, 3.4)) as (drawn, axes):
        axis = axes[0, 0]
        for colour, (name, of) in zip(cycle(), rows.items(), strict=False):
            curves = [get(row) for row in of]
            xs = np.asarray(curves[0][0])
            ys = np.asarray([np.asarray(y) for _, y in curves])
            axis.plot(xs, ys.mean(axis=0), color=colour, linewidth=1.5, label=name)
            if len(ys) > 1:
                low, high = ys.min(axis=0), ys.max(axis=0)
                axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        drawn.legend(loc="outside upper center", ncols=4, fontsize=8)
    return out.getvalue()


def _losses(rows: dict[str, list[Row]]) -> Picture:
    def get(row: Row) -> tuple[list[float], list[float]]:
        return row.result["curve"]["step"], row.result["curve"]["loss_d"]

    return Picture(
        "D's loss over training: mean of seeds, with their range.",
        _lines(rows, get, "generator steps", "loss of D"),
    )


def _curve(
    caption: str, ylabel: str, value: Callable[[dict], float]
) -> Callable[[dict[str, list[Row]]], Picture]:
    def draw(rows: dict[str, list[Row]]) -> Picture:
        def get(row: Row) -> tuple[list[int], list[float]]:
            curves = row.result["curves"]
            return [point["epoch"] for point in curves], [value(point) for point in curves]

        return Picture(caption, _lines(rows, get, "epochs", ylabel))

    return draw


def _linear(rows: dict[str, list[Row]]) -> Picture:
    def get(row: Row) -> tuple[list[float], list[float]]:
        found = row.result["ratios"]
        return [item["c"] for item in found], [item["mean_slope"] for item in found]

    return Picture(
        "Mean empirical Lipschitz constant of two linear layers of spectral norm 1.",
        _lines(rows, get, "c", "mean slope"),
    )


_GAP = _curve(
    "Gap of accuracy over epochs: mean of seeds, with their range.",
    "gap of accuracy",
    lambda point: abs(point["train_accuracy"] - point["test_accuracy"]),
)
_FITTED = _curve(
    "Train accuracy on shuffled labels over epochs: mean of seeds, with their range.",
    "train accuracy",
    lambda point: point["train_accuracy"],
)

_FIGURES: dict[str, Callable[[dict[str, list[Row]]], Picture]] = {
    "linear": _linear,
    "fig1a": _GAP,
    "fig1b": _FITTED,
    "fig1c": _FITTED,
    "fig2a": _elhist,
    "fig2b": _elhist,
    "fig6": _elhist,
    "fig7": _elhist,
    "fig9": _jacobian,
    "fig10": _jacobian,
    "fig11": _losses,
    "conversion": _losses,
}
