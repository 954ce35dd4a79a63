"""The tables of the experiments, from stored rows: mean and deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tabulate import tabulate

from srn_lab.experiments.catalogue import Experiment
from srn_lab.experiments.results import At, Results, Values
from srn_lab.experiments.verdicts import Verdict


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    header: list[str]
    lines: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """GitHub's form."""
        body = tabulate(self.lines, self.header, tablefmt="github", disable_numparse=True)
        return "\n\n".join(filter(None, (f"**{self.title}**", body, self.note)))


@dataclass(frozen=True)
class Column:
    """A number of every row; ``digits`` significant ones."""

    title: str
    get: Callable[[dict], float | None]
    digits: int = 3
    scale: float = 1.0


def _p95(kind: str) -> Column:
    return Column(f"eLhist 95 %, {kind}", At("elhist", kind, "percentile_95_slope"))


_SLOPES = [_p95(kind) for kind in ("real-fake", "real-real", "fake-fake")]
_SCORES = [
    Column("IS", At("scores", "inception_score")),
    Column("FID", At("scores", "fid")),
    Column("KID", At("scores", "kid")),
    Column("Intra-FID", At("scores", "intra_fid")),
]
_JACOBIAN = [
    Column("mean gradient, real", At("jacobian", "real", "mean")),
    Column("95 %, real", At("jacobian", "real", "percentile_95")),
    Column("mean gradient, generated", At("jacobian", "fake", "mean")),
    Column("95 %, generated", At("jacobian", "fake", "percentile_95")),
    Column("log of the product of norms", At("log_product_of_norms")),
]
_ACCURACY = [
    Column("train accuracy, %", At("train_accuracy"), 3, 100),
    Column("test accuracy, %", At("test_accuracy"), 3, 100),
    Column("gap of accuracy, %", At("gap_accuracy"), 3, 100),
    Column("test loss", At("test_loss")),
    Column("gap of loss", At("gap_loss")),
]
_FITTED = [
    Column("train accuracy, %", At("train_accuracy"), 3, 100),
    Column("train loss", At("train_loss")),
]


def _mean_stable_rank(result: dict) -> float | None:
    ranks = [
        layer["stable_rank"] / min(layer["rows"], layer["columns"])
        for layer in result.get("layers", [])
        if min(layer["rows"], layer["columns"]) > 1
    ]
    return statistics.fmean(ranks) if ranks else None


def _active(result: dict) -> float | None:
    return float(len(result["active"])) if "active" in result else None


_RANKS = [
    Column("mean stable rank / rank", _mean_stable_rank),
    Column("layers that SRN bounds", _active, 2),
]
_ND = Column("critic's loss (higher is better)", At("divergence"))
_ROUGHNESS = Column("deviation of D's loss", At("roughness"))

COLUMNS: dict[str, list[Column]] = {
    "fig2a": [*_SLOPES, _SCORES[1], _SCORES[0], *_RANKS],
    "fig2b": [*_SLOPES, _SCORES[1], _SCORES[0]],
    "fig6": _SLOPES,
    "fig7": _SLOPES,
    "fig9": _JACOBIAN,
    "fig10": _JACOBIAN,
    "fig11": [_ROUGHNESS],
    "table2": _SCORES,
    "table3": _SCORES[:3],
    "table4": [_ND],
    "conversion": [_SCORES[1], _SCORES[0], _SLOPES[0], _ROUGHNESS],
    "table1": _ACCURACY,
    "fig1a": [_ACCURACY[2], _ACCURACY[4]],
    "fig1b": _FITTED,
    "fig1c": _FITTED,
    "measures": [
        Column("log Spec-Fro", At("complexity", "log_spec_fro")),
        Column("log Spec-L1", At("complexity", "log_spec_l1")),
        Column("log Jac-Norm", At("complexity", "log_jac_norm")),
        Column("positive margins, %", At("complexity", "positive_margins"), 3, 100),
    ],
}


def experiment_table(experiment: Experiment, results: Results) -> Table | None:
    """The table of one experiment; None where it has no row at all."""
    if experiment.name == "linear":
        return _linear(experiment, results)
    if experiment.name == "example_a2":
        return _identity(experiment, results)
    columns = COLUMNS[experiment.name]
    lines = []
    for slot in results.of_experiment[experiment.name]:
        cells = [_cell(results.values(slot, c.get), c) for c in columns]
        there = results.slots.get(slot, {})
        if there:
            failed = sum(bool(row.failed) for row in there.values())
            seeds = f"{len(there)}" + (f" ({failed} not finite)" if failed else "")
            lines.append([name_of(slot), *cells, seeds])
    if not lines:
        return None
    filled = [i for i in range(len(columns)) if any(line[i + 1] for line in lines)]
    header = ["", *(columns[i].title for i in filled), "seeds"]
    lines = [[line[0], *(line[i + 1] for i in filled), line[-1]] for line in lines]
    return Table(_title(experiment), header, lines, _note(experiment, results))


def name_of(slot: str) -> str:
    """A slot's name in tables: what the rows of an experiment differ in."""
    parts = slot.split("/")
    if parts[0] == "classifier":
        return f"{parts[4]}, {parts[3]}"
    if parts[0] == "gan":
        return parts[2] + (", second data set" if parts[1] == "second" else "")
    return slot


def _title(experiment: Experiment) -> str:
    return f"{experiment.name}: {experiment.title} ({experiment.source})"


def _cell(values: Values, column: Column) -> str:
    numbers = [column.scale * value for value in values.values()]
    if not numbers:
        return ""
    mean = f"{statistics.fmean(numbers):.{column.digits}g}"
    return f"{mean} ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else mean


def _note(experiment: Experiment, results: Results) -> str:
    """The accuracy of the feature network, wherever its features were used."""
    if not set(COLUMNS[experiment.name]) & set(_SCORES):
        return ""
    stated = {}
    for slot in results.of_experiment[experiment.name]:
        for row in results.slots.get(slot, {}).values():
            features = row.result.get("features")
            if features:
                data = row.unit["config"]["data"]["name"]
                stated[data] = (features["name"], features["accuracy"])
    texts = [
        f"{data}: {name}" + (f", accuracy {100 * accuracy:.1f} %" if accuracy is not None else "")
        for data, (name, accuracy) in sorted(stated.items())
    ]
    return f"Features: {'; '.join(texts)}." if texts else ""


def _linear(experiment: Experiment, results: Results) -> Table | None:
    rows = results.slots.get("linear", {})
    if not rows:
        return None
    ratios = [found["c"] for found in next(iter(rows.values())).result["ratios"]]
    lines = []
    for index, ratio in enumerate(ratios):
        cells = []
        for name in ("mean_slope", "jacobian_norm", "product_of_norms"):
            values = {seed: row.result["ratios"][index][name] for seed, row in rows.items()}
            cells.append(_cell(values, Column(name, lambda result: None)))
        lines.append([f"{ratio:g}", *cells, str(len(rows))])
    header = [
        "c",
        "mean empirical Lipschitz constant",
        "norm of the Jacobian",
        "product of norms",
        "seeds",
    ]
    return Table(_title(experiment), header, lines)


def _identity(experiment: Experiment, results: Results) -> Table | None:
    rows = results.slots.get("identity", {})
    if not rows:
        return None
    lines = []
    for name in next(iter(rows.values())).result:
        cells = [
            _cell({s: row.result[name][part] for s, row in rows.items()}, Column(part, At(), 6))
            for part in ("distance", "sigma", "stable_rank")
        ]
        lines.append([name, *cells, str(len(rows))])
    header = ["", "distance to W", "spectral norm", "stable rank", "seeds"]
    return Table(_title(experiment), header, lines)


def claims_table(found: Iterable[Verdict]) -> Table:
    """One line a claim."""
    lines = []
    for v in found:
        span = "" if v.interval is None else f"{v.interval[0]:.3g} to {v.interval[1]:.3g}"
        margin = "" if v.margin is None else f"; margin {v.margin:.2g}"
        lines.append(
            [
                v.claim.name,
                v.claim.says,
                v.claim.source,
                f"**{v.verdict}**",
                "" if v.effect is None else f"{v.effect:.3g}",
                span,
                f"{v.claim.effect}{margin}",
                str(v.seeds),
            ]
        )
    header = ["claim", "the paper says", "where", "verdict", "effect", "95 %", "effect is", "seeds"]
    return Table("Claims", header, lines)


def missing_table(results: Results) -> Table | None:
    """The experiments that lack rows."""
    lines = []
    for experiment in results.experiments:
        gaps = results.missing(experiment.name)
        wanted = sum(results.wanted[slot] for slot in results.of_experiment[experiment.name])
        lacking = sum(want - have for have, want in gaps.values())
        if lacking:
            lines.append([experiment.name, str(wanted - lacking), str(wanted)])
    if not lines:
        return None
    return Table("Not complete", ["experiment", "rows", "of"], lines)
