"""Rows looked up by the part they play: slot, then seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from srn_lab.experiments.catalogue import EXPERIMENTS, Experiment
from srn_lab.experiments.presets import Preset
from srn_lab.experiments.store import Row
from srn_lab.experiments.units import key

Values = dict[int, float]
"""By seed."""


class Results:
    """The rows of one preset's experiments, and only those: other configurations do not mix in."""

    def __init__(
        self,
        preset: Preset,
        rows: Mapping[str, Row],
        *,
        seeds: int | None = None,
        experiments: Iterable[Experiment] | None = None,
    ) -> None:
        self.preset = preset
        self.experiments = list(experiments or EXPERIMENTS.values())
        self.slots: dict[str, dict[int, Row]] = {}
        self.of_experiment: dict[str, list[str]] = {}
        self.wanted: dict[str, int] = {}
        seen = set()
        for experiment in self.experiments:
            for unit in experiment.units(preset, seeds):
                slots = self.of_experiment.setdefault(experiment.name, [])
                if unit.slot not in slots:
                    slots.append(unit.slot)
                if key(unit) in seen:
                    continue
                seen.add(key(unit))
                self.wanted[unit.slot] = self.wanted.get(unit.slot, 0) + 1
                if key(unit) in rows:
                    self.slots.setdefault(unit.slot, {})[unit.seed] = rows[key(unit)]

    @property
    def rows(self) -> list[Row]:
        """Every row that counts, once."""
        return [row for seeds in self.slots.values() for row in seeds.values()]

    def values(self, slot: str, get: Callable[[dict], float | None]) -> Values:
        """One number of every seed's result; failed units and missing numbers are left out."""
        found = {}
        for seed, row in sorted(self.slots.get(slot, {}).items()):
            value = None if row.failed else get(row.result)
            if value is not None:
                found[seed] = value
        return found

    def missing(self, experiment: str) -> dict[str, tuple[int, int]]:
        """Slots of an experiment that lack rows: (there, wanted)."""
        counts = {
            slot: (len(self.slots.get(slot, {})), self.wanted[slot])
            for slot in self.of_experiment.get(experiment, [])
        }
        return {slot: count for slot, count in counts.items() if count[0] < count[1]}


@dataclass(frozen=True)
class At:
    """A number in a result by its path: ``At("scores", "fid")``."""

    path: tuple[str, ...]

    def __init__(self, *path: str) -> None:
        object.__setattr__(self, "path", path)

    def __call__(self, result: dict) -> float | None:
        value = result
        for name in self.path:
            if not isinstance(value, dict) or value.get(name) is None:
                return None
            value = value[name]
        return value
