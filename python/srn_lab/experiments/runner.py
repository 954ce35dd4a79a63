"""Runs what is missing: units side by side in processes of their own, one progress bar."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from srn_lab.experiments.store import Row, Store, row_of
from srn_lab.experiments.units import FeatureUnit, GanUnit, Place, Unit, key
from srn_lab.processes import Tell, side_by_side
from srn_lab.training.engine import NonFiniteLossError, is_main, processes


@dataclass(frozen=True)
class Failure:
    """A unit that raised; nothing is stored of it, so the next round tries again."""

    unit: Unit
    reason: str


@dataclass(frozen=True)
class Workplace:
    """Folders of a round: rows go to ``store``, states of unfinished runs under ``out``/work."""

    out: Path
    store: Path
    download: bool = False

    @property
    def features(self) -> Path:
        """Where feature networks are kept."""
        return self.out / "features"

    def folder(self, unit: Unit) -> Path:
        """Where ``unit`` writes."""
        return self.out / "work" / key(unit)


def missing(units: Iterable[Unit], workplace: Workplace) -> list[Unit]:
    """What has no row yet, in order and once each, with the feature networks it needs."""
    rows = Store(workplace.store).rows()
    wanted: dict[str, Unit] = {}
    needed: dict[str, FeatureUnit] = {}
    for unit in units:
        if key(unit) in rows:
            continue
        wanted.setdefault(key(unit), unit)
        if isinstance(unit, GanUnit) and unit.features is not None:
            features = unit.features
            if key(features) not in rows or not features.path(workplace.features).exists():
                needed.setdefault(key(features), features)
    return [*needed.values(), *wanted.values()]


def run_units(
    units: list[Unit], workplace: Workplace, *, jobs: int = 1, console: Console | None = None
) -> list[Failure]:
    """Run ``units`` and store their rows as they finish; returns those that raised.

    A loss that is not finite is a result, stored as failed. Interrupted, the units that run leave
    the states they saved, and the next call goes on from those. Started by accelerate's launcher,
    every process takes its share of each unit, and the first one stores.
    """
    if jobs > 1 and processes() > 1:
        raise ValueError(f"jobs must be 1 under a launcher of several processes, got {jobs}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %"),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    failures: list[Failure] = []
    done, ended = 0.0, 0
    with Progress(*columns, console=console or Console(quiet=True)) as bar:
        task = bar.add_task("starting", total=sum(unit.cost for unit in units) or 1)

        def advance(part: list[Unit], shares: Mapping[int, float]) -> None:
            names = ", ".join(part[index].slot.split("/", 1)[-1] for index in shares)
            text = f"{ended}/{len(units)} units, {names or 'starting'}"
            now = sum(part[index].cost * share for index, share in shares.items())
            bar.update(task, completed=done + now, description=text[:70])

        # Feature networks first: GANs are measured with them.
        for part in _halves(units):
            calls = side_by_side(
                partial(_run, workplace=workplace), part, jobs, partial(advance, part)
            )
            for index, outcome in calls:
                unit = part[index]
                done, ended = done + unit.cost, ended + 1
                if isinstance(outcome, Exception):
                    failures.append(Failure(unit, f"{type(outcome).__name__}: {outcome}"))
                    continue
                if is_main():
                    Store(workplace.store).append([outcome])
                    # The states are of no more use; pictures stay.
                    shutil.rmtree(workplace.folder(unit) / "state", ignore_errors=True)
        bar.update(task, completed=done, description=f"{ended}/{len(units)} units")
    return failures


def _halves(units: list[Unit]) -> tuple[list[Unit], list[Unit]]:
    features = [unit for unit in units if isinstance(unit, FeatureUnit)]
    return features, [unit for unit in units if not isinstance(unit, FeatureUnit)]


def _run(unit: Unit, tell: Tell, *, workplace: Workplace) -> Row:
    folder = workplace.folder(unit)
    try:
        return row_of(unit, unit.run(Place(folder, workplace.features, tell, workplace.download)))
    except NonFiniteLossError as error:
        return row_of(unit, {}, failed=str(error))
    except Exception:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
        raise
