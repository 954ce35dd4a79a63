"""Runs what is missing: units side by side in processes of their own, one progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from srn_lab.experiments.store import Row, Store, row_of
from srn_lab.experiments.units import FeatureUnit, GanUnit, Place, Unit, key
from srn_lab.training.engine import NonFiniteLossError

_POLL_S = 0.5


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

    def place(self, unit: Unit, progress: Callable[[float], None]) -> Place:
        """Where ``unit`` writes."""
        return Place(self.out / "work" / key(unit), self.out / "features", progress, self.download)


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
            have = key(features) in rows and features.path(workplace.out / "features").exists()
            if not have:
                needed.setdefault(key(features), features)
    return [*needed.values(), *wanted.values()]


def run_units(
    units: list[Unit], workplace: Workplace, *, jobs: int = 1, console: Console | None = None
) -> list[Failure]:
    """Run ``units`` and store their rows as they finish; returns those that raised.

    A loss that is not finite is a result, stored as failed. Interrupted, the units that run leave
    the states they saved, and the next call goes on from those.
    """
    first = [unit for unit in units if isinstance(unit, FeatureUnit)]
    rest = [unit for unit in units if not isinstance(unit, FeatureUnit)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %"),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    failures: list[Failure] = []
    with Progress(*columns, console=console or Console(quiet=True)) as bar:
        total = sum(unit.cost for unit in units)
        task = bar.add_task(f"{len(units)} units", total=total or 1)
        done = [0.0, 0]

        def advance(fractions: dict[str, float], running: dict[str, Unit]) -> None:
            partial = sum(running[k].cost * f for k, f in fractions.items() if k in running)
            names = ", ".join(unit.slot.split("/", 1)[-1] for unit in running.values())
            text = f"{done[1]}/{len(units)} units, {names or 'starting'}"
            bar.update(task, completed=done[0] + partial, description=text[:70])

        for part in (first, rest):
            run = _run_here if jobs == 1 else _run_in_processes
            for unit, outcome in run(part, workplace, jobs, advance):
                done[0] += unit.cost
                done[1] += 1
                failures += _settle(unit, outcome, workplace)
        advance({}, {})
    return failures


def _settle(unit: Unit, outcome: Row | str, workplace: Workplace) -> list[Failure]:
    if isinstance(outcome, str):
        return [Failure(unit, outcome)]
    Store(workplace.store).append([outcome])
    # The states are of no more use; pictures stay.
    shutil.rmtree(workplace.place(unit, _ignore).folder / "state", ignore_errors=True)
    return []


def _ignore(fraction: float) -> None:
    """No one listens."""


def _run_here(units, workplace, jobs, advance):
    for unit in units:
        running = {key(unit): unit}
        last = [0.0]

        def hear(fraction: float, running=running, last=last) -> None:
            if time.monotonic() - last[0] > _POLL_S:
                last[0] = time.monotonic()
                advance(dict.fromkeys(running, fraction), running)

        advance({}, running)
        yield unit, _outcome(unit, workplace.place(unit, hear))


def _run_in_processes(units, workplace, jobs, advance):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        fractions = manager.dict()
        pool = ProcessPoolExecutor(jobs, mp_context=context)
        try:
            waiting, running = list(units), {}
            while waiting or running:
                while waiting and len(running) < jobs:
                    unit = waiting.pop(0)
                    future = pool.submit(_run_in_child, unit, workplace, fractions)
                    running[future] = unit
                ended, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                advance(dict(fractions), {key(unit): unit for unit in running.values()})
                for future in ended:
                    unit = running.pop(future)
                    fractions.pop(key(unit), None)
                    yield unit, _of_future(future)
        finally:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)


def _of_future(future: Future) -> Row | str:
    try:
        return future.result()
    except Exception as error:
        return f"the process ended: {error!r}"


def _run_in_child(unit: Unit, workplace: Workplace, fractions: Any) -> Row | str:
    torch.set_num_threads(1)
    last = [0.0]

    def tell(fraction: float) -> None:
        if time.monotonic() - last[0] > _POLL_S:
            last[0] = time.monotonic()
            with contextlib.suppress(OSError):  # the parent may have gone
                fractions[key(unit)] = fraction

    return _outcome(unit, workplace.place(unit, tell))


def _outcome(unit: Unit, place: Place) -> Row | str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return row_of(unit, unit.run(place))
    except NonFiniteLossError as error:
        return row_of(unit, {}, failed=str(error))
    except Exception as error:
        place.folder.mkdir(parents=True, exist_ok=True)
        (place.folder / "error.txt").write_text(traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
